r"""Chelsea (later CentroidKV): what does a cache lose whose similar keys are merged, and how much faster is it read?

Paper (arXiv 2506.11418): up to 80 % less memory for keys and values at comparable quality and decoding up to 3.19 x as
fast (first version); up to 75 % and 1.92 x (second). Measured here on `base` and `smollm2`, against caches that evict
as many bytes, with the question known and not known when the cache shrinks, and against other ways of merging.

  python -m experiments.run --config=configs/chelsea.py:gpu --workdir=runs/chelsea --config.data.path='books/*.xz'
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Chelsea",
  family="cache",
  link="https://arxiv.org/abs/2506.11418",
  does="merges similar keys of a stretch of the cache into centroids that weigh what they stand for",
)


COMPARED = ("Chelsea", "any half proposes", "the first half proposes", "no chunks", "no counts", "first layers whole")
OTHERS = ("twice the rounds", "neighbours", "by chance", "into the nearest kept", "k-means", "rescaled keys")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (longer contexts, all on both models)."""
  pick = scales.picker(scale)

  def read(*, prompt, rest, documents, batch):
    return dict(prompt=prompt, rest=rest, documents=documents, batch=batch)

  return ml_collections.ConfigDict(
    dict(
      paper="chelsea",
      experiment="chelsea",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      parts=pick(
        test=("losses", "questions", "mergings", "similarity", "speed", "serving"),
        cpu=("mergings", "questions", "similarity", "losses", "serving"),
        gpu=("speed", "losses", "questions", "mergings", "similarity", "serving"),
      ),
      # chunk: tokens merged among themselves; sink, recent: those kept as they are.
      method=dict(chunk=pick(test=16, cpu=64, gpu=128), sink=4, recent=pick(test=16, cpu=32, gpu=128)),
      keep=0.25,  # of what is between the first and the recent tokens; the claims are about it
      keeps=pick(test=(0.25,), cpu=(0.5, 0.33, 0.25, 0.2)),
      rivals=pick(test=("snapkv",), cpu=("streaming_llm", "h2o", "snapkv", "keydiff")),
      losses=dict(
        base=read(
          prompt=pick(test=160, cpu=896, gpu=3584, paper=7680),
          rest=pick(test=8, cpu=64, gpu=128),
          documents=pick(test=2, cpu=24, gpu=64),
          batch=pick(test=2, cpu=8, gpu=32),
        ),
        others=read(  # models of other names
          prompt=pick(test=96, cpu=448, gpu=1920, paper=7680),
          rest=pick(test=8, cpu=32, gpu=64),
          documents=pick(test=2, cpu=4, gpu=32),
          batch=pick(test=2, cpu=4, gpu=32),
        ),
      ),
      others_rivals=pick(cpu=("snapkv",), paper=("streaming_llm", "h2o", "snapkv")),
      questions=dict(
        subjects=("base",),
        tasks=pick(
          test=("needle",),
          cpu=("multi_key",),
          gpu=("needle", "multi_key"),
          paper=("needle", "multi_key", "variable_tracking"),
        ),
        lengths=pick(test=(256,), cpu=(512,), gpu=(4096,), paper=(1024, 2048, 4096, 8192)),
        count=pick(test=2, cpu=200),
        batch=pick(test=2, cpu=20, gpu=50),
        late=24,  # tokens at the end of a prompt, the question among them, that come after the cache has shrunk
      ),
      mergings=dict(
        compared=pick(test=COMPARED, cpu=(*COMPARED, *OTHERS, "merged while read")),
        read=read(
          prompt=pick(test=160, cpu=512, gpu=3584),
          rest=pick(test=4, cpu=32, gpu=64),
          documents=pick(test=2, cpu=8, gpu=32),
          batch=pick(test=2, cpu=8, gpu=32),
        ),
        chunks=pick(test=(), cpu=(32, 128), gpu=(32, 64, 256)),
      ),
      # Questions that all wait; the cache has room for `sequences` of them as they are.
      serving=dict(
        task="multi_key",
        length=pick(test=176, cpu=512, gpu=4096),
        answer=pick(test=12, cpu=64, gpu=256),
        requests=pick(test=4, cpu=16, gpu=256),
        sequences=pick(test=2, cpu=4, gpu=32),
        rows=pick(test=4, cpu=16, gpu=128),
        budget=pick(test=36, cpu=128, gpu=1024),
        chunks=pick(test=2, cpu=4, gpu=8),
        part=pick(test=16, cpu=32, gpu=64),
        page=pick(test=8, cpu=16, gpu=32),
        repetitions=pick(test=2, cpu=3, gpu=5),
      ),
      similarity=dict(tokens=pick(test=64, cpu=512, gpu=4096), documents=pick(test=1, cpu=4, gpu=8)),
      speed=dict(
        q_heads=pick(test=4, gpu=32, cpu=32),
        kv_heads=pick(test=2, gpu=8, cpu=8),
        head_dim=pick(test=16, cpu=128),
        width=pick(test=32, cpu=4096),
        mlp_width=pick(test=64, cpu=14_336),
        # (rows, context): keys and values take about 6 and 2 times the bytes of a layer's weights
        cases=pick(test=((1, 256),), cpu=((1, 8192),), gpu=((5, 131_072), (2, 106_496))),
        keep=0.2,
        steps=pick(test=16, cpu=64, gpu=128),  # decoded at once: one chunk is merged among them
        prompt=pick(test=128, cpu=2048, gpu=16_384),
        repetitions=pick(test=2, cpu=3, gpu=5),
      ),
    )
  )
