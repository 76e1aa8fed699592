r"""Layer geometry: is a layer's update tokenwise, and is the rest of it what matters for the output?

Paper (arXiv 2604.02459): on DistilGPT2, Pythia and Mamba the update is almost perfectly aligned with its tokenwise
part, the residual is not, and the residual's size has a Spearman correlation of 0.7 to 0.95 with the output change.

  python -m experiments.run --config=configs/layer_geometry.py:cpu --workdir=runs/layer_geometry

Took 3 min on two busy CPU cores with OPENBLAS_NUM_THREADS=1 and the training of the two small models (about a minute)
resumed from its checkpoints. Held-out MLP class; nanochats of 4 and 6 layers, and the shipped base; printed:
  layers with cos(u, t) - cos(r, t) > 0.3 and E(u) / E(r) > 2         0 of 4, 0 of 6, 6 of 6: E(r) is large in 64 and
                                                                      96 dimensions, of which the subspace has 16
  layers that exceed the isotropic null and the curve of R^2 too      0, 0, 0: cos(u, t) is sqrt(R^2) to 0.02
  Spearman of ||r|| and KL, one token, median over layers             0.82, 0.71, 0.78 (untrained model 0.80)
  KL of removing r over that of equal-norm noise, median              3.3, 3.6, 1.9
  all single-token interventions of 512 tokens in one pass            54 x a forward a position
  low-rank fits of 10,000 tokens over NumPy                           0.72 x: on a CPU one token at a time
In the two small models the alignment is what R^2 makes of any least-squares fit; in base it exceeds that curve in 5
of 6 layers, but nowhere the isotropic ratio of energies. An untrained model has the correlation too. Removing r hurts 2
to 4 times as much as noise of its norm (the untrained model's ratio is in the figure of harm only). On a busy CPU set
OPENBLAS_NUM_THREADS=1: small LAPACK calls otherwise wait for BLAS threads.

Scale gpu: a nanochat of 8 layers x 336, the same trained with SNLP's regulariser on its last 4, one not trained, base;
16,128 reference tokens of books (XLA_FLAGS as docs/measuring.md says for programs side by side, and, as the many small
programs take minutes to tune, --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false):

  python -m experiments.run --config=configs/layer_geometry.py:gpu --workdir=runs/layer_geometry_h200 \
      --config.data.name=local_text --config.data.path=books

took 3 min on one H100 (2026-11-26) and printed (8 layers, with the regulariser, base):
  layers with cos(u, t) - cos(r, t) > 0.3 and E(u) / E(r) > 2         3 of 8, 2 of 8, 6 of 6
  layers that exceed the isotropic null and the curve of R^2 too      0, 0, 0
  Spearman of ||r|| and KL, one token, median over layers             0.56, 0.59, 0.66; best layer 0.71, 0.74, 0.70
  KL of removing r over that of equal-norm noise, median              2.4, 2.3, 1.95
  input dependence ||u - v|| / ||u|| of the last half's updates       0.35, with the regulariser 0.26
  all single-token interventions of 512 tokens in one pass            14 x batched forwards, one a position
  low-rank fits of 10,000 tokens over NumPy                           146 x
The picture is that of scale cpu with three times the reference: alignment follows R^2, nothing exceeds the nulls, the
paper's 0.7 is reached by the best layer only, and the untrained model has more of it (0.76 to 0.96).
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Layer-update geometry",
  family="depth",
  link="https://arxiv.org/abs/2604.02459",
  does="splits what a layer does into a map of each token by itself and a rest, and asks which of the two matters",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (one core, 5 minutes), gpu (one GPU, 5 minutes), paper (trained longer)."""
  pick = scales.picker(scale)
  large = lambda gpu, paper=None: dict(gpu=gpu, paper=gpu if paper is None else paper)
  return ml_collections.ConfigDict(
    dict(
      paper="layer_geometry",
      experiment="layer_geometry",
      scale=scale,
      seed=0,
      model="nanochat",  # or hf:DIR, a checkpoint to measure as it is
      depths=pick(test=(2,), cpu=(4, 6), gpu=(8,), paper=(6, 8, 12)),
      shape=dict(
        aspect_ratio=pick(test=16, cpu=16, **large(42)),
        head_dim=pick(test=16, cpu=32, **large(64)),
        window_pattern="L",
        x0=False,
        value_embeddings=False,
      ),
      checkpoints=pick(test=(), cpu=("base",)),  # shipped or Hugging Face ones, measured beside the trained
      data=dict(
        name="stdlib_code",  # or local_text with a path, or a tfds name
        path="",
        vocab_size=pick(test=320, cpu=1024, **large(8192)),
        split="validation",
        row=pick(test=24, cpu=128, **large(256, 512)),  # BOS and row - 1 tokens
        reference=pick(test=8, cpu=40, **large(64, 32)),  # rows
        evaluation=pick(test=4, cpu=6, **large(8, 4)),
      ),
      train=dict(
        steps=pick(test=4, cpu=150, **large(500, 4000)),
        batch=pick(test=8, cpu=16, **large(64, 128)),
        length=pick(test=24, cpu=128, **large(512)),
        accumulate=1,
        scale=1.0,
        recall=0.0,
        warmdown=0.65,
        warmup=pick(cpu=20, **large(40)),
        dtype=pick(cpu="float32", **large("bfloat16")),
        remat="none",
        checkpoint_every=pick(cpu=100, **large(500)),
      ),
      # A second training of the largest with SNLP's regulariser on its last layers; 0: none.
      idn=dict(
        weight=pick(cpu=0.0, **large(0.5)),
        layers=pick(cpu=(1,), **large((4,), (6,))),
        stride=1,
        surrogate="identity",
        detach_target=False,
        sampled=False,
      ),
      splits=pick(cpu=1, **large(1, 3)),  # ways to divide the documents; figures are means over them
      fit=dict(
        neighbours=pick(test=8, cpu=24, **large(32, 64)),  # a GPU batches eigenproblems of up to 32
        rank=pick(test=4, cpu=8, **large(16)),
        ridge=1e-2,
        steps=pick(test=20, cpu=300, **large(2000)),
        batch=pick(test=32, cpu=256, **large(1024)),
        subspace=pick(test=4, cpu=16),  # q, dimensions of the dominant subspace
        resamples=pick(test=5, cpu=200, **large(100, 200)),
      ),
      intervene=dict(
        classes=pick(
          test=("low_rank", "mlp"),
          cpu=("global_affine", "low_rank", "mlp"),
          gpu=("token_lookup", "global_affine", "low_rank", "orthogonal", "mlp"),
          paper=("identity", "token_lookup", "global_affine", "diagonal", "low_rank", "orthogonal", "mlp"),
        ),
        doses=(0.0, 0.25, 0.5, 0.75, 1.0),
      ),
      bench=dict(
        tokens=pick(test=(8,), cpu=(10, 100, 1000, 10_000)),
        reference=pick(test=64, cpu=2048, **large(16_384)),
        width=pick(test=16, cpu=64, **large(256)),
        neighbours=pick(test=8, cpu=32),
        rank=pick(test=4, cpu=8),
        depth=pick(test=2, cpu=2, **large(4)),
        lengths=pick(test=(8,), cpu=(8, 32, 128, 512), **large((32, 128, 512))),
        repetitions=pick(test=1, cpu=5, **large(2, 5)),
      ),
      mesh=dict(data=-1),
    )
  )
