r"""STRUPRUNE: heads and neurons pruned for the whole network with one layer in memory: does it match a global oracle?

Paper (arXiv 2510.03246): the perplexity of global structured pruning on OPT models, memory O(sqrt N) in the place of
O(N), a closed form for masks, a softmax rule for what layers lose. Measured here on `base` and `smollm2`, on held-out
books, at equal parameters of the blocks; at scale gpu on two networks trained here as well.

  python -m experiments.run --config=configs/struprune.py:gpu --workdir=runs/struprune --config.data.path='books/*.xz'

Scale cpu printed (2026-12-01), perplexity on held-out books at 0.8, 0.6 and 0.5 of the parameters (smollm2: 0.8):

  base, 41.0     STRUPRUNE 51.1, 81.0, 101   global oracle 53.1, 99.5, 125   Wanda-sp 57.7, 102, 264   FLAP 52.7, 89.2
  smollm2, 49.1  STRUPRUNE 61.4              global oracle 75.0              Wanda-sp 97.0             FLAP 62.5

A model of one's own, pruned to a folder:

  python -m experiments.run --config=configs/struprune.py --config.model=hf:DIR --config.budget=0.8 --workdir=runs/mine
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="STRUPRUNE",
  family="weights",
  link="https://arxiv.org/abs/2510.03246",
  does="takes whole heads and neurons out of a network, a layer in memory at a time, and fits what is left",
)
RIVALS = ("oracle", "wanda_sp", "flap", "llm_pruner", "slicegpt", "magnitude")
MAIN = ("struprune", *RIVALS, "uniform", "threshold")
BY_WEIGHT = ("sparsellm",)  # masks without structure: no smaller where maps are multiplied as matrices
PARTS = ("oracle+rebuilt", "one_step", "one_round", "weights_kept", "no_biases", "obs")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (more text)."""
  pick = scales.picker(scale)
  every = lambda methods, *budgets: tuple(f"{name} {budget}" for budget in budgets for name in methods)
  budgets = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
  swept = (*every(("struprune", *RIVALS), *budgets), *every(("uniform", "threshold", "oracle+rebuilt"), 0.8, 0.6))

  return ml_collections.ConfigDict(
    dict(
      paper="struprune",
      experiment="struprune",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is pruned to `budget`
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      budget=pick(test=0.7, cpu=0.8),  # of the parameters of the blocks' maps
      data=dict(name="stdlib_code", path="", calibration="validation", test="test"),  # as configs/lord.py
      parts=pick(
        test=("memory", "frontier", "recovered", "speed"),
        cpu=("memory", "frontier"),
        gpu=("memory", "speed", "frontier", "trained", "recovered"),
      ),
      first=("recovered",),  # parts that are measured of the first model alone
      text=dict(  # rows to calibrate on, rows to choose by, tokens to be judged on
        base=dict(
          rows=pick(test=8, cpu=12, gpu=128, paper=256),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=4, gpu=32, paper=64),
          batch=pick(test=4, cpu=4, gpu=32),
          judged=pick(test=128, cpu=8192, gpu=131_072, paper=262_144),
        ),
        others=dict(
          rows=pick(test=8, cpu=12, gpu=128, paper=256),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=3, gpu=32, paper=64),
          batch=pick(test=4, cpu=4, gpu=32),
          judged=pick(test=128, cpu=2048, gpu=131_072, paper=262_144),
        ),
      ),
      # Methods with their share of the blocks' parameters.
      methods=dict(
        base=pick(
          test=every((*MAIN, *BY_WEIGHT, "oracle+rebuilt", "one_step"), 0.7),
          cpu=(
            *every(MAIN, 0.8, 0.6),
            *every(("oracle+rebuilt",), 0.8, 0.6),
            *every(BY_WEIGHT, 0.8, 0.6, 0.5),
            *every(("struprune", "oracle", "wanda_sp"), 0.5),
            *("one_step 0.6", "one_round 0.6", "weights_kept 0.6", "random 0.8"),
          ),
          gpu=(*swept, *every(BY_WEIGHT, *budgets), *every(PARTS[1:], 0.8, 0.6), "random 0.8"),
        ),
        others=pick(
          test=every((*MAIN, *BY_WEIGHT, "oracle+rebuilt", "one_step"), 0.7),
          cpu=every(("struprune", "oracle", "wanda_sp", "flap", "magnitude"), 0.8),
          gpu=(
            *every(("struprune", *RIVALS), *budgets[:4]),
            *every(("uniform", "threshold", "oracle+rebuilt", *BY_WEIGHT), 0.8, 0.6),
          ),
        ),
      ),
      solver=dict(  # of ADMM, and rounds over activations
        stages=pick(test=1, cpu=1, gpu=3), iterations=pick(test=2, cpu=8, gpu=10), outer=pick(test=2, cpu=2, gpu=4)
      ),
      gradient_rows=pick(test=2, cpu=8, gpu=32, paper=64),  # of the oracle and LLM-Pruner
      spared=((0.0, 0.0), (0.125, 0.0625), (0.2, 0.2)),  # shares of the layers that LLM-Pruner may leave whole
      memory=dict(
        depths=pick(test=(2, 3), gpu=(6, 12, 24), cpu=(2, 4, 8)),
        shape=dict(
          width=pick(test=32, cpu=256, gpu=2048),
          q_heads=pick(test=4, cpu=8, gpu=32),
          kv_heads=pick(test=2, cpu=4, gpu=8),
          head_dim=pick(test=8, cpu=32, gpu=64),
          mlp_width=pick(test=64, cpu=512, gpu=5632),
          vocab_size=pick(test=64, cpu=512, gpu=32_000),
        ),
        rows=pick(test=4, cpu=4, gpu=8),
        time=pick(test=16, cpu=64, gpu=512),
        batch=pick(test=2, cpu=2, gpu=4),
      ),
      trained=dict(  # two networks of one's own, Muon and AdamW as configs/base.py
        shape=dict(
          depth=pick(test=2, cpu=4, gpu=12),
          width=pick(test=32, cpu=128, gpu=512),
          q_heads=pick(test=4, cpu=4, gpu=8),
          head_dim=pick(test=8, cpu=32, gpu=64),
          context=pick(test=64, cpu=512),
        ),
        shapes=dict(
          opt=dict(mlp="relu2", kv_heads=pick(test=4, cpu=4, gpu=8), mlp_width=pick(test=160, cpu=512, gpu=2048)),
          llama=dict(mlp="swiglu", kv_heads=2, mlp_width=pick(test=160, cpu=384, gpu=1408)),
        ),
        steps=pick(test=2, cpu=100, gpu=3000, paper=10_000),
        batch=pick(test=2, cpu=8, gpu=64),
        length=pick(test=32, cpu=256, gpu=512),
        scale=1.0,
        recall=0.0,
        warmup=pick(test=1, cpu=20, gpu=100),
        warmdown=0.6,
        accumulate=1,
        dtype=pick(cpu="float32", gpu="bfloat16"),
        checkpoint_every=1000,
        methods=dict(others=pick(test=every(MAIN, 0.7), cpu=every((*MAIN, "oracle+rebuilt"), 0.8, 0.6))),
      ),
      mesh=dict(data=-1, fsdp=1, tensor=1),
      tuning=dict(  # of adapters beside the maps, on the calibration's split
        steps=pick(test=2, cpu=60, gpu=200, paper=1000),
        batch=pick(test=2, cpu=4, gpu=16),
        length=pick(test=16, cpu=256, gpu=512),
        rank=pick(test=2, cpu=16),
        rate=5e-4,
      ),
      bench=dict(  # of a folder that was written
        tokens=pick(test=4, cpu=64), repetitions=pick(test=2, cpu=3), dtype=pick(cpu="float32", gpu="bfloat16")
      ),
      speed=dict(
        shape=dict(
          depth=pick(test=2, cpu=24),
          width=pick(test=64, cpu=896),
          q_heads=pick(test=4, cpu=14),
          kv_heads=pick(test=4, cpu=14),
          head_dim=pick(test=16, cpu=64),
          mlp_width=pick(test=128, cpu=4864),
          vocab_size=pick(test=64, cpu=32_000),
        ),
        multiple=pick(test=16, cpu=128),  # of neurons
        rows=pick(test=(1,), cpu=(1, 64)),
        time=pick(test=32, cpu=512),
        tokens=pick(test=4, cpu=64),
        repetitions=pick(test=2, cpu=10),
      ),
    )
  )
