r"""Dataset Decomposition: is a decoder trained sooner on sequences of one document and many lengths?

Paper (arXiv 2405.13226): a step takes 0.80 of the time (1 B, 8192 tokens), and the accuracy of concat-and-chunk is
reached more than six times sooner. Measured here on documents with a web's law of lengths, cut from books and code:
concat-and-chunk, the same under a document mask, best-fit packing, and the buckets in random order and by Grow-P2.

  python -m experiments.run --config=configs/dataset_decomposition.py:gpu --workdir=runs/dd \
      --config.data.path='books/*.xz'

Scale cpu (0.2 M parameters, 438 steps of 512 tokens of code, sequences of 32 to 512; 4 minutes on two quiet cores)
printed (2026-12-01), held-out loss in nats, two seeds:

  concat 5.402, 5.367   masked 5.357, 5.273   best fit 5.390, 5.413   uniform 5.278, 5.279   Grow-P2 5.412, 5.289
  time of a token over that in chunks of 512     0.50   (by FLOPs 0.72)
  time to the loss of concat-and-chunk           0.46

It shows what is saved on the way to a loss; differences of a few hundredths are the seeds'. What else was seen is in
docs/log.md.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Dataset Decomposition",
  family="sequence",
  link="https://arxiv.org/abs/2405.13226",
  does="cuts documents into sequences of powers of two and trains on batches of one length at a time",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU), paper (more tokens, longer batches)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="dataset_decomposition",
      experiment="dataset_decomposition",
      scale=scale,
      seed=0,  # of the documents
      seeds=pick(test=(0,), cpu=(0, 1)),  # of parameters and order
      model="qwen3",
      shape=dict(
        depth=pick(test=1, cpu=3, gpu=8, paper=12),
        width=pick(test=32, cpu=64, gpu=512, paper=768),
        q_heads=pick(test=2, cpu=2, gpu=8, paper=12),
        kv_heads=pick(test=2, cpu=2, gpu=8, paper=12),
        head_dim=pick(test=16, cpu=32, gpu=64),
        mlp_width=pick(test=64, cpu=176, gpu=1408, paper=2048),
        context=pick(test=64, cpu=512, gpu=8192),
        rope_theta=1e5,
        tied_embeddings=True,
      ),
      data=dict(name="stdlib_code", path="", vocab_size=pick(test=512, cpu=1024, gpu=8192, paper=32768)),
      more=dict(name="stdlib_code", path=""),  # beside data.path; an empty name leaves it out
      law=dict(  # of the documents' tokens
        mean=pick(test=30, cpu=120, gpu=600),
        sigma=1.2,
        whole=0.1,  # share of the chapters that are left whole
      ),
      tokens=pick(test=6000, cpu=256_000, gpu=48_000_000, paper=1_600_000_000),  # of all documents
      low=pick(test=4, cpu=5, gpu=8),  # sequences have 2^low .. 2^high tokens
      high=pick(test=6, cpu=9, gpu=13),
      batch_tokens=pick(test=512, cpu=512, gpu=65_536, paper=524_288),
      schedule=dict(cycles=pick(test=2, cpu=8), token_weighted=True),
      arms=("concat", "concat_masked", "best_fit_masked", "uniform", "grow_p2"),
      shares=pick(test=(1.0,), cpu=(0.5, 1.0)),  # of the documents; rates are chosen on the first
      train=dict(
        rates=pick(test=(6e-3,), cpu=(4e-3, 8e-3, 16e-3), gpu=(5e-4, 1e-3, 2e-3, 4e-3)),
        warmup=pick(test=1, cpu=10, gpu=20),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        remat=pick(cpu="none", gpu="dots"),
        checkpoint_every=pick(test=100, cpu=1000),
      ),
      eval=dict(chapters=pick(test=4, cpu=64, gpu=128), batch=pick(test=2, cpu=16)),
      speed=dict(repetitions=pick(test=2, cpu=10)),
      mesh=dict(data=-1),
    )
  )
