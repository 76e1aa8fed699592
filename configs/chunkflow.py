r"""ChunkFlow: sequences of any lengths at the memory of one chunk, with exact gradients; what does that buy?

Paper (ICML 2025, https://arxiv.org/abs/2503.02356): fine-tuning sets are long-tailed; chunks of one size train Qwen2.5
7 B on up to 256 K tokens 4.53 times as fast as Megatron-LM, 32 K 2.38 times; 57 GB at 32 K become 60 GB at 256 K. Here
lengths have the paper's law, the model is small, and rivals are tuned: whole sequences, sorted or packed, with and
without running layers again.

  python -m experiments.run --config=configs/chunkflow.py:cpu --workdir=runs/chunkflow

A checkpoint of one's own, fine-tuned on whole documents at long context and written as a folder:

  python -m experiments.run --config=configs/chunkflow.py:gpu --workdir=runs/mine --config.model=hf:DIR \
      --config.data.path='texts/*.txt' --config.tuning.length=65536
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="ChunkFlow",
  family="sequence",
  link="https://arxiv.org/abs/2503.02356",
  does="trains on sequences of any lengths in chunks of one size, with exact gradients",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, 120 M parameters, 64 K tokens), paper."""
  pick = scales.picker(scale)
  chunk = pick(test=128, cpu=256, gpu=4096)
  return ml_collections.ConfigDict(
    dict(
      paper="chunkflow",
      experiment="chunkflow",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is fine-tuned by `tuning`
      data=dict(name="stdlib_code", path="", vocab_size=pick(test=512, cpu=2048, gpu=8192)),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      shape=dict(
        depth=pick(test=2, cpu=4, gpu=12),
        width=pick(test=32, cpu=128, gpu=768),
        q_heads=pick(test=2, cpu=4, gpu=12),
        kv_heads=pick(test=2, cpu=4, gpu=12),
        head_dim=pick(test=16, cpu=32, gpu=64),
        mlp_width=pick(test=64, cpu=384, gpu=2048),
      ),
      longest=pick(test=(256,), cpu=(1024, 2048), gpu=(65_536,), paper=(32_768, 65_536)),
      batch=pick(test=4, cpu=32, gpu=64),  # sequences of a global batch
      batches=pick(test=1, cpu=2, gpu=1, paper=20),
      chunk=chunk,
      settings=pick(  # (chunk, K) of ChunkFlow
        test=((128, 1),),
        cpu=((256, 1), (512, 1), (128, 2)),
        gpu=((4096, 1), (8192, 1), (4096, 4)),
        paper=((2048, 1), (4096, 1), (8192, 1), (16_384, 1), (4096, 4)),
      ),
      remats=pick(test=("none",), cpu=("none", "full")),  # of a sequence a step
      # Of rivals that share out tokens; at gpu all of it fits, and to run layers again takes longer.
      shared_remats=pick(test=("none",), cpu=("none", "full"), gpu=("none",)),
      windows=pick(test=(), cpu=("none",), gpu=()),  # all packed to the longest: as many products as its square
      times=pick(test=(2, 4), cpu=(4, 8, 16, 32), gpu=(4, 8, 16)),  # chunks of the sequences whose memory is compared
      curve=dict(
        steps=pick(test=2, cpu=60, gpu=80, paper=300),
        batch=pick(test=2, cpu=8, gpu=32),
        longest=pick(test=256, cpu=1024, gpu=4096),
        chunk=pick(test=128, cpu=128, gpu=1024),
        rate=pick(cpu=1e-3, gpu=3e-4),
        held_out=pick(test=1, cpu=4, gpu=16),
      ),
      sizes=pick(test=(128, 256), cpu=(128, 256, 512, 1024, 2048), gpu=(1024, 2048, 4096, 8192, 16_384, 32_768)),
      repetitions=pick(test=1, cpu=3),
      pipeline=dict(
        stages=4,
        longest=pick(test=1024, cpu=262_144),
        chunks=pick(test=(128, 256), cpu=(2048, 4096, 8192, 16_384, 32_768)),
        keeps=pick(test=(1, 2), cpu=(1, 2, 4, 8, 16)),
        limits=pick(test=(256,), cpu=(32_768,)),  # C * K is no more: tokens whose activations the last stage holds
      ),
      tuning=dict(  # of config.model
        parameters="all",  # or "lora"
        rank=8,
        alpha=16,
        length=pick(test=64, cpu=1024, gpu=65_536),  # longer documents are cut
        chunk=pick(test=16, cpu=256, gpu=4096),
        keep=1,
        batch=pick(test=8, cpu=4, gpu=16),  # documents a step
        steps=pick(test=2, cpu=20, gpu=200),
        rate=pick(test=1e-3, cpu=1e-4, gpu=5e-5),
        warmup=pick(test=1, cpu=2, gpu=10),
        remat=pick(cpu="none", gpu="full"),
        rope="llama3",  # frequencies where length is beyond the checkpoint's context: llama3, linear, none
        dtype=pick(cpu="float32", gpu="bfloat16"),
        checkpoint_every=100,
        judged=pick(test=512, cpu=8192, gpu=262_144),  # tokens of held-out text
      ),
      save_dtype="bfloat16",
      mesh=dict(data=-1),
    )
  )
