r"""Reading long prompts: every method that reads or keeps less of one, on the same models, questions and texts.

  python -m experiments.run --config=configs/contexts.py:cpu --config.data.path='books/*.xz' --workdir=runs/contexts
  python -m experiments.run --config=configs/contexts.py:gpu --config.model=hf:DIR --workdir=runs/mine

A method is a name and a number: compact (CompactAttention) and its threshold, quoka and the share of the past, dhsa and
the budget, chunkllm and the share of the chunks; chelsea, snapkv, h2o, streaming_llm and the share of the entries kept.
Nothing is trained: DHSA's chunks are even ones, and so are ChunkLLM's, chosen by products of queries and keys. Caches
drop entries before they meet the question (`questions.late`; 0: behind it). Measured: answers to five tasks, with
intervals; losses by position behind prompts of text; bytes held; the attention that what is kept or read holds.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Reading long prompts",
  family="foundation",
  link="docs/long_context.md",
  does="is what methods that read or keep less of a long prompt give on the same models, questions and texts",
)
TASKS = ("needle", "multi_key", "variable_tracking", "multi_value", "common_words")


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, minutes), paper (longer prompts)."""
  pick = scales.picker(scale)
  read = lambda **sizes: sizes
  # A threshold at which CompactAttention reads about as much of the past as QUOKA has in its budget.
  chosen = pick(cpu=("compact 0.8", "quoka 0.35"), gpu=("compact 0.4", "quoka 0.3"))
  caches = tuple(f"{name} 0.25" for name in ("chelsea", "snapkv", "h2o", "streaming_llm"))
  return ml_collections.ConfigDict(
    dict(
      paper="contexts",
      experiment="contexts",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      parts=("questions", "text"),
      methods=(*chosen, "dhsa 0.25", "chunkllm 0.4", *caches),
      page=pick(cpu=16, gpu=64),
      chunk=pick(test=64, cpu=128, gpu=512),  # of a prompt, read at once
      compact=dict(sink=pick(cpu=1, gpu=2), window=pick(cpu=2, gpu=4)),  # blocks
      dhsa=dict(
        size=8,  # tokens of a chunk
        block=pick(test=8, cpu=16, gpu=32),
        local=pick(test=8, cpu=16, gpu=32),
        sink=pick(test=2, cpu=8, gpu=16),
        instruction=16,
      ),
      chunkllm=dict(size=pick(test=8, cpu=16, gpu=32), sink=4, local=pick(test=8, cpu=32, gpu=64)),
      chelsea=dict(chunk=pick(test=16, cpu=64, gpu=128), sink=4, recent=pick(test=16, cpu=32, gpu=128)),
      questions=dict(
        subjects=pick(cpu=("base",), gpu=("base", "smollm2")),
        tasks=TASKS,
        lengths=dict(
          base=pick(test=(192,), cpu=(384,), gpu=(4096,), paper=(1024, 4096, 8192)),
          others=pick(test=(192,), cpu=(384,), gpu=(2048,), paper=(1024, 4096, 8192)),
        ),
        count=pick(test=2, cpu=200),
        batch=pick(test=4, cpu=20, gpu=50),
        late=24,  # last tokens of a prompt, its question, that a cache meets after it has dropped entries
      ),
      text=dict(
        base=read(
          positions=pick(test=(96, 160), cpu=(128, 256, 512), gpu=(512, 1024, 2048, 3840), paper=(512, 2048, 7680)),
          rest=pick(test=8, cpu=32, gpu=128),
          documents=pick(test=2, cpu=16, gpu=32),
          batch=pick(test=2, cpu=8, gpu=16),
        ),
        others=read(
          positions=pick(test=(96, 160), cpu=(128, 448), gpu=(512, 1920), paper=(512, 2048, 7680)),
          rest=pick(test=8, cpu=16, gpu=128),
          documents=pick(test=2, cpu=4, gpu=16),
          batch=pick(test=2, cpu=4, gpu=16),
        ),
      ),
    )
  )
