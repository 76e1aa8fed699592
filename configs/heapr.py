r"""HEAPr: which hidden neurons of which experts can go, and what does that cost beside dropping or merging experts?

Paper (arXiv 2509.22299): DeepSeekMoE-16B without 20 % of its experts' parameters has a perplexity of 6.54 on WikiText-2
instead of 6.38, NAEE's 9.44; FLOPs fall by 20 %. Measured here on a small mixture that is trained first, on text that
it has not seen: perplexity at 5 to 75 % removed beside rankings by other scores, dropped and merged experts; rank
correlation with the loss that single removals cost; FLOPs and memory of the layouts; speed on a GPU.

  python -m experiments.run --config=configs/heapr.py:gpu --workdir=runs/heapr --config.data.path='books/*.xz'

Scale cpu printed (2026-11-28; 3 to 10 minutes of training, 3 to 5 of the rest, by how busy the two cores are):

  perplexity on held-out books, 80.8 dense, without 25, 50 and 75 % of the experts' parameters
  HEAPr 81.5, 83.6, 91.0    G = I 81.7, 84.0, 92.8     CAMERA-P 81.6, 83.6, 92.1
  NAEE 84.3, 93.6, 135      D2-MoE 84.5, 91.6, 126     HC-SMoE 93.7, 122, 184

A model of one's own, compressed to a folder:

  python -m experiments.run --config=configs/heapr.py --config.model=hf:DIR --config.budget=0.75 --workdir=runs/mine
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="HEAPr",
  family="weights",
  link="https://arxiv.org/abs/2509.22299",
  does="removes the hidden neurons of experts that a second-order estimate of the loss can spare",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (more text)."""
  pick = scales.picker(scale)
  base = dict(  # of the dense model
    rows=pick(test=4, cpu=8, gpu=128),
    time=pick(test=32, cpu=256, gpu=512),
    chosen=1,
    batch=pick(test=4, cpu=4, gpu=16),
    judged=pick(test=64, cpu=2048, gpu=131_072),
  )
  sizes = dict(
    rows=pick(test=8, cpu=32, gpu=128, paper=512),
    time=pick(test=32, cpu=256, gpu=512, paper=2048),
    chosen=pick(test=2, cpu=8, gpu=64),
    batch=pick(test=4, cpu=8, gpu=16),
    judged=pick(test=128, cpu=8192, gpu=262_144),
  )
  return ml_collections.ConfigDict(
    dict(
      paper="heapr",
      experiment="heapr",
      scale=scale,
      seed=0,
      dense="base",  # its MLPs are pruned as mixtures of one expert
      model="",  # a hub name, or hf:DIR: that one alone is compressed to `budget`
      budget=0.75,  # of the parameters of the experts
      tile=pick(test=8, cpu=16, gpu=128),  # hidden neurons that a product of a folder's experts has at least
      data=dict(
        name="stdlib_code",  # or a tfds name; a path to local text
        path="",
        vocab_size=pick(test=320, cpu=1024, gpu=8192),
        calibration="validation",
        test="test",
      ),
      parts=pick(
        test=("training", "quality", "removals", "dense", "speed"),
        cpu=("training", "quality", "removals", "dense"),
        gpu=("training", "quality", "removals", "dense", "speed"),
      ),
      shape=dict(  # of the mixture that is trained
        depth=pick(test=1, cpu=3, gpu=8),
        width=pick(test=32, cpu=128, gpu=512),
        q_heads=pick(test=2, cpu=4, gpu=8),
        kv_heads=2,
        head_dim=pick(test=16, cpu=32, gpu=64),
        mlp_width=pick(test=32, cpu=128, gpu=512),  # of no layer: all have experts
        context=pick(test=64, cpu=256, gpu=512),
        qk_norm="before_rope",
        tied_embeddings=True,
        experts=dict(
          count=pick(test=4, cpu=8, gpu=16), active=2, width=pick(test=16, cpu=128, gpu=512), normalize=True
        ),
      ),
      train=dict(
        steps=pick(test=2, cpu=300, gpu=1200, paper=20_000),
        batch=pick(test=8, cpu=8, gpu=128),
        length=pick(test=32, cpu=256, gpu=512),
        accumulate=pick(cpu=1, gpu=2),
        scale=pick(cpu=4.0, gpu=1.0),  # of all learning rates
        recall=0.0,
        balance=0.01,
        warmdown=0.65,
        warmup=pick(cpu=20, gpu=40),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        checkpoint_every=pick(test=2, cpu=100, gpu=600),
      ),
      text=dict(base=base, others=sizes),  # rows to calibrate on and to choose by, tokens to be judged on
      ratios=pick(test=(0.25,), cpu=(0.125, 0.25, 0.5, 0.75), gpu=(0.125, 0.25, 0.375, 0.5, 0.75)),
      fine=pick(test=(), cpu=(0.05, 0.375), gpu=(0.05, 0.1, 0.2)),  # of HEAPr alone besides
      tokens=pick(test=64, cpu=2048, gpu=8192),  # of the calibration that methods by reconstruction look at
      removals=dict(count=pick(test=6, cpu=150, gpu=500), rows=pick(test=2, cpu=8, gpu=32)),
      speed=dict(
        rows=pick(test=2, cpu=8, gpu=32),
        time=pick(test=16, cpu=256, gpu=512),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        repetitions=pick(test=2, cpu=5, gpu=10),
      ),
      bench=dict(  # of a folder that was written
        tokens=pick(test=4, cpu=64), repetitions=pick(test=2, cpu=3), dtype=pick(cpu="float32", gpu="bfloat16")
      ),
      mesh=dict(data=-1),
    )
  )
