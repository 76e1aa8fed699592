r"""CompactAttention: is a prompt read faster at unchanged answers if chunks attend, in place, to the blocks they need?

Paper (https://arxiv.org/abs/2605.16839): attention of a prompt of 128 K 2.72x as fast as dense, RULER 82.30 for 82.78;
QUOKA, which picks single tokens, 77.98.

  python -m experiments.run --config=configs/compact_attention.py:cpu --workdir=runs/compact_attention \
      --config.data.path='books/*.jsonl.xz'

Scale cpu printed (2026-11-28), with 35 % of the past read in prompts of 512 tokens, as much as QUOKA's budget:

  questions answered: dense, CompactAttention, QUOKA        99.8, 99.8, 99.5 %
  nats lost behind a prompt: base, smollm2                  +0.019, -0.009 (QUOKA +0.009, -0.009)
  blocks chosen, and read by the union (base)               19 %, 50 %

Scale gpu times all forms of executing one selection at 32 K and 128 K positions. Your model: --config.model=hf:DIR.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="CompactAttention, dense attention over the union of selected blocks",
  family="attention",
  link="https://arxiv.org/abs/2605.16839",
  does="reads a long prompt chunk by chunk, each over the union of the blocks that a sparse selector wants, in place",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, minutes), paper (the paper's lengths)."""
  pick = scales.picker(scale)
  # A threshold at which about as much of the past is read as QUOKA has in its budget (part `choices`).
  alpha, budget = pick(cpu=("0.8", "0.35"), gpu=("0.4", "0.3"))
  ours, theirs, sparse = f"compact {alpha}", f"quoka {budget}", f"block_sparse {alpha}"
  smollm2 = ("x_attention 0.6", "flex_prefill 0.6", "seer 0.03")  # some read less of it than of base
  # These read about as much of the past as ours on base (part `choices`), but for MInference at scale cpu, which reads
  # more with its least. QUOKA's budget is matched to ours, too: it is published with 25 % of the past.
  others = pick(
    test=("x_attention 0.3",),
    cpu=("x_attention 0.32", "flex_prefill 0.33", "minference 1", "seer 0.095"),
    gpu=("x_attention 0.54", "flex_prefill 0.46", "minference 3", "seer 0.045", *smollm2),
  )
  return ml_collections.ConfigDict(
    dict(
      paper="compact_attention",
      experiment="compact_attention",
      scale=scale,
      seed=0,
      subjects=pick(test=("base",), cpu=("base", "smollm2")),  # what hub.load takes
      model="",  # one of your own in their place: hf:DIR
      dtype=pick(cpu="float32", gpu="bfloat16"),
      parts=pick(
        test=("executions", "choices", "unions", "accuracy", "losses"),
        cpu=("choices", "unions", "accuracy", "losses"),
        gpu=("executions", "accuracy", "losses", "choices", "unions"),
      ),
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      chunk=pick(test=64, cpu=128, gpu=512),
      page=pick(test=16, cpu=16, gpu=32),
      select=dict(
        sink=pick(cpu=1, gpu=2),  # blocks
        window=pick(cpu=2, gpu=4),
        stride=8,  # of x_attention
        # Tokens that flex_prefill keeps at least, 1024 as published. Of shorter prompts that is most: one page here, as
        # 1024 of 128 K are 32 of 4096.
        budget=pick(test=16, cpu=16, gpu=32, paper=1024),
        last=pick(test=16, cpu=64),  # queries that minference asks
        queries=0.25,  # share of them that quoka asks
        recent=2,  # blocks that seer keeps
        dense_blocks=2,  # at the end of the prompt, with seer
      ),
      gate=dict(  # of seer
        split="validation",
        steps=pick(test=2, cpu=60, gpu=200),
        batch=pick(test=1, cpu=2, gpu=4),
        length=pick(test=128, cpu=512, gpu=2048),
        rate=1e-3,
        width=pick(test=16, cpu=128),
      ),
      choices=dict(
        subjects=pick(cpu=("base", "smollm2")),
        task="multi_key",
        length=pick(test=192, cpu=512, gpu=4096, paper=131_072),
        rows=pick(test=1, cpu=4),
        methods=pick(
          test=(ours, "seer 0.01", *others),
          cpu=(
            *(f"compact {alpha}" for alpha in ("0.8", "0.4", "0.2", "0.06", "0.01")),
            *(f"x_attention {share}" for share in (0.6, 0.8, 0.9)),
            *(f"flex_prefill {share}" for share in (0.6, 0.8, 0.9)),
            *(f"minference {columns}" for columns in (4, 16, 64)),
            *others,
          ),
          gpu=(
            *(f"compact {alpha}" for alpha in ("0.4", "0.8", "0.2", "0.06")),
            "x_attention 0.9",
            "flex_prefill 0.9",
            "minference 64",
            "seer 0.0005",
            *others,
          ),
        ),
      ),
      unions=dict(  # of the first method of `choices` on its prompts, by chunk and the heads that share a table
        subjects=pick(cpu=("base", "smollm2")),
        chunks=pick(test=(32, 64), cpu=(64, 128, 256), gpu=(256, 512, 1024), paper=(512, 1024, 2048)),
      ),
      accuracy=dict(
        subjects=pick(cpu=("base",), gpu=("base", "smollm2")),
        tasks=("needle", "multi_key"),
        lengths=pick(test=(192,), cpu=(512,), gpu=(4096, 1024), paper=(32_768, 65_536, 131_072)),
        count=pick(test=2, cpu=200),
        batch=pick(test=4, cpu=8, gpu=40),
        methods=pick(
          test=(ours, theirs, *others),
          cpu=(ours, theirs, sparse, "compact 0.4", *others),
          gpu=(ours, theirs, sparse, "compact 0.06", *others),
        ),
      ),
      losses=dict(
        subjects=pick(test=("base",), cpu=("base", "smollm2")),
        prompt=pick(test=128, cpu=448, gpu=4032),
        rest=pick(test=4, cpu=64),
        documents=pick(test=2, cpu=8, gpu=64),
        batch=pick(test=2, cpu=4, gpu=16),
        methods=pick(test=(ours, theirs, *others), cpu=(ours, theirs, sparse, *others)),
      ),
      executions=dict(
        lengths=pick(test=(256,), cpu=(), gpu=(131_072, 65_536, 32_768)),
        dumped=pick(test=0, cpu=0, gpu=8192),  # positions of a layer of the first subject
        chunk=pick(test=64, cpu=128, gpu=1024),
        page=pick(test=16, gpu=128, cpu=32),
        heads=pick(test=4, cpu=8, gpu=32),
        kv_heads=pick(test=2, cpu=2, gpu=8),
        size=pick(test=16, cpu=64, gpu=128),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        density=0.3,  # of what the union reads
        repetitions=pick(test=2, cpu=5, gpu=20),
      ),
    )
  )
