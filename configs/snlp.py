r"""SNLP on nanochat: does one Newton step over most layers keep the model, and what does training for it cost?

Paper (arXiv 2605.17842): 2.58x at +17 % perplexity (0.5 B, 12 chunks of 2 layers, K = 1, eager PyTorch, 2048 tokens);
its first version claimed 2.3x with perplexity 6.1 % better on 128-token slices. Here: the same pair of models without
and with the regulariser, run with 3, 6 and 9 (cpu) of their layers in parallel, against the compiled network.

  python -m experiments.run --config=configs/snlp.py:cpu --workdir=runs/snlp

Takes 7 min on 2 CPU cores (12 layers of width 96, 0.4 M tokens of Python's standard library) and printed (2026-11-25):
  perplexity lost, n = 9 of 12, K = 1, regularised     0.23 %   (plain model 0.53 %)
  trace error of the last layer over the plain one's   0.19     (0.3 % against 1.6 %)
  sequential perplexity changed by the regulariser     -0.3 %; on slices without BOS +0.4 %: the first version's gain is
                                                       not there
  speed-up of an uncached forward, K = 1 / 2 / 4       0.93 / 0.62 / 0.36 x: two cores have no room for parallel layers
So small and so briefly trained a network is nearly additive in its layers; what it shows is the regulariser at work,
not the speed.
"""

import ml_collections


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (a minute), cpu (2 cores, 8 minutes), h200 (one GPU), paper (0.5B, four GPUs)."""
  pick = lambda **by_scale: by_scale.get(scale, by_scale["cpu"])
  return ml_collections.ConfigDict(
    dict(
      paper="snlp",
      experiment="snlp",
      scale=scale,
      seed=0,
      model="nanochat",  # or hf:DIR, a Hugging Face checkpoint to run as it is
      shape=dict(
        depth=pick(test=4, cpu=12, h200=32, paper=32),
        aspect_ratio=pick(test=8, cpu=8, h200=8, paper=20),
        head_dim=pick(test=16, cpu=32, h200=64, paper=128),
        window_pattern="SSSL",
        x0=False,
        value_embeddings=False,
      ),
      data=dict(
        name="stdlib_code",  # or local_text with a path, or a tfds name
        path="",
        vocab_size=pick(test=320, cpu=1024, h200=8192, paper=32768),
      ),
      train=dict(
        steps=pick(test=6, cpu=200, h200=1200, paper=4800),
        batch=pick(test=4, cpu=8, h200=128, paper=512),
        length=pick(test=32, cpu=256, h200=512, paper=2048),
        accumulate=pick(cpu=1, paper=8),
        scale=pick(test=1.0, cpu=1.0),
        recall=0.0,  # share of rows that are generated recall tasks
        warmdown=0.65,
        warmup=pick(cpu=20, h200=40, paper=40),
        dtype=pick(test="float32", cpu="float32", h200="bfloat16", paper="bfloat16"),
        checkpoint_every=pick(test=2, cpu=50, h200=400, paper=200),
      ),
      reg=dict(
        weight=0.5,
        stride=pick(test=1, cpu=3, h200=6, paper=6),
        layers=pick(test=(2, 3), cpu=(3, 6, 9), h200=(8, 16, 24), paper=(8, 16, 24)),
        detach_target=False,
        sampled=False,
      ),
      snlp=dict(
        surrogate="identity",
        layers=pick(test=(2, 3), cpu=(3, 6, 9), h200=(8, 16, 24), paper=(8, 16, 24)),
        iterations=pick(test=(1, 2), cpu=(1, 2, 4), h200=(1, 2, 4, 8), paper=(1, 2, 4, 8)),
      ),
      eval=dict(
        split="validation",
        length=pick(test=32, cpu=256, h200=512, paper=2048),
        slice=pick(test=16, cpu=64, h200=128, paper=128),
        batch=pick(test=4, cpu=8, h200=64, paper=16),
        tokens=pick(test=512, cpu=8192, h200=1_000_000, paper=1_000_000),
      ),
      bench=dict(
        lengths=pick(test=(16,), cpu=(64, 256), h200=(128, 512, 2048), paper=(128, 512, 2048)),
        repetitions=pick(test=3, cpu=30, h200=100, paper=100),
        threshold=1.0,
      ),
      mesh=dict(data=-1),
    )
  )
