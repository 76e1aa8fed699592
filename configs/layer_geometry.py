r"""Layer geometry: is a layer's update tokenwise, and is the rest of it what matters for the output?

Paper (arXiv 2604.02459): on DistilGPT2, Pythia and Mamba the update is almost perfectly aligned with its tokenwise
part, the residual is not, and the residual's size has a Spearman correlation of 0.7 to 0.95 with the output change.

  python -m experiments.run --config=configs/layer_geometry.py:cpu --workdir=runs/layer_geometry
  python -m experiments.run --config=configs/layer_geometry.py:gpu --workdir=runs/layer_geometry_gpu \
      --config.data.name=local_text --config.data.path=books

Scale cpu: transformers of 4 x 64 and 6 x 96, a Mamba-2 of 6 x 96, base; set OPENBLAS_NUM_THREADS=1. Scale gpu: 6 x 256,
8 x 384 (also with SNLP's regulariser, and untrained), 12 x 512, a Mamba-2 of 8 x 384, base; nine minutes on one H100
with XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false".
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
  """Scales: test (seconds), cpu (two cores, minutes), gpu (one GPU, 6 minutes), paper (trained longer)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="layer_geometry",
      experiment="layer_geometry",
      scale=scale,
      seed=0,
      model="nanochat",  # or hf:DIR, or a name such as smollm2: a checkpoint to measure as it is
      # (layers, width) of the transformers.
      sizes=pick(test=((2, 32),), cpu=((4, 64), (6, 96)), gpu=((6, 256), (8, 384), (12, 512))),
      standard=pick(test=0, cpu=1),  # which of them is also kept untrained, and trained for SNLP
      shape=dict(head_dim=pick(test=16, cpu=32, gpu=64), window_pattern="L", x0=False, value_embeddings=False),
      mamba=dict(  # no layers: no Mamba-2
        depth=pick(test=2, cpu=6, gpu=8),
        width=pick(test=32, cpu=96, gpu=384),
        head_dim=pick(test=16, cpu=32, gpu=64),
        state=pick(test=8, cpu=32, gpu=128),
        chunk=pick(test=8, cpu=32, gpu=64),
      ),
      checkpoints=pick(test=(), cpu=("base",)),  # shipped or Hugging Face ones, measured beside the trained
      data=dict(
        name="stdlib_code",  # or local_text with a path, or a tfds name
        path="",
        vocab_size=pick(test=320, cpu=1024, gpu=8192),
        split="validation",
        row=pick(test=24, cpu=128, gpu=256, paper=512),  # BOS and row - 1 tokens
        reference=pick(test=8, cpu=40, gpu=64, paper=64),  # rows
        evaluation=pick(test=4, cpu=6, gpu=8, paper=8),
      ),
      train=dict(
        steps=pick(test=4, cpu=150, gpu=500, paper=3000),
        batch=pick(test=8, cpu=16, gpu=64),
        length=pick(test=24, cpu=128, gpu=512),
        accumulate=1,
        scale=1.0,
        recall=0.0,
        warmdown=0.65,
        warmup=pick(cpu=20, gpu=40),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        remat="none",
        checkpoint_every=pick(cpu=100, gpu=500),
      ),
      # A second training of the standard size with SNLP's regulariser on its last layers; 0: none.
      idn=dict(
        weight=pick(cpu=0.0, gpu=0.5),
        layers=pick(cpu=(1,), gpu=(4,)),
        stride=1,
        surrogate="identity",
        detach_target=False,
        detach_input=False,
        sampled=False,
      ),
      splits=pick(cpu=1, gpu=3),  # ways to divide the documents; figures are means over them
      fit=dict(
        neighbours=pick(test=8, cpu=24, gpu=32, paper=64),  # a GPU batches eigenproblems of up to 32
        rank=pick(test=4, cpu=8, gpu=16),
        ridge=1e-2,
        steps=pick(test=20, cpu=300, gpu=2000),
        batch=pick(test=32, cpu=256, gpu=1024),
        subspace=pick(test=4, cpu=16),  # q, dimensions of the dominant subspace
        resamples=pick(test=5, cpu=200, gpu=100, paper=200),
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
        reference=pick(test=64, cpu=2048, gpu=16_384),
        width=pick(test=16, cpu=64, gpu=256),
        neighbours=pick(test=8, cpu=32),
        rank=pick(test=4, cpu=8),
        depth=pick(test=2, cpu=2, gpu=4),
        lengths=pick(test=(8,), cpu=(8, 32, 128, 512), gpu=(32, 128, 512)),
        repetitions=pick(test=1, cpu=5, gpu=3, paper=5),
      ),
      mesh=dict(data=-1, fsdp=1, tensor=1),
    )
  )
