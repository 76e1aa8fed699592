r"""SeCO and SpaCO: gradients of a long sequence, a chunk's activations at a time.

Paper (2025): 16 times the context on one GPU, peak memory 4 times below computing every layer again and 10 times below
plain backpropagation, 30 % slower than that; SpaCO, which visits few chunks, up to 3 times faster than SeCO. Measured
here: memory and time over lengths, the nearness of SpaCO's estimates, and losses after fine-tuning all parameters and
LoRA, beside exact gradients and truncated backpropagation.

  python -m experiments.run --config=configs/seco.py:gpu --workdir=runs/seco --config.data.path='books/*.xz'

A checkpoint of one's own, fine-tuned at long context and written as a folder:

  python -m experiments.run --config=configs/seco.py:gpu --workdir=runs/mine --config.model=hf:DIR \
      --config.data.path='texts/*.txt' --config.tuning.length=32768

Scale cpu (37 minutes on two busy cores) printed (2026-11-29):

  MB at 32,768 tokens     backpropagation 18,170   layers again 2,433   SeCO 1,662
  loss after 16 steps     exact 3.182   SeCO 3.182   SpaCO, a chunk in 4: 3.449   truncated 3.278

16 steps of 256 tokens favour whatever has less noise. What else was seen is in docs/log.md.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="SeCO and SpaCO",
  family="sequence",
  link="https://github.com/wenhaoli-xmu/seco",
  does="works out the gradient of a long sequence chunk by chunk, from the last to the first",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes, `base`), gpu (one GPU, smollm2), paper (16 K tokens)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="seco",
      experiment="seco",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is fine-tuned by `method`
      method="seco",  # exact, seco, truncated, or "spaco 8 2": a chunk in 8, compensation at most 2 ("none": no limit)
      subject=pick(cpu="base", gpu="smollm2"),
      data=dict(name="stdlib_code", path=""),  # a path to local text, or a tfds name
      parts=("costs", "gradients", "training"),
      costs=dict(
        lengths=pick(test=(64,), cpu=(1024, 8192, 32_768), gpu=(8192, 32_768, 65_536)),
        timed=pick(test=(64,), cpu=(1024,), gpu=(8192, 32_768, 65_536)),
        limit=pick(cpu=4e9, gpu=70e9),  # bytes: what takes more is not timed
        chunks=pick(test=(16,), cpu=(128,), gpu=(1024, 2048)),  # SpaCO's are the first
        visited=pick(test=(2,), cpu=(2,), gpu=(8, 4)),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        repetitions=pick(test=2, cpu=3),
      ),
      limits=pick(test=("1", "none"), cpu=("1", "2", "none")),  # of the compensation
      gradients=dict(
        length=pick(test=64, cpu=256, gpu=8192, paper=16_384),
        chunk=pick(test=16, cpu=16, gpu=512),
        visited=pick(test=(2,), cpu=(2, 4)),
        draws=pick(test=3, cpu=8, paper=32),
      ),
      parameters=pick(test=("all",), cpu=("all", "lora")),
      rates=dict(
        all=pick(test=(1e-3,), cpu=(1e-4, 3e-4, 1e-3), gpu=(2e-5, 6e-5, 2e-4)),
        lora=pick(test=(1e-2,), cpu=(1e-3, 3e-3, 1e-2), gpu=(3e-4, 1e-3, 3e-3)),
      ),
      seeds=pick(cpu=(0,), paper=(0, 1)),
      share=pick(test=2, cpu=4, gpu=8),  # SpaCO, in the claims, visits a chunk in so many
      methods=pick(
        test=("exact", "seco", "spaco 2 2", "truncated"),
        cpu=("exact", "seco", "spaco 4 1", "spaco 4 2", "truncated"),
        gpu=("exact", "seco", "spaco 8 1", "spaco 8 2", "spaco 8 none", "truncated"),
        paper=(
          *("exact", "seco", "spaco 8 1", "spaco 8 2", "spaco 8 none", "truncated"),
          *("spaco 4 2", "spaco 16 2"),
        ),
      ),
      tuning=dict(
        parameters="all",  # of config.model: all, or lora
        rank=8,
        alpha=16,
        length=pick(test=64, cpu=256, gpu=4096, paper=16_384),
        chunk=pick(test=16, cpu=32, gpu=512),
        batch=pick(test=8, cpu=1, gpu=2, paper=4),
        steps=pick(test=2, cpu=16, gpu=80, paper=300),
        rate=pick(test=1e-3, cpu=1e-4, gpu=6e-5),  # of config.model
        warmup=pick(test=1, cpu=2, gpu=10),
        remat=pick(cpu="none", gpu="full"),  # of exact gradients
        rope="llama3",  # frequencies where length is beyond the checkpoint's context: llama3, linear, none
        dtype=pick(cpu="float32", gpu="bfloat16"),
        checkpoint_every=pick(test=100, cpu=100),
        judged=pick(test=512, cpu=4096, gpu=262_144),  # tokens of held-out text
      ),
      save_dtype="bfloat16",
      mesh=dict(data=-1),
    )
  )
