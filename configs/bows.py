r"""BOWS: do correlated features interfere constructively in superposition, and what do decay and size do to that?

Prieto et al. 2026, arXiv 2603.09972, qualitative: features are arranged by co-activation, so that interference between
active words is positive; more so with weight decay and small latents; months form a ring.

  python -m experiments.run --config=configs/bows.py:cpu --workdir=runs/bows \
      --config.data.name=local_text --config.data.path=books/val.jsonl.xz --config.data.split=validation

Scale cpu takes a minute on two cores with 12,000 paragraphs of novels; scale gpu, 60,000 paragraphs, ten on one H100.
Without the data options the text is the Python standard library. What does not hold, and why, is in docs/log.md.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="BOWS, bag-of-words superposition",
  family="tensors",
  link="https://arxiv.org/abs/2603.09972",
  does="trains small autoencoders on which words occur together, to see how correlated features share dimensions",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, minutes), paper (the paper's vocabulary)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="bows",
      experiment="bows",
      scale=scale,
      seed=0,
      data=dict(
        name="stdlib_code",  # or local_text with a path, or a tfds name
        path="",
        split=pick(test="validation", cpu="train"),
        rows=pick(test=600, cpu=12_000, gpu=60_000, paper=400_000),  # paragraphs at most
        vocabulary=pick(test=200, cpu=1000, gpu=4000, paper=10_000),
        group=4,  # rows a window, for interference and R2
        cycle_group=20,  # rows a window, for months
        block=pick(test=100, cpu=400),  # rows a block; every fifth block is held out
      ),
      train=dict(
        steps=pick(test=20, cpu=800, gpu=3000, paper=31_700),
        paper_steps=31_700,  # shorter runs stretch the decays of the geometry so that rate x decay x steps is the same
        batch=pick(test=32, cpu=128, gpu=512),
        rate=5e-4,
        latents=pick(test=(10, 20), cpu=(25, 50, 100), gpu=(50, 100, 200, 400, 800, 4000)),
        weight_decays=(0.0, 1.0, 4.0),
        seeds=pick(test=2, cpu=2, gpu=3),
        cycle_latent=pick(test=10, cpu=100),
        cycle_seeds=pick(test=1, cpu=3),
      ),
      synthetic=dict(
        latents=pick(test=(2, 4), cpu=(2, 4, 6, 8)),
        epochs=pick(test=4, cpu=60, paper=200),
        seeds=pick(test=1, cpu=3),
      ),
      cities=dict(
        name="generated",  # or csv: a path to lines of "latitude,longitude,population"
        path="",
        count=pick(test=40, cpu=300, gpu=800),
        pairs=pick(test=2000, cpu=80_000, gpu=875_000),
        steps=pick(test=15, cpu=1500, gpu=27_000),
        batch=pick(test=128, cpu=1024),
      ),
    )
  )
