r"""Sarathi: what does it save to read prompts in chunks beside the rows that decode?

Paper (arXiv 2308.16369): LLaMA-13B on an A6000 decodes 2.8 to 10 times faster beside chunks of 256 tokens and serves
1.33 times the tokens a second; against Orca 1.27 times; a pipeline of 8 stages stands idle 6.29 times less.

  python -m experiments.run --config=configs/sarathi.py:cpu --workdir=runs/sarathi
  python -m experiments.run --config=configs/sarathi.py --config.model=hf:DIR --workdir=runs/mine

Scale cpu serves the small model that ships, in float32 on two cores; scale gpu eight layers of a 7B model's shape with
random weights (what is generated plays no part) and SmolLM2. All policies run on one engine by the same programs.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Sarathi, chunked prefills with piggybacked decodes",
  family="serving",
  link="https://arxiv.org/abs/2308.16369",
  does="reads prompts in chunks, each beside all rows that decode, so that every step costs the same",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (`base`, 2 cores), gpu (8 layers of a 7B, and SmolLM2), paper (32 layers)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="sarathi",
      experiment="sarathi",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone
      subjects=pick(test=("random",), cpu=("base",), gpu=("random", "smollm2")),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      shape=dict(  # of random weights: a 7B model's layers
        depth=pick(test=1, cpu=2, gpu=8, paper=32),
        width=pick(test=32, cpu=4096),
        q_heads=pick(test=2, cpu=32),
        kv_heads=pick(test=1, cpu=8),
        head_dim=pick(test=16, cpu=128),
        mlp_width=pick(test=64, cpu=11_008),
        vocab_size=pick(test=64, cpu=32_000),
        context=4096,
      ),
      engine=dict(
        rows=pick(test=4, cpu=8, gpu=32),
        budget=pick(test=8, cpu=72, gpu=1024),  # rows among them: whole tiles of the products
        part=pick(test=4, cpu=64, gpu=128),  # at most
        page=pick(test=4, cpu=16, gpu=64),
        steps=pick(test=2, cpu=8),
      ),
      profile=dict(
        rows=pick(test=(4,), cpu=(4, 8), gpu=(8, 32), paper=(1, 8, 32, 128)),
        chunks=pick(test=(8,), cpu=(64, 128), gpu=(256, 512, 1024), paper=(128, 256, 512, 1024, 2048)),
        contexts=pick(test=(8, 16, 24), cpu=(64, 256), gpu=(512, 2048), paper=(512, 1024, 2048, 4096)),
        tile=pick(test=(4,), cpu=(64,), gpu=(255, 256, 257)),  # lengths of chunks around a tile of the products
        tile_rows=pick(test=1, cpu=1, gpu=128),
        repetitions=pick(test=2, cpu=5, gpu=20),
      ),
      throughput=dict(
        lengths=pick(test=(16,), cpu=(256,), gpu=(4096,), paper=(1024, 2048, 4096)),
        ratios=pick(test=(3,), cpu=(3, 9, 27), gpu=(10, 30, 60), paper=(5, 10, 16, 30, 60, 100, 200)),
        requests=pick(test=5, cpu=12, gpu=64, paper=256),
        policies=("sarathi", "sarathi, several prompts", "orca", "request_level", "alternating", "prefill_first"),
        budgets=pick(test=(6, 8), cpu=(40, 72, 136), gpu=(512, 1024, 2048)),
      ),
      online=dict(
        loads=pick(test=(0.5,), cpu=(0.7,), gpu=(0.5, 0.8)),
        policies=("sarathi", "sarathi, several prompts", "prefill_first", "orca"),
        steps=1,  # tokens of a row that one call makes
        requests=pick(test=4, cpu=10, gpu=64, paper=1000),
        low=pick(test=8, cpu=64, gpu=512),  # lengths of prompts, by Zipf's law
        high=pick(test=16, cpu=192, gpu=3072),
        ratio=pick(test=2, cpu=10),
      ),
      bubbles=dict(
        stages=pick(test=2, cpu=8),
        rows=pick(test=3, cpu=27),
        replica_rows=pick(test=2, cpu=11),
        budget=pick(test=8, cpu=256),
        low=pick(test=8, cpu=1024),
        high=pick(test=32, cpu=4096),
        ratio=10,
        requests=pick(test=12, cpu=1000, gpu=10_000),
        link=0.0,  # seconds from a stage to the next
      ),
    )
  )
