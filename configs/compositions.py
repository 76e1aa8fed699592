r"""Compressing together: bytes and perplexity of every method on one model, alone, behind another one, under SNLP.

  python -m experiments.run --config=configs/compositions.py:cpu --config.data.path='books/*.xz' --workdir=runs/all
  python -m experiments.run --config=configs/compositions.py --config.model=hf:DIR --workdir=runs/mine

A chain such as "lord 0.9 + gptq 4" is methods with their budget, each of what the one before gave: a share of the
parameters that stay (lord, struprune, even), a density (icbs, wanda), bits (rtn, gptq, awq), blocks (bitstack).
"even" is STRUPRUNE with layers of one size, whose maps can be quantised without filling them up. Every method is
calibrated on the same rows, by the settings of its own config. --config.chains.others="('lord 0.9',)" measures others.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Compressing together",
  family="foundation",
  link="docs/weights.md",
  does="is what methods that compress weights give on one model, alone, one behind the other and under SNLP",
)
ALONE = ("gptq 4", "gptq 3", "lord 0.9", "lord 0.8", "lord 0.7", "struprune 0.8", "even 0.8")
CHAINS = ("lord 0.9 + gptq 4", "lord 0.9 + bitstack 3", "even 0.8 + gptq 4", "struprune 0.8 + lord 0.9")
MORE = (
  *("gptq 2", "awq 4", "awq 3", "rtn 4", "struprune 0.7", "icbs 0.5", "wanda 0.5", "bitstack 4"),
  *("lord 0.8 + gptq 4", "even 0.9 + gptq 4", "even 0.8 + gptq 3"),
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (`base`, minutes), gpu (and SmolLM2, all methods), paper (more text)."""
  pick = scales.picker(scale)

  def text(*, judged):
    return dict(
      rows=pick(test=8, cpu=24, gpu=128, paper=256),
      time=pick(test=32, cpu=256, gpu=512),
      chosen=pick(test=2, cpu=4, gpu=32, paper=64),
      batch=pick(test=4, cpu=8, gpu=16),
      judged=judged,
    )

  return ml_collections.ConfigDict(
    dict(
      paper="compositions",
      experiment="compositions",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("base",), cpu=("base",), gpu=("base", "smollm2")),
      data=dict(
        name="stdlib_code", path="", calibration="validation", test="test"
      ),  # a path to local text, or a tfds name
      text=dict(
        base=text(judged=pick(test=128, cpu=8192, gpu=131_072)),
        others=text(judged=pick(test=128, cpu=2048, gpu=131_072)),
      ),
      chains=dict(
        base=pick(cpu=(*ALONE, *CHAINS), gpu=(*ALONE, *CHAINS, *MORE)),
        others=pick(cpu=(*ALONE, *CHAINS), gpu=(*ALONE, *CHAINS, *MORE)),
      ),
      group=pick(test=8, cpu=32),  # of weights with a scale; even layers have a multiple of it
      block_rank=pick(test=1, cpu=2, gpu=16),  # of BitStack's
      snlp=dict(  # how the last layers are solved: all but `tail`
        base=dict(layers=pick(test=1, cpu=2), groups=1, tail=1, iterations=1),
        others=dict(layers=pick(test=1, cpu=8), groups=pick(test=1, cpu=4), tail=pick(test=1, cpu=2), iterations=1),
      ),
    )
  )
