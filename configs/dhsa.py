r"""DHSA: do chunks that end where the content changes spend a budget of keys better than static blocks?

Paper (https://arxiv.org/abs/2510.24606): 6 to 18 % more than block sparse attention, prefill 20 to 60 % faster and 35 %
less memory than dense attention that is materialised, on Gemma-2-2b.

  python -m experiments.run --config=configs/dhsa.py:cpu --workdir=runs/dhsa --config.data.path='books/*.jsonl.xz'

The predictor is trained beside the frozen model, on a split that no number is of. Your model: --config.model=hf:DIR.
Scale cpu printed (2026-11-29), base, prompts of 512 tokens:

  questions answered: dense, DHSA at 1/4, DHSA at 1/16      99.5, 88.5, 40.5 %
  static blocks, even chunks at 1/16                        50.0, 46.5 %
  nats lost behind a prompt at 1/4: DHSA, static blocks     0.000, 0.005
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="DHSA, dynamic hierarchical sparse attention",
  family="attention",
  link="https://arxiv.org/abs/2510.24606",
  does="reads a prompt with a budget of keys for every block of queries, chosen by chunks that follow the content",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, minutes), paper (the paper's lengths)."""
  pick = scales.picker(scale)
  tight, middle, wide = 1 / 16, 1 / 8, 1 / 4
  ours = tuple(f"dhsa {share}" for share in (tight, middle, wide))
  static = tuple(f"blocks {share}" for share in (tight, middle, wide))
  others = tuple(f"{kind} {tight}" for kind in ("mean", "oracle", "even", "random"))
  caches = tuple(f"{kind} {tight}" for kind in ("streaming_llm", "h2o", "pyramidkv"))
  return ml_collections.ConfigDict(
    dict(
      paper="dhsa",
      experiment="dhsa",
      scale=scale,
      seed=0,
      subjects=pick(test=("base",), cpu=("base", "smollm2")),  # what hub.load takes
      model="",  # one of your own in their place: hf:DIR
      dtype=pick(cpu="float32", gpu="bfloat16"),
      parts=pick(
        test=("predictor", "accuracy", "losses", "prefill"),
        cpu=("accuracy", "losses", "predictor"),
        gpu=("prefill", "accuracy", "predictor", "losses"),
      ),
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      page=pick(cpu=16, gpu=64),
      select=dict(
        block=pick(test=8, cpu=16, gpu=32),
        local=pick(test=8, cpu=16, gpu=32),
        sink=pick(test=2, cpu=8, gpu=16),
        beta=8,
        apart=pick(test=4, cpu=8),
        theta=-20.0,  # no threshold: logits of a predictor that was trained for minutes rarely pass the published 1.1
        instruction=pick(test=16, cpu=16),
        observed=pick(test=4, cpu=8, gpu=64),  # last queries that PyramidKV scores keys by
      ),
      predictor=dict(
        subjects=pick(test=("base",), cpu=("base", "smollm2")),
        # The first is what all methods use; the others are compared with it in the first subject.
        encoders=pick(cpu=("attention",), gpu=("attention", "convolution", "stack")),
        split="validation",  # to train on
        steps=pick(test=2, cpu=40, gpu=200),
        batch=1,
        length=pick(test=128, cpu=256, gpu=1024),
        rate=pick(cpu=1e-3, gpu=5e-4),
        hidden=pick(test=8, cpu=256),
        heads=4,
        rows=pick(test=1, cpu=4, gpu=8),  # to measure on
        top=500,
      ),
      accuracy=dict(
        subjects=("base",),
        tasks=pick(cpu=("multi_key",), gpu=("needle", "multi_key")),
        lengths=pick(test=(192,), cpu=(512,), gpu=(4096,), paper=(8192,)),
        count=pick(test=2, cpu=200),
        batch=pick(test=4, cpu=8, gpu=20),
        methods=pick(
          test=(ours[0], static[0], others[2], caches[1]),
          cpu=(ours[0], static[0], ours[2], others[2], *caches),
          gpu=(*ours, *static, *others, *caches),
        ),
      ),
      losses=dict(
        subjects=pick(test=("base",), cpu=("base", "smollm2")),
        prompt=pick(test=128, cpu=448, gpu=4032),
        rest=pick(test=4, cpu=64),
        documents=pick(test=2, cpu=4, gpu=32),
        batch=pick(test=2, cpu=4, gpu=16),
        methods=pick(test=(ours[2],), cpu=(ours[2], static[2]), gpu=(ours[2], static[2], f"window {wide}")),
      ),
      prefill=dict(  # one layer of Gemma-2-2b
        lengths=pick(test=(96,), cpu=(), gpu=(32_768, 16_384, 8192)),
        materialised=16_384,  # positions up to which all scores are held at once
        heads=pick(test=4, cpu=8),
        kv_heads=pick(test=2, cpu=4),
        size=pick(test=8, cpu=256),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        budget=pick(test=48, cpu=2048),
        block=pick(test=16, cpu=256),
        local=pick(test=16, cpu=256),
        sink=pick(test=4, cpu=128),
        instruction=pick(test=8, cpu=64),
        prompt=pick(test=96, cpu=8192),  # of a whole network, the first subject
        repetitions=pick(test=2, cpu=10, gpu=20),
      ),
    )
  )
