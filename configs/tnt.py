r"""TNT: does a memory that trains in large chunks, many shards at once, learn what one in small chunks learns?

Paper (arXiv 2511.07343): 150 M parameters, 10 B tokens: steps 5.1x as fast as Titans' in chunks of 16 at rows of 32 K,
perplexity 23.80 (Titans in chunks of 8 25.07, Transformer 23.58, gated 22.39), 23.77 after stage 2. Measured here at
equal parameters and tokens, each network at its own learning rate: TNT, also with attention in a window for its local
memories, Titans, TTT, Mamba-2 and three Transformers; TNT without its parts, at TNT's rate; stage 2 and its controls;
losses by chunk; time of a step by length; recall of pairs. With 2 rates and one seed 34 networks are trained.

  python -m experiments.run --config=configs/tnt.py:gpu --workdir=runs/tnt --config.data.path='books/*.xz'

Scale cpu (0.32 M parameters, 100 steps of 2048 tokens of code; 41 minutes on two busy cores) printed (2026-11-29):

  held-out loss: TNT 3.860   Titans 3.907   best Transformer 3.885   TTT-Linear 3.816   Mamba-2 3.764
  TNT at small chunks from the start 3.829, stage 1 then 2 3.855 in 0.74 of the time
  speed over Titans without momentum and forgetting, same chunks, 0.82 (rows of 2048: shards save a core nothing)

It shows that everything runs; one seed, and differences of a few hundredths are noise. docs/log.md has the rest.
Scale gpu: 9 M parameters, 300 steps of 8,192 tokens, rows of 512 in four shards, meant for half an hour of one GPU.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="TNT",
  family="sequence",
  link="https://arxiv.org/abs/2511.07343",
  does="trains deep memories in large chunks, all shards of a row side by side, and runs them in small chunks",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes; tiny networks), gpu (one GPU), paper (150 M parameters)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="tnt",
      experiment="tnt",
      scale=scale,
      seeds=pick(test=(0,), cpu=(0,)),
      seed=0,
      data=dict(name="stdlib_code", path="", vocab_size=pick(test=300, cpu=1024, gpu=8192, paper=32768)),
      parts=("arms", "ablations", "stages", "speed", "recall"),
      model=dict(
        depth=pick(test=1, cpu=2, gpu=4, paper=12),
        width=pick(test=16, cpu=64, gpu=256, paper=768),
        heads=pick(test=2, cpu=2, gpu=4, paper=12),  # of memories; head_dim is that of attention and Mamba-2 too
        head_dim=pick(test=8, cpu=32, gpu=64),
        expansion=pick(cpu=2, gpu=4),
        mlp_width=pick(test=48, cpu=256, gpu=704, paper=2048),  # TNT's; the others' follow from its parameters
        state=pick(test=4, cpu=32, gpu=128),  # Mamba-2's
      ),
      chunks=dict(
        whole=pick(test=16, cpu=64, gpu=128, paper=2048),  # of the global memory
        shard=pick(test=16, cpu=64, gpu=128, paper=4096),
        local=pick(test=(4, 8), cpu=(8, 16)),
        small=pick(test=(1, 2), cpu=(2, 4)),  # of stage 2
        titans=pick(test=8, cpu=16),  # also TTT's
        coarse=pick(test=8, cpu=64, gpu=128),
        inner=dict(tnt=0.1, titans=0.03),  # largest steps of the memories at the start, by validation text at scale cpu
        window=pick(test=8, cpu=64, gpu=128, paper=2048),  # tokens that sliding attention sees
      ),
      train=dict(
        steps=pick(test=2, cpu=100, gpu=300, paper=10_000),
        trial=pick(test=2, cpu=100, gpu=300, paper=1000),  # steps to choose a rate by
        rates=pick(test=(4e-3,), cpu=(1.2e-2, 2.4e-2), gpu=(2e-3, 5e-3), paper=(5e-4, 1e-3, 2e-3, 5e-3)),
        batch=pick(test=8, cpu=8, gpu=16, paper=64),
        length=pick(test=64, cpu=256, gpu=512, paper=16_384),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        remat=pick(cpu="none", gpu="dots"),
      ),
      second=dict(share=pick(test=0.5, cpu=0.05), rates=pick(test=(1e-3,), cpu=(1e-4, 1e-3))),
      eval=dict(
        tokens=pick(test=400, cpu=20_000, gpu=100_000, paper=4_000_000),
        batch=pick(test=8, cpu=8, gpu=32),
        chunks=pick(test=(1, 8), cpu=(1, 2, 4, 8, 16, 32, 64), gpu=(2, 4, 8, 16, 32, 64)),
      ),
      speed=dict(
        lengths=pick(test=(32, 64), cpu=(512, 1024, 2048), gpu=(2048, 8192, 32_768)),
        tokens=pick(test=512, cpu=2048, gpu=32_768, paper=524_288),  # a step
        shard=pick(test=16, cpu=128, gpu=2048),
        whole=pick(test=16, cpu=128, gpu=2048),
        large=pick(test=8, cpu=64, gpu=64, paper=128),
        more=dict(titans=pick(cpu=(), gpu=(64,), paper=(8, 64, 256)), tnt=pick(cpu=(), paper=(8, 64))),  # chunks, too
        repetitions=pick(test=2, cpu=3, gpu=2, paper=3),
      ),
      recall=dict(
        pairs=pick(test=4, cpu=12, gpu=16),
        width=pick(test=16, cpu=32),
        head_dim=pick(test=4, cpu=16),
        chunk=pick(test=4, cpu=4),
        steps=pick(test=4, cpu=500, gpu=1000),
        rows=pick(test=8, cpu=32),
        held=pick(test=8, cpu=128, gpu=512),
        rates=pick(test=(5e-3,), cpu=(1e-2, 2e-2), gpu=(5e-3, 1e-2, 2e-2)),
        seeds=pick(test=1, cpu=2, gpu=4),
      ),
      mesh=dict(data=-1),
    )
  )
