"""The calls of cuDNN that no CPU can make, by their definition."""

import enum
import functools
import types

import jax
import jax.numpy as jnp

from jaxlab.kernels import chunk_attention, cudnn

_Mask = enum.Enum("Mask", ["PADDING", "CAUSAL"])


def cudnn_by_definition(monkeypatch) -> None:
  """What `kernels.chunk_attention` calls of cuDNN, worked out from the definition on any machine in any precision;
  what cuDNN leaves unwritten is no number. Within a call numbers have 32 bits or more."""
  wide = lambda *arrays: [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]

  def as_a_program_of_its_own():
    """JAX partitions these calls, and asserts that the program of one, where numbers are made, has no constants."""
    assert jax.make_jaxpr(lambda: jnp.arange(3))().eqns

  def see_of(q, k, q_seqlen, kv_seqlen, offsets, mask):
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    if mask == _Mask.PADDING:
      return (query < q_seqlen[:, None, None]) & (key < kv_seqlen[:, None, None])
    if offsets is None or offsets.size == 0:
      return jnp.broadcast_to(key <= query, (len(q), *jnp.broadcast_shapes(query.shape, key.shape)))
    begin, end = offsets[:, :-1], offsets[:, :-1] + jnp.maximum(q_seqlen, 0)
    inside = lambda at: (at[..., None] >= begin[:, None]) & (at[..., None] < end[:, None]) & (begin >= 0)[:, None]
    mine = lambda at: jnp.where(inside(at).any(-1), inside(at).argmax(-1), -1)
    of_query, of_key = mine(jnp.arange(q.shape[1])[None]), mine(jnp.arange(k.shape[1])[None])
    return (of_query[:, :, None] == of_key[:, None]) & (of_query >= 0)[:, :, None] & (key <= query)

  def scores(q, k, see, scale):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.where(see[:, None], scale * jnp.einsum("bqhd,bkhd->bhqk", q, k), -jnp.inf)

  def dot_product_attention(
    q, k, v, *, scale, mask_type, q_seqlen=None, kv_seqlen=None, q_offsets=None, kv_offsets=None, return_residual=False
  ):
    as_a_program_of_its_own()
    see, dtype = see_of(q, k, q_seqlen, kv_seqlen, q_offsets, mask_type), q.dtype
    q, k, v = wide(q, k, v)
    score = scores(q, k, see, scale)
    total = jax.nn.logsumexp(score, axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(score - total[..., None]), jnp.repeat(v, q.shape[2] // v.shape[2], 2))
    out = out.astype(dtype)
    return (out, total) if return_residual else out

  def bind(q, k, v, bias, q_seqlen, kv_seqlen, *rest, scale, mask_type, **how):
    as_a_program_of_its_own()
    *_, total, out, cotangent = rest
    dtype = q.dtype
    q, k, v, out, cotangent = wide(q, k, v, out, cotangent)
    see = see_of(q, k, q_seqlen, kv_seqlen, None, mask_type)
    weight = jnp.exp(scores(q, k, see, scale) - total[..., None])
    group = q.shape[2] // k.shape[2]
    fold = lambda a: a.reshape(*a.shape[:2], -1, group, a.shape[3]).sum(3)
    to_weight = jnp.einsum("bqhd,bkhd->bhqk", cotangent, jnp.repeat(v, group, axis=2))
    to_score = weight * (to_weight - jnp.einsum("bqhd,bqhd->bhq", cotangent, out)[..., None])
    to_q = scale * jnp.einsum("bhqk,bkhd->bqhd", to_score, jnp.repeat(k, group, axis=2))
    to_k = fold(scale * jnp.einsum("bhqk,bqhd->bkhd", to_score, q))
    to_v = fold(jnp.einsum("bhqk,bqhd->bkhd", weight, cotangent))
    if mask_type == _Mask.PADDING:
      unwritten = jnp.arange(k.shape[1])[None, :, None, None] >= kv_seqlen[:, None, None, None]
      to_k, to_v = (jnp.where(unwritten, jnp.nan, a) for a in (to_k, to_v))
    return tuple(a.astype(dtype) for a in (to_q, to_k, to_v))

  found = types.SimpleNamespace(
    dot_product_attention=dot_product_attention,
    MaskType=_Mask,
    AttentionLayout=types.SimpleNamespace(BTNH=types.SimpleNamespace(value=0)),
    _dot_product_attention_bwd_p_wrapper=types.SimpleNamespace(bind=bind),
  )
  monkeypatch.setattr(cudnn, "module", lambda: found)
  monkeypatch.setattr(chunk_attention, "_proved", functools.cache(chunk_attention._proved.__wrapped__))
  monkeypatch.setattr(cudnn, "takes", lambda q, keys: True)
