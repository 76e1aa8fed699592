r"""The base model in checkpoints/base: how it was trained, and what it can do.

16 M parameters in Qwen3's shape (6 layers, width 512, 8 query and 2 key-value heads), own BPE of 8192 tokens, context
8192; trained on public-domain books with 15 % (then 25 %) generated recall rows, short rows first, long ones while the
learning rate falls.

  python -m experiments.run --config=configs/base.py:gpu --workdir=runs/base \
      --config.data.name=local_text --config.data.path='books/*.jsonl.xz'

Took 8 min on one H100 (419 M tokens, 1.3 M tokens/s at 2048, 0.85 M at 8192) and printed (2026-11-25):
  bits per byte, held-out books, context 8192      1.226   (xz -9e: 2.304)
  needle, multi-key, variable tracking at 4096     1.00, 1.00, 1.00
  needle, multi-key, variable tracking at 8192     0.995, 0.99, 0.985
The long phase starts with a bump of 0.2 nats: Muon's momentum and the learning rate start anew.

Copy DIR/base to checkpoints/base to ship it; `hub.load("base")` finds it there. Without the data options the corpus is
the Python standard library. Scale `cpu` trains a toy of 0.8 M parameters the same way, in 100 s on 2 CPU cores: 2.2
bits per byte (xz 1.54) and no needle found. It shows the way; none of its claims holds.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="The base model",
  family="foundation",
  link="checkpoints/base",
  does="is the small language model that ships, with the run that trained it",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (a minute), cpu (2 cores, minutes; a toy), gpu (one GPU, 10 minutes), paper (the same as gpu)."""
  pick = scales.picker(scale)

  def phase(*, steps, batch, length, recall, warmdown, warmup):
    return dict(
      steps=steps,
      batch=batch,
      length=length,
      recall=recall,
      accumulate=1,
      scale=1.0,
      warmup=warmup,
      warmdown=warmdown,
      dtype=pick(test="float32", cpu="float32", gpu="bfloat16"),
      checkpoint_every=pick(test=2, cpu=100, gpu=500),
      remat="dots",
    )

  return ml_collections.ConfigDict(
    dict(
      paper="base",
      experiment="base",
      scale=scale,
      seed=0,
      model="qwen3",
      shape=dict(
        depth=pick(test=2, cpu=4, gpu=6),
        width=pick(test=32, cpu=128, gpu=512),
        q_heads=pick(test=4, cpu=4, gpu=8),
        kv_heads=2,
        head_dim=pick(test=8, cpu=32, gpu=64),
        mlp_width=pick(test=64, cpu=256, gpu=896),
        context=pick(test=256, cpu=512, gpu=8192),
        rope_theta=1e6,
        tied_embeddings=True,
      ),
      data=dict(name="stdlib_code", path="", vocab_size=pick(test=512, cpu=2048, gpu=8192)),
      short=phase(
        steps=pick(test=4, cpu=200, gpu=2000),
        batch=pick(test=4, cpu=8, gpu=64),
        length=pick(test=192, cpu=256, gpu=2048),
        recall=0.15,
        warmdown=0.0,
        warmup=pick(test=2, cpu=20, gpu=100),
      ),
      long=phase(
        steps=pick(test=4, cpu=100, gpu=1200),
        batch=pick(test=2, cpu=4, gpu=16),
        length=pick(test=256, cpu=512, gpu=8192),
        recall=0.25,
        warmdown=0.8,
        warmup=pick(test=2, cpu=10, gpu=40),
      ),
      save_dtype="bfloat16",
      eval=dict(
        split="test",
        lengths=pick(test=(192, 256), cpu=(256, 512), gpu=(512, 1024, 2048, 4096, 8192)),
        batch_tokens=pick(test=1024, cpu=8192, gpu=131072),
        tokens=pick(test=1024, cpu=65536, gpu=10_000_000),
        examples=pick(test=4, cpu=32, gpu=200),
      ),
      prompts=("It was a cold evening in November, and", "The old doctor looked at her and said,", "Chapter I"),
      sample_tokens=pick(test=8, cpu=60, gpu=120),
      mesh=dict(data=-1, fsdp=1, tensor=1),
    )
  )
