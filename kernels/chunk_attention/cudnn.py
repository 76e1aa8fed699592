"""By cuDNN's flash attention: of a prefix by its length and of squares causally, or of packed sequences."""

import math

import jax
import jax.numpy as jnp

from jaxlab.kernels import cudnn

NEEDS = "takes 16-bit numbers, head_dim in 8s up to 256, no window, and a Hopper GPU or a later one"


def supports(q, k, window) -> bool:
  return window is None and cudnn.takes(q, k) and hasattr(cudnn.module(), "_dot_product_attention_bwd_p_wrapper")


def packed(q, k, v, lengths):
  """Attention within sequences of `lengths`, int32 (batch, pieces of two or more), -1 where there is none, which fill
  every row: what belongs to no sequence is never written."""
  library, heads = cudnn.module(), q.shape[2]
  # It finds a sequence's keys by counting as many heads as queries have.
  k, v = (jnp.repeat(a, heads // a.shape[2], axis=2) for a in (k, v))
  some = jnp.maximum(lengths, 0)
  begin = jnp.where(lengths >= 0, jnp.cumsum(some, axis=1) - some, -1)
  begin = jnp.pad(begin, ((0, 0), (0, 1)), constant_values=-1)
  return library.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=begin,
    kv_offsets=begin,
    scale=_scale(q),
    mask_type=library.MaskType.CAUSAL,
  )


@jax.custom_vjp
def behind(q, k, v, start):
  """As `chunk_attention.behind`."""
  return _forward(q, k, v, start)[0]


def _forward(q, k, v, start):
  library, own = cudnn.module(), _own(start, q.shape[1])
  how = dict(scale=_scale(q), return_residual=True)
  past, of_past = library.dot_product_attention(q, k, v, **_before(q, start), mask_type=library.MaskType.PADDING, **how)
  new, of_new = library.dot_product_attention(q, own(k), own(v), mask_type=library.MaskType.CAUSAL, **how)
  # Log-sum-exp is (batch, heads, tokens). The first chunk has nothing before it; its call has read one key for that.
  whole = jnp.logaddexp(jnp.where(start > 0, of_past, -jnp.inf), of_new)
  share = jnp.where(start > 0, jnp.exp(of_past - whole), 0)
  share = jnp.swapaxes(share, 1, 2)[..., None]
  out = (share * past + (1 - share) * new).astype(q.dtype)
  return out, (q, k, v, start, out, whole)


def _backward(kept, cotangent):
  q, k, v, start, out, whole = kept
  library, chunk = cudnn.module(), q.shape[1]
  own = _own(start, chunk)

  def pull(k, v, lengths, mask):
    # A part's weights are exp(score - whole), and what the sum over all of them takes away is out . cotangent.
    nothing = jnp.zeros(0, q.dtype)
    lengths = [lengths.get(name, nothing) for name in ("q_seqlen", "kv_seqlen")]
    return library._dot_product_attention_bwd_p_wrapper.bind(
      *(q, k, v, nothing, *lengths, *[nothing] * 4, whole, out, cotangent),
      scale=_scale(q),
      seed=42,
      dropout_rate=0.0,
      variadic_args=(False, False),
      mask_type=mask,
      layout=library.AttentionLayout.BTNH.value,
      sliding_window_length=None,
    )

  past, *to_past = pull(k, v, _before(q, start), library.MaskType.PADDING)
  new, *to_new = pull(own(k), own(v), {}, library.MaskType.CAUSAL)
  before = (jnp.arange(k.shape[1]) < start)[:, None, None]
  write = lambda a, b: jax.lax.dynamic_update_slice_in_dim(jnp.where(before, a, 0), b, start, 1)
  return jnp.where(start > 0, past, 0) + new, *map(write, to_past, to_new), None


behind.defvjp(_forward, _backward)


def _own(start, chunk: int):
  return lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk, 1)


def _before(q, start) -> dict:
  full = lambda n: jnp.full(q.shape[0], n, jnp.int32)
  return dict(q_seqlen=full(q.shape[1]), kv_seqlen=full(jnp.maximum(start, 1)))


def _scale(q) -> float:
  return 1 / math.sqrt(q.shape[-1])
