"""Three copies of the rows side by side, of which the middle one has one token changed at a time, in one pass.

The copies are stacked along the batch: as they are ("clean"), with one token changed at a time, and with all changed.
Position i of the middle one reads what the clean one has before i, and its own: it is as if i alone had been changed.
"""

import jax
import jax.numpy as jnp

from jaxlab.models.attention import AttentionFn
from jaxlab.models.layers import wide
from jaxlab.models.mamba2 import Recurrence, ssd


def streams_of_attention(attention: AttentionFn) -> AttentionFn:
  """Attention of three stacked batches: clean, one token changed at a time, all tokens changed."""

  def call(q, k, v, *, window, start):
    (q0, q1, q2), (k0, k1, k2), (v0, v1, v2) = (jnp.split(a, 3) for a in (q, k, v))
    join = lambda a, b: jnp.concatenate([a, b])
    plain = attention(join(q0, q2), join(k0, k2), join(v0, v2), window=window, start=start)
    clean, changed = jnp.split(plain, 2)
    return jnp.concatenate([clean, _one_changed(q1, k0, v0, k1, v1, window), changed])

  return call


def _one_changed(q, k, v, own_k, own_v, window):
  """Position i sees clean keys and values of j < i and its own changed ones."""
  group = q.shape[2] // k.shape[2]
  k, v, own_k, own_v = (jnp.repeat(a, group, axis=2) for a in (k, v, own_k, own_v))
  time = jnp.arange(q.shape[1])
  ago = time[:, None] - time[None, :]
  seen = (ago > 0) if window is None else (ago > 0) & (ago <= window)
  score = jnp.einsum("bqhd,bkhd->bhqk", q, k)
  own = jnp.einsum("bqhd,bqhd->bhq", q, own_k)
  score = jnp.where(ago == 0, own[..., None], jnp.where(seen, score, -jnp.inf)) / q.shape[-1] ** 0.5
  weight = jax.nn.softmax(wide(score), axis=-1).astype(q.dtype)
  self_weight = jnp.einsum("bhqq->bqh", weight)[..., None]
  others = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(ago == 0, 0.0, weight), v)
  return others + self_weight * own_v


def streams_of_states(recurrence: Recurrence, u, dt):
  """A Mamba-2 block's mixing of three stacked batches: clean, one token changed at a time, all tokens changed.

  With own (primed) and clean values, position i of the middle one has

    conv'_i = conv_i + w_last (u'_i - u_i),     y'_i = exp(dt'_i A) S_{i-1} C'_i + dt'_i x'_i (B'_i . C'_i) + D x'_i.

  The clean S_{i-1} read by C'_i is what `ssd` gives for position i - 1 if its C is the one of position i.
  """
  clean_u, own_u, _ = jnp.split(u, 3)
  clean, middle, changed = jnp.split(recurrence.convolve(u), 3)
  middle = clean + recurrence.conv[...][-1] * (own_u - clean_u)
  x, dt, b, c = recurrence.split(jnp.concatenate([clean, middle, changed]), dt)
  x_1, dt_1, b_1, c_1 = (jnp.split(a, 3)[1] for a in (x, dt, b, c))
  # Four runs in one: the three, of which the middle one's is not used, and the clean tokens read by the next C'.
  clean_of = lambda a: a[: len(clean)]
  reads = jnp.concatenate([c_1[:, 1:], jnp.zeros_like(c_1[:, :1])], axis=1)
  runs = [
    jnp.concatenate([a, more]) for a, more in ((x, clean_of(x)), (dt, clean_of(dt)), (b, clean_of(b)), (c, reads))
  ]
  y, _ = ssd(*runs[:2], recurrence.a, *runs[2:], chunk=recurrence.config.chunk)
  y_0, _, y_2, before = jnp.split(y, 4)
  before = jnp.concatenate([jnp.zeros_like(before[:, :1]), before[:, :-1]], axis=1)
  own = jnp.sum(b_1 * c_1, axis=-1)[..., None, None] * dt_1[..., None] * x_1
  y_1 = jnp.exp(dt_1 * recurrence.a)[..., None] * before + own
  return recurrence.output(jnp.concatenate([y_0, y_1, y_2]), x)
