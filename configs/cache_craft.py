r"""Cache-Craft: how much of a chunk that was cached behind other chunks must be computed again behind new ones?

Paper (arXiv 2502.15734): 51 % less computation than prefix caching and 75 % less than full prefill at the same answers,
with a third of the reused tokens computed again. Measured here on facts that go on in the next chunk (`base`), on
real passages (`base`, `smollm2`), and on requests that come by Zipf's law, against CacheBlend and other choices.

  python -m experiments.run --config=configs/cache_craft.py:cpu --workdir=runs/cache_craft
      --config.data.path=books/test.jsonl.xz --config.passages.path=rag/musique_s.json.xz

Takes 4 minutes of two cores and says (2026-11-28), with 13 % of the moved tokens computed anew:
  answers right, Cache-Craft                         90 %   (full prefill 100 %, as cached 38 %, CacheBlend 48 %)
  the same, new chunks counted (28 % anew)          100 %
  token-layers saved beside cached prefixes          77 %   (paper 51 %)
  divergence that stays on real passages       44 to 82 %
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Cache-Craft",
  family="serving",
  link="https://arxiv.org/abs/2502.15734",
  does="reuses chunks' keys and values behind any other chunks, and computes anew the tokens that depend on these",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (a larger store and longer passages)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="cache_craft",
      experiment="cache_craft",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      dtype="float32",
      data=dict(name="stdlib_code", path="", split="test"),  # a path to local text, or a tfds name
      parts=pick(
        test=("facts", "passages", "trace", "speed"),
        cpu=("facts", "trace", "passages"),
        gpu=("speed", "facts", "trace", "passages"),
      ),
      share=0.3,  # of the tokens of chunks that were cached behind others, computed again at most: chooses alpha
      loss=0.02,  # of the answers, which may be lost where the smallest alpha is looked for
      alphas=pick(test=(0.5, 2.0), cpu=(0.25, 0.5, 1.0, 1.5, 2.0), gpu=(0.25, 0.5, 0.75, 1.0, 2.0, 3.0)),
      blends=pick(test=(0.16,), cpu=(0.05, 0.16), gpu=(0.05, 0.16, 0.3)),
      variants=pick(test=2, cpu=5),
      least=pick(cpu=64, gpu=256),  # rows of the smallest pass: fewer programs
      facts=dict(
        cut=pick(test=3, cpu=16, gpu=100, paper=350),  # facts whose beginning and end lie in two chunks
        whole=pick(test=4, cpu=32, gpu=200, paper=300),
        asked_cut=0.8,  # share of the questions
        size=pick(test=32, cpu=64, gpu=128, paper=512),
        k=5,
        zipf=1.0,
        answer=8,  # tokens of an answer, at most
        warm=pick(test=3, cpu=48, gpu=250),
        validation=pick(test=1, cpu=16, gpu=60, paper=200),
        queries=pick(test=2, cpu=48, gpu=150, paper=2000),
      ),
      passages=dict(
        path="",  # questions with passages; without it, stretches of config.data
        pool=pick(test=4, cpu=10),  # passages of a question
        size=pick(test=16, cpu=64, gpu=120, paper=512),
        k=pick(test=3, cpu=5),
        strangers=pick(test=1, cpu=2),  # passages of another question in an earlier prompt
        histories=pick(test=1, cpu=2, gpu=3),
        answer=6,
        queries=pick(test=2, cpu=16, gpu=150),
        base=pick(test=1, cpu=16, gpu=60, paper=150),  # questions for `base`, and for other models
        others=pick(test=1, cpu=6, gpu=30, paper=150),
        alphas=pick(test=(1.0,), cpu=(0.5, 1.0), gpu=(0.5, 1.0, 2.0), paper=(0.25, 0.5, 1.0, 2.0)),
        # of models that are not `base`
        rivals=pick(
          test=("random",),
          cpu=("random", "most attended", "first tokens", "CacheBlend", "new chunks count"),
          gpu=("random", "most attended", "first tokens", "CacheBlend", "new chunks count", "tokens stop early"),
        ),
      ),
      trace=dict(
        warm=pick(test=1, cpu=30, gpu=100),
        queries=pick(test=2, cpu=60, gpu=200, paper=2000),
        chunks=pick(test=10, cpu=64, gpu=400, paper=1000),
        held=pick(test=6, cpu=128, gpu=800, paper=5000),  # cached chunks, whatever they stand behind
      ),
      shape=dict(  # of random weights, for times
        depth=pick(test=2, cpu=16),
        width=pick(test=32, cpu=2048),
        q_heads=pick(test=2, cpu=32),
        kv_heads=pick(test=1, cpu=8),
        head_dim=pick(test=16, cpu=64),
        mlp_width=pick(test=64, cpu=8192),
        vocab_size=pick(test=64, cpu=32_000),
        context=4096,
      ),
      speed=dict(
        dtype=pick(cpu="float32", gpu="bfloat16"),
        chunks=pick(test=3, cpu=5),
        size=pick(test=16, cpu=512),
        question=pick(test=4, cpu=32),
        rows=pick(test=(16,), cpu=(64, 384, 768, 1536)),  # computed, the question among them
        batches=pick(test=(1,), cpu=(1, 8)),
        repetitions=pick(test=2, cpu=20),
      ),
    )
  )
