r"""BitStack: one file for every size, beside quantisers that make a file for each.

Paper (arXiv 2410.23918), Llama 3.1 8B, perplexity on WikiText-2 (6.24 dense) at the bytes of 2, 3 and 4 bits in groups
of 128: GPTQ 1.7e5, 38.3, 6.83; AWQ 1.5e6, 8.06, 6.63; BitStack 79.3, 10.9, 8.14. It wins at 2 bits and loses from 3 or
4 on. Measured here on `base` and `smollm2`, on held-out books, with the ablations of the paper.

  python -m experiments.run --config=configs/bitstack.py:gpu --workdir=runs/bitstack --config.data.path='books/*.xz'

Scale cpu printed (2026-11-28), perplexity of `base` (41.0 dense) at the bytes of 2, 3 and 4 bits in groups of 64:

  GPTQ 88.9, 44.7, 41.8     AWQ 86.3, 45.3, 42.0     BitStack 133, 62.1, 49.8     blocks in random order 1221, 110

A model of one's own, in a share of the bytes of its blocks:

  python -m experiments.run --config=configs/bitstack.py --config.model=hf:DIR --config.budget=0.25 --workdir=runs/mine
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="BitStack",
  family="weights",
  link="https://arxiv.org/abs/2410.23918",
  does="makes of a weight a stack of blocks of about a bit, any number of which is a model",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (16 blocks, more text)."""
  pick = scales.picker(scale)

  return ml_collections.ConfigDict(
    dict(
      paper="bitstack",
      experiment="bitstack",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is compressed to `budget`
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      budget=0.25,  # of the blocks' bytes in 16 bits: what a model of one's own is compressed to
      # A path to local text, or a tfds name; the splits.
      data=dict(name="stdlib_code", path="", calibration="validation", test="test"),
      parts=pick(test=("frontier", "sizes", "ablations"), cpu=("frontier", "sizes", "ablations")),
      first=("sizes", "ablations"),  # parts that are measured of the first model alone
      text=dict(  # rows to calibrate on, rows to sort blocks by, tokens to be judged on
        base=dict(
          rows=pick(test=8, cpu=24, gpu=64, paper=256),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=4, gpu=16, paper=32),
          batch=pick(test=4, cpu=8, gpu=32),
          judged=pick(test=128, cpu=8192, gpu=131_072, paper=262_144),
        ),
        others=dict(
          rows=pick(test=8, cpu=8, gpu=64, paper=256),
          time=pick(test=32, cpu=256, gpu=512),
          chosen=pick(test=2, cpu=2, gpu=16, paper=32),
          batch=pick(test=4, cpu=4, gpu=32),
          judged=pick(test=128, cpu=2048, gpu=131_072, paper=262_144),
        ),
      ),
      blocks=dict(base=pick(test=3, cpu=4, gpu=8, paper=16), others=pick(test=3, cpu=3, gpu=6, paper=16)),
      rank=pick(test=1, cpu=2),  # of a block
      orders=dict(base=("average", "greedy", "random"), others=pick(cpu=("level",), gpu=("average",))),
      rivals=dict(
        base=pick(
          test=("rtn 2", "gptq 2", "awq 2", "gptq 3", "awq 3", "gptq 4"),
          cpu=tuple(f"{how} {bits}" for bits in (2, 3, 4) for how in ("rtn", "gptq", "awq")),
        ),
        others=pick(
          test=("rtn 2",),
          cpu=("rtn 2", "rtn 3"),
          gpu=tuple(f"{how} {bits}" for bits in (2, 3, 4) for how in ("rtn", "gptq", "awq")),
        ),
      ),
      group=pick(test=8, cpu=64),  # of weights with a scale
      steps=pick(test=3, cpu=6, gpu=20),  # sizes between the smallest and the largest
      bench=dict(  # of a folder that was written
        tokens=pick(test=4, cpu=64), repetitions=pick(test=2, cpu=3), dtype=pick(cpu="float32", gpu="bfloat16")
      ),
    )
  )
