"""Kernels: is each Pallas kernel faster than the best public kernel for the same function?

  python -m experiments.run --config=configs/kernels.py:gpu --workdir=runs/kernels

Takes a minute on one H100. A kernel that loses has no business here. Scales test and cpu run the kernels in Pallas'
interpreter and say only that they are right.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Pallas kernels",
  family="foundation",
  link="docs/kernels.md",
  does="is what the project's own kernels gain over XLA's and cuDNN's",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test and cpu (tiny shapes, interpreted), gpu."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="kernels",
      experiment="kernels",
      scale=scale,
      kernels=(
        *("decode_block", "decode_attention", "paged_attention", "block_mass", "chunk_attention"),
        *("rotary_qkv", "residual_norm", "bitstack_matmul", "xnor_matmul"),
      ),
      tiny=pick(cpu=True, gpu=False),
      repetitions=pick(test=2, cpu=10, gpu=30),
      suite=pick(cpu="", gpu="cuda,cpu"),  # JAX_PLATFORMS of the kernels' own tests; "": they are not run
    )
  )
