r"""ChunkLLM: do small trained adapters find what a token needs to read, anew only where a sentence ends?

Paper (arXiv 2510.02361): 98.64 % of the quality with 48.58 % of the cache read (first version; 99.49 % and 52.10 % in
the second), decoding up to 4.48 x as fast at 120 K tokens. Measured here on `base` and `smollm2`, whose adapters are
trained with the model frozen: losses and answers at several shares read, beside fixed chunks, a choice at every token,
true attention as the judge, and a sliding window; how long the choice stays right; time at 120 K.

  python -m experiments.run --config=configs/chunkllm.py:gpu --workdir=runs/chunkllm --config.data.path='books/*.xz'
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="ChunkLLM",
  family="attention",
  link="https://arxiv.org/abs/2510.02361",
  does="lets trained adapters choose which sentences of the past are read, anew where a sentence ends",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (longer rows, a few thousand steps)."""
  pick = scales.picker(scale)
  read = lambda **sizes: sizes
  return ml_collections.ConfigDict(
    dict(
      paper="chunkllm",
      experiment="chunkllm",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      parts=pick(
        test=("adapters", "losses", "questions", "consistency", "speed"),
        cpu=("adapters", "losses", "consistency", "questions"),
        gpu=("speed", "adapters", "losses", "questions", "consistency"),
      ),
      adapters=dict(hidden=pick(test=16, cpu=256, gpu=512), size=pick(test=8, cpu=64, gpu=128), stands="last"),
      train=dict(
        base=read(
          steps=pick(test=2, cpu=60, gpu=200, paper=3000),
          batch=pick(test=8, cpu=4, gpu=8, paper=64),
          length=pick(test=160, cpu=384, gpu=2048, paper=4096),
        ),
        others=read(  # models of other names
          steps=pick(test=2, cpu=20, gpu=60, paper=3000),
          batch=pick(test=8, cpu=2, gpu=8, paper=64),
          length=pick(test=160, cpu=256, gpu=1024, paper=4096),
        ),
        recall=0.25,  # share of the rows that are questions about facts in text
        rate=1e-3,
        ends_rate=3e-2,  # of the chunk adapter, one linear unit: at the others' it finds next to no end
        warmup=pick(test=1, cpu=10),
        block=pick(test=32, cpu=128),
        top=pick(test=1, cpu=4, gpu=8),  # chunks of the recall
      ),
      method=dict(
        sink=4, local=pick(test=8, cpu=32, gpu=64), min_chunk=4, max_chunk=pick(test=16, cpu=64, gpu=128), grain=1
      ),
      keep=0.4,  # of the chunks; the claims are about it
      keeps=pick(test=(0.4,), cpu=(0.1, 0.4), gpu=(0.1, 0.2, 0.4)),
      losses=dict(
        base=read(
          prompt=pick(test=128, cpu=512, gpu=3584, paper=7680),
          rest=pick(test=8, cpu=64, gpu=256),
          documents=pick(test=2, cpu=16, gpu=32),
          batch=pick(test=2, cpu=8, gpu=16),
        ),
        others=read(
          prompt=pick(test=96, cpu=448, gpu=1920, paper=7680),
          rest=pick(test=8, cpu=32, gpu=128),
          documents=pick(test=2, cpu=4, gpu=16),
          batch=pick(test=2, cpu=4, gpu=16),
        ),
      ),
      questions=dict(
        subjects=("base",),
        tasks=pick(test=("needle",), cpu=("multi_key",), gpu=("needle", "multi_key")),
        lengths=pick(test=(256,), cpu=(512,), gpu=(4096,), paper=(1024, 2048, 4096, 8192)),
        count=pick(test=2, cpu=200),
        batch=pick(test=2, cpu=20, gpu=50),
      ),
      consistency=dict(
        length=pick(test=128, cpu=384, gpu=2048),
        documents=pick(test=2, cpu=4, gpu=16),
        top=pick(test=1, cpu=4, gpu=8),
      ),
      speed=dict(
        q_heads=pick(test=4, cpu=32),
        kv_heads=pick(test=2, cpu=8),
        head_dim=pick(test=16, cpu=128),
        width=pick(test=32, cpu=4096),
        mlp_width=pick(test=64, cpu=14_336),
        rows=pick(test=1, gpu=8, cpu=1),
        context=pick(test=256, cpu=8192, gpu=122_880),
        chunk=25,  # tokens of every chunk, a sentence
        keeps=pick(test=(0.4,), cpu=(0.05, 0.1, 0.2, 0.4)),
        grain=pick(test=8, cpu=16),
        steps=pick(test=16, cpu=32, gpu=100),
        repetitions=pick(test=2, cpu=3, gpu=5),
      ),
      mesh=dict(data=-1),
    )
  )
