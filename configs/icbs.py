r"""iCBS: are blocks of weights that are decided together a better mask than scores, and what does more time buy?

Paper (arXiv 2411.17796): masks of Mistral-7B and DeiT better than Wanda's at equal density, better the longer it runs;
its notebook takes an MLP on Fashion-MNIST from 60.7 to 82.6 % at a density of 0.1. Measured here on `base` and
`smollm2` on held-out books, and on an MLP trained on CIFAR-10, beside Wanda, SparseGPT, CBS and parts left out.

  python -m experiments.run --config=configs/icbs.py:gpu --workdir=runs/icbs --config.data.path='books/*.xz' \
      --config.pictures.path=cifar10

Scale cpu printed (2026-11-28), 0.02 (smollm2) to 2.4 % (the MLP) of the weights were ever in a block:

  base      at 0.4 of the weights   Wanda 99.1   iCBS 84.5   SparseGPT, which changes weights, 69.2   dense 50.6
            at 0.3                  Wanda 338    iCBS 165
  smollm2   at 0.4                  Wanda 252    iCBS 220   dense 76.7
  CIFAR-10  at 0.1                  magnitude 16.1 %   Wanda 20.9   SparseGPT 27.2   iCBS 37.9   dense 45.2

A model of one's own, pruned to a density, written as a bit a weight and the weights that stay:

  python -m experiments.run --config=configs/icbs.py --config.model=hf:DIR --config.budget=0.5 --workdir=runs/mine
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="iCBS",
  family="weights",
  link="https://arxiv.org/abs/2411.17796",
  does="prunes weights in blocks that are decided together, for as long as one likes",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (the paper's blocks and epochs)."""
  pick = scales.picker(scale)

  return ml_collections.ConfigDict(
    dict(
      paper="icbs",
      experiment="icbs",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is pruned to `budget`
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      budget=0.4,  # the share of the weights of the blocks' maps that stays
      data=dict(
        name="stdlib_code", path="", calibration="validation", test="test"
      ),  # a path to local text, or a tfds name
      parts=("frontier", "pictures"),
      first=(),
      text=dict(  # rows that iCBS draws batches of, the first `one_shot` of them for the others; tokens to be judged on
        base=dict(
          rows=pick(test=8, cpu=128, gpu=1024, paper=4096),
          one_shot=pick(test=4, cpu=32, gpu=128),
          time=pick(test=24, cpu=64, gpu=256, paper=512),
          chosen=pick(test=1, cpu=8),
          batch=pick(test=4, cpu=8, gpu=16),
          judged=pick(test=96, cpu=4096, gpu=131_072, paper=262_144),
        ),
        others=dict(
          rows=pick(test=8, cpu=64, gpu=1024, paper=4096),
          one_shot=pick(test=4, cpu=16, gpu=128),
          time=pick(test=24, cpu=64, gpu=256, paper=512),
          chosen=pick(test=1, cpu=4),
          batch=pick(test=4, cpu=8, gpu=16),
          judged=pick(test=96, cpu=2048, gpu=65_536, paper=262_144),
        ),
      ),
      language=dict(
        base=dict(
          block=pick(test=64, cpu=2048, gpu=4096),
          batch=pick(test=4, cpu=8, gpu=32),
          epochs=pick(test=2, cpu=3, gpu=10),
          steps=pick(test=2, cpu=8, gpu=16, paper=300),
          **SHARED,
          least=1,
          restarts=pick(test=1, cpu=2, paper=20),
          solver=pick(test="swap", cpu="sa+swap", gpu="swap"),
          iterations=pick(test=20, cpu=200, gpu=1000),
        ),
        others=dict(
          block=pick(test=64, cpu=2048, gpu=4096),
          batch=pick(test=4, cpu=8, gpu=32),
          epochs=pick(test=2, cpu=2, gpu=10),
          steps=pick(test=2, cpu=5, gpu=16, paper=300),
          **SHARED,
          least=1,
          restarts=pick(test=1, cpu=2, paper=20),
          solver=pick(test="swap", cpu="sa+swap", gpu="swap"),
          iterations=pick(test=20, cpu=200, gpu=1000),
        ),
      ),
      # Methods with the density they are measured at.
      methods=dict(
        base=pick(
          test=(*ONE_SHOT, "wanda_more 0.4", "icbs 0.4", "icbs_diagonal 0.4"),
          cpu=(*ONE_SHOT, "wanda_more 0.4", "icbs 0.4", "icbs_diagonal 0.4", "wanda 0.3", "icbs 0.3"),
          gpu=(*ONE_SHOT, *MORE, "icbs_diagonal 0.4", "icbs_random 0.4", "icbs_no_gradient 0.4"),
        ),
        others=pick(
          test=("wanda 0.4", "wanda_more 0.4", "sparsegpt 0.4", "icbs 0.4", "icbs_diagonal 0.4"),
          cpu=("wanda 0.4", "icbs 0.4"),
          gpu=(*ONE_SHOT, *MORE, "icbs_diagonal 0.4"),
        ),
      ),
      pictures=dict(
        name="cifar10",  # a tfds set; or `path`, a folder with train/<class>/*.jpg and test/<class>/*.jpg
        path="",
        most=pick(test=0, cpu=1000, gpu=0),  # images of a class; 0 takes all
        width=pick(test=16, cpu=256, gpu=512),
        train_epochs=pick(test=2, cpu=8, gpu=20),
        train_batch=pick(test=8, cpu=100, gpu=200),
        rate=1e-3,
        decay=1e-4,
        one_shot=pick(test=16, cpu=1024, gpu=2048),  # images that the others are calibrated on
        more=pick(test=32, cpu=6000, gpu=50_000),  # as many as iCBS sees
        batch=pick(test=8, cpu=200),
        main=pick(test=0.5, cpu=0.1),  # the density of the first claim
        start="magnitude",
        block=pick(test=8, cpu=1024),
        epochs=pick(test=2, cpu=10),
        steps=pick(test=2, cpu=3, gpu=12, paper=300),
        **SHARED,
        least=1,
        restarts=pick(test=1, cpu=2, gpu=4, paper=10),
        solver=pick(test="swap", cpu="sa+swap", gpu="swap"),
        iterations=pick(test=20, cpu=200, gpu=1000),
        ancestor=dict(  # CBS-S: images, random starts, their noise, swaps at most, ridge over the mean of F's diagonal
          samples=pick(test=8, cpu=64, gpu=256),
          starts=pick(test=2, cpu=4, gpu=10),
          noise=0.1,
          swaps=pick(test=3, cpu=20, gpu=300),
          ridge=1.0,
        ),
        methods=pick(
          test=tuple(text.replace("0.1", "0.5") for text in (*CLASSIFIED, *ALL_PARTS)),
          cpu=(*CLASSIFIED, *ALL_PARTS, "magnitude 0.05", "wanda 0.05", "icbs 0.05"),
          gpu=(*CLASSIFIED, *ALL_PARTS, *OTHERWISE),
        ),
      ),
      bench=dict(  # of a folder that was written
        tokens=pick(test=4, cpu=64), repetitions=pick(test=2, cpu=3), dtype=pick(cpu="float32", gpu="bfloat16")
      ),
    )
  )  # fmt: skip


SHARED = dict(gradient=0.75, ridge=1e-3, fix_prune=0.42, fix_keep=0.35, tabu=0.40)  # a, lam and shares, as published
ONE_SHOT = ("wanda 0.4", "sparsegpt 0.4", "magnitude 0.4", "gradient 0.4", "random 0.4")
MORE = (
  *("wanda_more 0.4", "icbs 0.4"),
  *(f"{how} {density}" for density in (0.3, 0.5) for how in ("wanda", "wanda_more", "sparsegpt", "magnitude", "icbs")),
)
PARTS = tuple(f"icbs_{part} 0.4" for part in ("diagonal", "released", "random", "no_gradient", "no_tabu", "no_fixing"))
ALL_PARTS = tuple(text.replace("0.4", "0.1") for text in ("icbs 0.4", *PARTS))
CLASSIFIED = (
  *("magnitude 0.1", "wanda 0.1", "wanda_more 0.1", "gradient 0.1", "random 0.1", "sparsegpt 0.1"),
  *("cbs 0.1", "cbs_update 0.1", "icbs_from_wanda 0.1"),
)
OTHERWISE = tuple(
  f"{how} {density}"
  for density in (0.05, 0.2)
  for how in ("magnitude", "wanda", "sparsegpt", "cbs", "icbs", "icbs_from_wanda")
)
