r"""SeCO and SpaCO: gradients of a long sequence with the activations of one chunk (Li et al. 2025, "Training
Long-Context LLMs Efficiently via Chunk-wise Optimization").

A chunk's loss J_j and cache m_j depend on the caches before it: (J_j, m_j) = f(x_j; m_1 .. m_{j-1}; theta). Caches are
checkpoints: with them each chunk's graph can be made again by itself, last chunk first, so that what later chunks sent
back to its cache is known.

  pass 1, without gradients    m_i for i = 1 .. k
  pass 2, i = k .. 1           vjp of f at chunk i with cotangents dJ_i = s1, dm_i = s2 * (sum of what came back)

SeCO visits every chunk (s1 = s2 = 1): the exact gradient for one forward more. SpaCO visits t of k chosen at random;
a chain of gradients through p chunks then survives with probability (t)_p / (k)_p, so that

  E[estimate] = sum_p s1 s2^(p-1) (t)_p / (k)_p z_p,   z_p: the sum of all chains through exactly p chunks.

  train(model, data, None, optimizer, gradient_fn=gradient(chunk=512), ...)               SeCO
  train(model, data, None, optimizer, gradient_fn=gradient(chunk=512, visited=8), ...)    SpaCO

`token_losses=` puts a loss of one's own in the place of cross-entropy; `value_and_grad` takes any chunk-wise loss.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.models.attention import AttentionFn
from jaxlab.sequence import common
from jaxlab.training import losses
from jaxlab.training.loop import GradientFn

SAMPLING = ("uniform", "bernoulli")


def value_and_grad(
  chunk_loss: common.ChunkLoss,
  params,
  cache,
  parts,
  *,
  chunk: int,
  order: Int[Array, "visits"] | None = None,
  active: Bool[Array, "visits"] | None = None,
  direct: float | Array = 1.0,
  relay: float | Array = 1.0,
  axis: int = 2,
):
  """(the loss of all chunks, gradient by `params`) around any chunk-wise loss; both passes are scans.

  Args:
    cache: arrays with room for the whole sequence, positions along `axis`; what they hold is not read.
    parts: a tree of arrays (chunks, ...): what `chunk_loss` is given of each.
    chunk: positions of a chunk.
    order: which chunks pass 2 visits, in descending order; None: all.
    active: of these, the ones it does not leave out.
    direct, relay: s1 and s2.

  Raises:
    InputError: a cache without room for all chunks, the last of which would overwrite others.
  """
  count = len(jax.tree.leaves(parts)[0])
  room = min(a.shape[axis] for a in jax.tree.leaves(cache))
  require(room >= count * chunk, f"the cache has {room} positions; {count} chunks of {chunk} need {count * chunk}")
  part_of = lambda i: jax.tree.map(lambda a: a[i], parts)

  def fill(carry, i):
    loss, cache = carry
    own, cache = chunk_loss(params, cache, part_of(i), i * chunk)
    return (loss + own, cache), None

  wide = jnp.promote_types(jnp.result_type(float), jnp.float32)
  (loss, cache), _ = jax.lax.scan(fill, (jnp.zeros((), wide), cache), jnp.arange(count))

  def visit(carry, i):
    # The cache is handed on, with its entries written once more: one that stays as it is would be copied.
    cache, sums = carry
    pieces = [(part_of(i), i * chunk)]
    how = dict(chunk=chunk, direct=direct, relay=relay, axis=axis)
    return common.backward(chunk_loss, params, cache, sums, pieces, **how)[1:]

  def step(carry, at):
    i, here = at
    if active is None:
      return visit(carry, i), None
    return jax.lax.cond(here, visit, lambda carry, i: carry, carry, i), None

  order = jnp.arange(count - 1, -1, -1) if order is None else order
  here = jnp.ones(len(order), bool) if active is None else active
  sums = common.zeros(params), common.zeros(cache)
  (_, (gradient, _)), _ = jax.lax.scan(step, (cache, sums), (order, here))
  return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)


def choose(
  key: jax.Array, chunks: int, visited: int, sampling: str = "uniform", *, last: bool = False
) -> tuple[Int[Array, "visits"], Bool[Array, "visits"] | None]:
  """(order, active) for `value_and_grad`: `visited` different chunks, or each with probability visited / chunks
  ("bernoulli", at a cost that varies, whose estimate is unbiased with s1 = s2 = chunks / visited).

  Args:
    last: the last chunk is always one of them, the others are drawn from those before it: for answers at the end of a
      prompt. s1 and s2 then weigh the last chunk too much.

  Raises:
    InputError: an unknown sampling, or `visited` that is not 1 .. chunks.
  """
  require_choice("sampling", sampling, SAMPLING)
  require(1 <= visited <= chunks, f"visited is {visited}; it must be 1 to {chunks}, the number of chunks")
  order, active = jnp.arange(chunks - 1, -1, -1), None
  if sampling == "bernoulli":
    active = jax.random.bernoulli(key, visited / chunks, (chunks,))
    return order, active.at[0].set(active[0] | last)
  drawn = jax.random.permutation(key, chunks - last)[: visited - last]
  drawn = jnp.append(drawn, chunks - 1) if last else drawn
  return jnp.sort(drawn, descending=True), active


def gradient(
  *,
  chunk: int,
  visited: int | None = None,
  cap: float | None = 2.0,
  sampling: str = "uniform",
  last: bool = False,
  attention: AttentionFn | None = None,
  remat: str = "none",
  token_losses: losses.TokenLosses = losses.token_losses,
  model_of: Callable = lambda params, *frozen: params,
) -> GradientFn:
  """SeCO, or SpaCO where some chunks are visited, as `training.loop.train(gradient_fn=...)` takes it.

  The loss is the mean over the tokens that count, and that of pass 1. Rows of any length are padded to whole chunks.
  All rows of a batch visit the same chunks, so that a visit is of whole chunks of the batch; a draw for each of 4 rows
  was no better.

  Args:
    chunk: tokens of a chunk; visited: t, chunks that send gradients back, None: all.
    cap: s1 is k / t, and so is s2 up to this; None: no limit. The paper's is 2: less noise for long chains. 0 sends
      nothing back: truncated backpropagation.
    attention: of a chunk over the cache's first 1, 2, 4, ... chunks, its own among them; backwards it runs once more.
      None: `common.over_cache`, which on a GPU needs neither.
    sampling: of `SAMPLING`; last: as of `choose`.
    token_losses: as of `chunkflow.gradient`.
    model_of: (what is trained, frozen) -> the model, `lambda adapters, model: lora.merge(model, adapters)` for LoRA.

  Raises:
    InputError: sizes below 1, an unknown sampling, more chunks visited than there are, rows of no tokens or beyond the
      model's context, or a model that smears embeddings, whose chunks would need the token before them.
  """
  require_counts(chunk=chunk, visited=1 if visited is None else visited)
  require_choice("sampling", sampling, SAMPLING)
  require(cap is None or cap >= 0, f"cap is {cap}; it must be 0 or more, or None for no limit")

  reading = common.over_prefix(attention) if attention else common.over_cache, remat

  def run(params, batch, step, key, *frozen):
    del step
    model = jax.eval_shape(model_of, params, *frozen)
    c, (rows, time) = model.config, batch["inputs"].shape
    common.require_readable(c, time)
    count = -(-time // chunk)
    require(visited is None or visited <= count, f"visited is {visited}; the sequence has {count} chunks of {chunk}")
    total = jnp.maximum((batch["targets"] >= 0).sum(), 1)
    pad = lambda a, value: jnp.pad(a, ((0, 0), (0, count * chunk - time)), constant_values=value)
    split = lambda a: jnp.moveaxis(a.reshape(rows, count, chunk), 1, 0)
    parts = split(pad(batch["inputs"], 0)), split(pad(batch["targets"], -1))
    share = common.share_of(token_losses, total)
    chunk_loss = functools.partial(common.transformer_loss, model_of=model_of, frozen=frozen, share=share, how=reading)
    shape = (c.depth, rows, count * chunk, c.kv_heads, c.head_dim)
    empty = lambda: meshes.constrain(jnp.zeros(shape, model.dtype), None, "batch")
    how = dict(chunk=chunk)
    if visited is not None:
      how["order"], how["active"] = choose(key, count, visited, sampling, last=last)
      how |= dict(direct=count / visited, relay=min(count / visited, jnp.inf if cap is None else cap))
    loss, gradient = value_and_grad(chunk_loss, params, (empty(), empty()), parts, **how)
    return (loss, {}), gradient

  return run
