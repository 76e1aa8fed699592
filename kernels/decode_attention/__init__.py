"""Attention of a few new tokens over a cache that is shared out among many programs (flash decoding), cache updated.

One query is little work over much memory: XLA gives every head to few programs, takes four or more kernels, and two to
write the cache.
"""

import jax

from jaxlab.core.checks import require_choice
from jaxlab.kernels.decode_attention import gpu
from jaxlab.models.attention import attend_cached, dot_product_attention

IMPLEMENTATIONS = (None, "reference", "triton")


def decode_attention(
  q,
  k,
  v,
  pairs,
  *,
  windows,
  start,
  layer=0,
  attention=dot_product_attention,
  implementation=None,
  interpret=False,
):
  """Attention of new tokens over what the caches of n layers hold and over themselves.

  Args:
    q: (n, batch, time, q_heads, head_dim); k, v: (n, batch, time, kv_heads, head_dim), of the new tokens.
    pairs: (keys, values) of the layers of every kind of window, each (N, batch, capacity, kv_heads, head_dim), in the
      order of `window_kinds(windows)`; the layers of a kind are rows layer, layer + 1, ... of its pair.
    windows: of the n layers; start: positions filled, int32[].
    attention: an `AttentionFn`; the kernels compute `dot_product_attention`, any other one runs as it is.
    implementation: "reference" (XLA) or "triton"; None takes Triton on a GPU for dense softmax attention, where at most
      16 queries share a key head and head_dim is a power of two, but for float64.
    interpret: run the kernels in Pallas' interpreter, on any machine.

  Returns:
    (attended, like q; pairs with the new keys and values written at `start`). Softmax and sums are float32; the kernels
    use no matrix unit, so that `jax.default_matmul_precision` lowers nothing.

  Raises:
    InputError: an unknown implementation, or a problem the kernels cannot take for "triton".
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  if implementation is None:
    usable = jax.default_backend() == "gpu" and attention is dot_product_attention and gpu.supports(q, k)
    implementation = "triton" if usable else "reference"
  if implementation == "reference":
    return attend_cached(q, k, v, pairs, windows=windows, start=start, layer=layer, attention=attention)
  return gpu.decode_attention(q, k, v, pairs, windows=windows, start=start, layer=layer, interpret=interpret)
