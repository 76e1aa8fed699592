r"""LoRD: what do thinner maps cost, their basis taken from what a layer gives, beside other low ranks and few bits?

Paper (arXiv 2309.14021): ranks of a code model fall by up to 39.58 % at less than 1 % more perplexity; StarCoder 16 B
becomes 13.2 B without a loss in Pass@1 in ten minutes, and runs up to 22.35 % faster. Measured here on `base` and
`smollm2`, on held-out books, at equal parameters and at equal bytes.

  python -m experiments.run --config=configs/lord.py:gpu --workdir=runs/lord --config.data.path='books/*.xz'

Scale cpu printed (2026-11-28), perplexity on held-out books at 0.9, 0.8 and 0.7 of the parameters:

  base      41.0 dense    LoRD 42.6, 48.2, 66.8    SVD-LLM 51.5, 61.0, 76.7    4 bits by GPTQ, 0.3 of the bytes: 41.5
  smollm2   49.1 dense    LoRD 55.0, 88.7          SVD-LLM 104, 136

A model of one's own, compressed to a folder:

  python -m experiments.run --config=configs/lord.py --config.model=hf:DIR --config.budget=0.8 --workdir=runs/mine
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="LoRD",
  family="weights",
  link="https://arxiv.org/abs/2309.14021",
  does="replaces linear maps by two thinner ones along the principal directions of what they give",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (more text)."""
  pick = scales.picker(scale)

  return ml_collections.ConfigDict(
    dict(
      paper="lord",
      experiment="lord",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is compressed to `budget`
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      budget=0.8,  # of the parameters of the blocks' maps
      data=dict(
        name="stdlib_code", path="", calibration="validation", test="test"
      ),  # a path to local text, or a tfds name
      other=dict(name="local_text", path="docs", split="train"),  # calibrated on for comparison
      parts=pick(
        test=("frontier", "texts", "tuning", "speed"),
        cpu=("frontier", "texts"),
        gpu=("frontier", "speed", "texts", "tuning"),
      ),
      first=("texts", "tuning", "speed"),  # parts that are measured of the first model alone
      text=dict(  # rows to calibrate on, rows to choose ranks by, tokens to be judged on
        base=dict(
          rows=pick(test=8, cpu=24, gpu=256, paper=512),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=8, gpu=32, paper=64),
          batch=pick(test=4, cpu=8, gpu=32),
          judged=pick(test=128, cpu=8192, gpu=131_072, paper=262_144),
        ),
        others=dict(
          rows=pick(test=8, cpu=12, gpu=256, paper=512),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=3, gpu=32, paper=64),
          batch=pick(test=4, cpu=4, gpu=32),
          judged=pick(test=128, cpu=2048, gpu=131_072, paper=262_144),
        ),
      ),
      sweep=dict(
        base=pick(test=(0.9, 0.5), cpu=(0.9, 0.7, 0.5, 0.35), gpu=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
        others=pick(test=(0.9, 0.5), cpu=(0.8, 0.4), gpu=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
        multiple=pick(test=8, cpu=32),
        searched=pick(test=2, cpu=2, gpu=8),  # rows of the calibration text that ASVD's own search reads
      ),
      # Methods with their budget: a share of the parameters, or bits a weight.
      methods=dict(
        base=pick(
          test=(*METHODS, *RANKED),
          cpu=(
            *METHODS,
            *RANKED,
            *MORE,
            "lord 0.9",
            "lord 0.85",
            "lord 0.7",
            "svd_llm 0.9",
            "svd_llm 0.7",
            "gptq 3",
            "rtn 3",
          ),
          gpu=(*METHODS, *RANKED, *MORE, *SWEPT),
        ),
        others=pick(
          test=METHODS,
          cpu=("lord 0.9", "lord 0.8", "svd_llm 0.9", "svd_llm 0.8", "rtn 4"),
          gpu=(*METHODS, *RANKED, *MORE, *SWEPT),
        ),
      ),
      group=pick(test=8, cpu=32),  # of weights with a scale
      spqr=dict(bits=3, group=pick(test=8, cpu=16), outliers=0.01),  # about 4 bits with all that is stored
      blocks=pick(test=2, cpu=3),  # of sign stacks
      block_rank=pick(test=1, cpu=2),
      tuning=dict(  # of adapters beside maps in 4 bits, on the calibration's split
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
          depth=pick(test=2, gpu=24, cpu=24),
          width=pick(test=64, cpu=896),
          q_heads=pick(test=4, cpu=14),
          kv_heads=2,
          head_dim=pick(test=16, cpu=64),
          mlp_width=pick(test=128, cpu=4864),
          vocab_size=pick(test=64, cpu=151_936),
        ),
        rows=pick(test=(1, 2), cpu=(1, 64)),
        time=pick(test=32, cpu=512),
        tokens=pick(test=4, cpu=64),
        repetitions=pick(test=2, cpu=10),
      ),
    )
  )


METHODS = ("lord 0.8", "uniform 0.8", "uncentred 0.8", "svd_llm 0.8", "asvd 0.8", "lord+rtn 0.8", "rtn 4", "gptq 4")
RANKED = ("svd_llm_ranked 0.8", "asvd_ranked 0.8", "asvd_searched 0.8")  # at ranks chosen as LoRD's are, or ASVD's way
MORE = (
  *("svd 0.8", "sequential 0.8", "nf4 4", "lord+nf4 0.8", "spqr 3", "lord+spqr 0.8"),
  *("lord+bitstack 0.8", "bitstack 1"),
)
SWEPT = (
  *(f"{name} {budget}" for name in ("lord", "svd_llm", "asvd", "svd") for budget in (0.95, 0.9, 0.85, 0.7)),
  *("uncentred 0.9", "uncentred 0.7", "lord+rtn 0.9", "rtn 8", "rtn 3", "gptq 3", "rtn 2", "gptq 2"),
)
