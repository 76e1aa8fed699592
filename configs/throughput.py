r"""How fast the foundation is: training MFU at two published shapes, and one forward against torch.compile.

  python -m experiments.run --config=configs/throughput.py:gpu --workdir=runs/throughput

Takes 5 min on one H100 and printed (2026-11-26, the training a day before):
  training MFU, d20 x 1280 / d32 x 640                  41.4 % / 29.1 %   (dots kept, layers and logits written out)
  forward over torch.compile, 64 / 512 / 2048 tokens    1.10 / 1.09 / 1.04 x in a row, 0.91 / 0.91 / 0.99 x one by one
From 512 tokens on XLA's own Triton products are slower than cuBLAS (1.76 against 1.62 ms), which its choice by timing
single products does not see. One by one, a call waits for the host: passing 250 arrays takes it 0.2 ms, launching a
graph of 250 kernels 0.1 ms. Stacked weights, read slice by slice, would be few arrays, but a step of 2048 tokens then
takes 4.9 ms instead of 4.6, with or without XLA's fusion of dynamic slices.
Scale cpu (a minute) has tiny shapes and asks nothing of training or PyTorch; it shows that the parts run.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Throughput",
  family="foundation",
  link="docs/measuring.md",
  does="is how fast training, forward passes and decoding are, beside the strongest public baselines",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test, cpu (tiny shapes, no peak known), gpu, paper (the same)."""
  big = scales.picker(scale)(cpu=False, gpu=True)

  def training(*, depth, aspect_ratio, batch, accumulate, head_dim=128):
    shape = dict(depth=depth, aspect_ratio=aspect_ratio, head_dim=head_dim)
    shape |= {} if big else dict(vocab_size=512, context=64)
    return dict(
      shape=shape,
      batch=batch,
      accumulate=accumulate,
      length=2048 if big else 64,
      steps=4 if big else 2,
      remat="dots",
      unroll=True,
      keep_logits=True,
    )

  def step(*, context, threshold, model=None, shape=None, layers=0, chunk=1, iterations=1):
    how = dict(model=model, shape=shape or {}, dtype="bfloat16" if big else "float32", context=context)
    return how | dict(threshold=threshold, layers=layers, chunk=chunk, iterations=iterations)

  plain = dict(depth=32, aspect_ratio=20, x0=False, value_embeddings=False)
  tiny = dict(depth=4, aspect_ratio=8, head_dim=16, vocab_size=512, context=128, window_pattern="L")
  return ml_collections.ConfigDict(
    dict(
      paper="throughput",
      experiment="throughput",
      scale=scale,
      claimed=("d20_width1280",),
      shapes=("d20_width1280", "d32_width640") if big else ("tiny",),
      training={
        "d20_width1280": training(depth=20, aspect_ratio=64, batch=256, accumulate=16),
        "d32_width640": training(depth=32, aspect_ratio=20, batch=256, accumulate=16),
      }
      if big
      else {"tiny": training(depth=4, aspect_ratio=8, head_dim=16, batch=4, accumulate=2)},
      step=dict(
        shape=dict(depth=20, window_pattern="L") if big else tiny,
        dtype="bfloat16" if big else "float32",
        lengths=(64, 512, 2048) if big else (16, 64),
        compilers={"unrolled": {}} | ({"unrolled, cuBLAS alone": {"xla_gpu_enable_triton_gemm": False}} if big else {}),
        repetitions=100 if big else 5,
        torch=big,
      ),
      decode={
        "smollm2": step(model="smollm2", context=384, threshold=3.0),
        "d20_width1280": step(shape=dict(depth=20, window_pattern="L"), context=2048, threshold=4.0),
        "d32_width640": step(shape=plain, context=2048, threshold=3.0),
        "d32_width640, n24 K1 F2": step(shape=plain, context=2048, threshold=1.7, layers=24, chunk=2, iterations=1),
      }
      if big
      else {"tiny": step(shape=tiny, context=32, threshold=100.0, layers=2, chunk=2, iterations=1)},
      decoding=dict(
        model="smollm2" if big else "base",
        dtype="bfloat16" if big else "float32",
        prompt=128 if big else 16,
        tokens=256 if big else 12,
        repetitions=6 if big else 2,
        transformers=big,
      ),
      serving=dict(
        model="smollm2" if big else "base",
        dtype="bfloat16" if big else "float32",
        batches=(1, 32, 256) if big else (1, 2),
        goals=(3.0, 5.0, 10.0) if big else (3.0, 5.0),  # times transformers' tokens a second
        prompt=128 if big else 16,
        tokens=128 if big else 6,
        budget=4096 if big else 32,  # of prompts' tokens a step
        part=128 if big else 16,
        page=32 if big else 16,
        steps=16 if big else 4,
        repetitions=3 if big else 1,
        transformers=big,
        large=dict(  # random weights, of a 7B model's shape
          shape=dict(
            depth=32 if big else 1,
            width=4096 if big else 32,
            q_heads=32 if big else 2,
            kv_heads=8 if big else 1,
            head_dim=128 if big else 16,
            mlp_width=11_008 if big else 64,
            vocab_size=32_000 if big else 64,
            context=4096 if big else 128,
          ),
          rows=64 if big else 4,
          context=2048 if big else 40,
          read=2048 if big else 16,  # tokens of a prompt
          part=512 if big else 16,
          page=64 if big else 16,
          repetitions=5 if big else 2,
          in_a_row=10 if big else 2,
        ),
      ),
    )
  )
