r"""Several GPUs of one host: is the training step as fast on each as on one, and does SNLP's suffix over devices pay?

Training sharded by data, fsdp and tensor, the same batch on 1, 2, 4 devices; then one token and a prompt with the last
24 of 32 layers solved over a `layer` axis, beside one device and tensor parallelism; prompts of up to 128 K tokens
shared out along a `sequence` axis; requests that the engine serves over a `tensor` axis; and gradients of a batch by
ChunkFlow (up to 64 K tokens a sequence) and SeCO (32 K), chunk by chunk on each device.

  python -m experiments.run --config=configs/many_gpus.py:gpu --workdir=runs/many_gpus

measures the machine it runs on; results are named after its number of GPUs: x2, x4. Three minutes on 2 H200s, printed
(2026-11-28):

  tokens/s of 2 GPUs over twice those of one: data, fsdp, tensor (32 x 640)      0.95, 0.94, 0.83   (4: 0.93, 0.93)
  the same for tensor at 20 x 1280                                               0.78
  a token by SNLP's suffix (24 of 32 layers, K = 1) over 2 GPUs, on one          0.570, 0.601 ms (in sequence 1.067)

  JAX_NUM_CPU_DEVICES=4 python -m experiments.run --config=configs/many_gpus.py:cpu --workdir=runs/many_gpus_cpu

has simulated devices and tiny shapes: it shows what is sent and that results agree, and claims no speed. Takes two
minutes on two cores and printed (2026-11-29):

  bytes that fsdp sends for a microbatch, over the parameters'   2.1   (data 1.4, tensor 7.5)
  largest difference of a loss from one device's                 2e-6 nats
  memory for a token of a prompt shared by 4, over one's         0.25
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Many GPUs",
  family="foundation",
  link="docs/devices.md",
  does="is what several devices of one host buy, in training and in decoding with SNLP",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test, cpu (simulated devices), gpu (2 or 4 GPUs of one host), paper (the same)."""
  pick = scales.picker(scale)
  big = pick(cpu=False, gpu=True)
  plain = dict(x0=False, value_embeddings=False)
  tiny = dict(
    depth=pick(test=2, cpu=8),
    aspect_ratio=pick(test=32, cpu=8),
    head_dim=16,
    vocab_size=512,
    context=64,
    window_pattern="L",
    **plain,
  )
  common = dict(
    length=pick(test=16, cpu=64, gpu=2048),
    steps=pick(test=2, cpu=3, gpu=4),
    dtype=pick(cpu="float32", gpu="bfloat16"),
  )
  training = {
    "d32_width640": dict(
      shape=dict(depth=32, aspect_ratio=20, **plain), axes=("data", "fsdp", "tensor"), batch=128, rows=16, **common
    ),
    "d20_width1280": dict(shape=dict(depth=20, **plain), axes=("data", "fsdp", "tensor"), batch=64, rows=8, **common),
  }
  small = {
    "tiny": dict(
      shape=tiny,
      axes=("data", "fsdp", "tensor"),
      batch=pick(test=8, cpu=16),
      rows=pick(test=2, cpu=2),
      **common,
    )
  }
  training = training if big else small
  return ml_collections.ConfigDict(
    dict(
      paper="many_gpus",
      experiment="many_gpus",
      scale=scale,
      per_machine=big,  # results are named after the number of devices
      timed=big,
      devices=pick(test=(1, 2), cpu=(1, 4), gpu=(1, 2, 4, 8)),
      shapes=tuple(training),
      training=training,
      suffix=dict(
        # 8 heads, which 2 and 4 devices can share.
        shape=dict(depth=32, aspect_ratio=32, window_pattern="L", **plain) if big else tiny,
        dtype=pick(cpu="float32", gpu="bfloat16"),
        layers=pick(test=2, cpu=4, gpu=24),
        iterations=pick(test=(1,), cpu=(1, 2)),
        context=pick(test=16, cpu=32, gpu=2048),
        room=pick(test=100, cpu=200, gpu=600),
        tokens=pick(test=8, cpu=32, gpu=512),
        repetitions=pick(test=2, cpu=5, gpu=12),
      ),
      prompts=dict(
        # Layers of Llama-3.1-8B's shape.
        shape=dict(
          depth=pick(test=1, cpu=2, gpu=4),
          width=pick(cpu=64, gpu=4096),
          q_heads=pick(cpu=4, gpu=32),
          kv_heads=pick(cpu=2, gpu=8),
          head_dim=pick(cpu=64, gpu=128),
          mlp_width=pick(cpu=128, gpu=14_336),
          vocab_size=pick(cpu=256, gpu=8192),
        ),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        prompts=pick(test=(60, 124), cpu=(2048, 8192), gpu=(32_768, 131_072)),
        rows=1,
        chunk=pick(test=32, cpu=64, gpu=8192),
        page=pick(test=4, cpu=16, gpu=128),
        room=pick(test=16, cpu=64, gpu=256),
        repetitions=pick(test=2, cpu=3, gpu=5),
      ),
      serving=dict(
        # Layers of a 7B model.
        shape=dict(
          depth=pick(test=1, cpu=2, gpu=8),
          width=pick(cpu=32, gpu=4096),
          q_heads=pick(cpu=4, gpu=32),
          kv_heads=pick(cpu=2, gpu=8),
          head_dim=pick(cpu=16, gpu=128),
          mlp_width=pick(cpu=64, gpu=11_008),
          vocab_size=pick(cpu=64, gpu=32_000),
        ),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        rows=pick(cpu=2, gpu=64),
        prompt=pick(cpu=12, gpu=1024),
        tokens=pick(cpu=6, gpu=128),
        page=pick(cpu=4, gpu=64),
        budget=pick(cpu=10, gpu=576),
        part=pick(cpu=4, gpu=128),
        repetitions=pick(cpu=1, gpu=3),
      ),
      chunked=dict(
        # 120 M parameters at gpu; few layers and heads of 128 channels, as attention over long caches takes most time.
        shape=dict(
          depth=pick(cpu=2, gpu=6),
          width=pick(cpu=32, gpu=1024),
          q_heads=pick(cpu=2, gpu=8),
          kv_heads=pick(cpu=1, gpu=2),
          head_dim=pick(cpu=16, gpu=128),
          mlp_width=pick(cpu=64, gpu=5120),
          vocab_size=pick(cpu=64, gpu=8192),
        ),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        # The longest sequence stays on one device: a batch must be four times its work for four to share it evenly.
        chunkflow=dict(
          batch=pick(test=16, cpu=256, gpu=256),
          longest=pick(test=64, cpu=512, gpu=65_536),
          seed=pick(test=5, cpu=6),  # of the lengths
          chunk=pick(test=16, cpu=64, gpu=4096),
          keep=1,
        ),
        seco=dict(
          rows=pick(test=2, cpu=4, gpu=8),
          length=pick(test=48, cpu=256, gpu=32_768),
          chunk=pick(test=16, cpu=64, gpu=2048),
        ),
        repetitions=pick(test=1, cpu=3, gpu=2),
      ),
      # Gradients in float32 differ by up to 9e-7, in a parameter; bfloat16 rounds 2^16 times as coarsely.
      tolerance=dict(
        loss=pick(cpu=1e-3, gpu=5e-3), logits=pick(cpu=1e-3, gpu=5e-2), gradients=pick(cpu=1e-5, gpu=6e-2)
      ),
    )
  )
