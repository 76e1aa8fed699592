"""ANNCUR and ADACUR: nearest neighbours under a costly scorer from a CUR factorisation of its score matrix.

f(query, item) is a black box, a cross-encoder say. Offline k_q anchor queries are scored against all n items: R, of
shape (k_q, n). Online a query is scored against k_i anchor items A, and from these k_i calls all others are predicted:

  e = f(q, A),  U = pinv(R[:, A]),  s = e U R = e E                         (Yadav et al., EMNLP 2022, arXiv 2210.12579)

The k_r items of largest s are scored by f and the best k returned: k_i + k_r calls. ADACUR picks the anchors of a query
in rounds, each the best of what the round before predicted.

  R = anncur.score_matrix(f, anchor_queries, items)
  index = anncur.cur_index(R, anncur.draw_anchors(jax.random.key(0), len(items), 50))
  found = anncur.search(f, queries, index, retrieve=50, k=10)               # .items (B, 10), .scores, .calls

A scorer takes index arrays that broadcast and returns scores of that shape: `lambda q, i: M[q, i]` for a stored matrix,
a jitted transformer, or a call of another machine that answers with anything NumPy takes. Nothing here knows which.
Items are numbered 0..n-1. A score that is NaN ranks below all others where it is traced and is an InputError where it
is not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice

Scorer = Callable[[Int[Array, "*#shape"], Int[Array, "*#shape"]], Float[Array, "*shape"]]
METHODS = ("ridge", "rcond")
_RETRIEVED = "scores of the retrieved items"
_POWER_ITERATIONS = 30


class Index(NamedTuple):
  """Anchor items A (ascending), U = pinv(R[:, A]) and item embeddings E = U R; a bfloat16 E serves as well."""

  anchors: Int[Array, "k_i"]
  inverse: Float[Array, "k_i k_q"]
  embeddings: Float[Array, "k_i n"]


class Found(NamedTuple):
  """The best items of each query, their scores by f in falling order, and how many items f scored for it."""

  items: Int[Array, "B k"]
  scores: Float[Array, "B k"]
  calls: Int[Array, "B"]


def score_matrix(f: Scorer, queries: Int[Array, "Q"], items: Int[Array, "n"]) -> Float[Array, "Q n"]:
  """f of every query and item: Q n calls, for R the whole price of an index.

  Raises:
    InputError: a score is NaN or infinite, or they have another shape.
  """
  return _scored("the score matrix", f, jnp.asarray(queries)[:, None], jnp.asarray(items)[None, :])


def draw_anchors(key: jax.Array, items: int, count: int) -> Int[Array, "count"]:
  """`count` of `items` items, uniformly without replacement, ascending.

  Raises:
    InputError: count is not in 1..items.
  """
  require(1 <= count <= items, f"{count} anchor items out of {items}; choose 1..{items}")
  return jnp.sort(jax.random.choice(key, items, (count,), replace=False))


def regularised_pinv(
  g: Float[Array, "k_q k_i"], *, method: str = "ridge", strength: float = 0.01
) -> Float[Array, "k_i k_q"]:
  """pinv of the intersection block by its singular values s, in the dtype of g.

  "ridge": s / (s^2 + lam), lam = strength s_1^2 / min(k_q, k_i), which is (G'G + lam I)^-1 G'.
  "rcond": 1 / s where s > strength s_1, else 0.

  A bare inverse explodes where k_i is near k_q: the block is square there and its smallest singular values are noise.
  The inverse of a block of zeros is zero.

  Raises:
    InputError: another method, or a negative strength.
  """
  require_choice("method", method, METHODS)
  require(strength >= 0, f"strength is {strength}; it must be 0 or more")
  u, s, vt = jnp.linalg.svd(g, full_matrices=False)
  if method == "ridge":
    bottom = s**2 + strength * s[0] ** 2 / min(g.shape)
    inverse = jnp.where(bottom > 0, s / jnp.where(bottom > 0, bottom, 1), 0)
  else:
    kept = s > strength * s[0]
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
  return jnp.matmul(vt.T * inverse, u.T, precision="highest")


def cur_index(
  r_anc: Float[Array, "k_q n"], anchors: Int[Array, "k_i"], *, method: str = "ridge", strength: float = 0.01
) -> Index:
  """E = pinv(R[:, A]) R. With strength -> 0 it reproduces any matrix of the rank of R[:, A] exactly.

  Raises:
    InputError: scores that are NaN or infinite, anchors outside 0..n-1 or twice, as `regularised_pinv`.
  """
  _check_finite("R_anc", r_anc)
  if not isinstance(anchors, jax.core.Tracer):
    given = jnp.asarray(anchors)
    require(
      given.size > 0 and given.dtype.kind in "iu" and bool(jnp.all((given >= 0) & (given < r_anc.shape[1]))),
      f"anchor items must be one or more of 0..{r_anc.shape[1] - 1}",
    )
    require(len(jnp.unique(given)) == given.size, "an item is an anchor twice; give each once")
  inverse = regularised_pinv(r_anc[:, anchors], method=method, strength=strength)
  return Index(jnp.asarray(anchors), inverse, jnp.matmul(inverse, r_anc, precision="highest"))


def add_items(index: Index, columns: Float[Array, "k_q m"]) -> Index:
  """The index with m new items at its end, from the anchor queries' scores of them: k_q calls an item."""
  new = jnp.matmul(index.inverse, columns, precision="highest").astype(index.embeddings.dtype)
  return index._replace(embeddings=jnp.concatenate([index.embeddings, new], axis=1))


def cur_scores(e: Float[Array, "B k_i"], embeddings: Float[Array, "k_i n"]) -> Float[Array, "B n"]:
  """s = e E, float32 or better whatever the dtype of E."""
  wide = jnp.promote_types(embeddings.dtype, jnp.float32)
  return jnp.matmul(e.astype(embeddings.dtype), embeddings, precision="highest", preferred_element_type=wide)


def search(
  f: Scorer, queries: Int[Array, "B"], index: Index, *, retrieve: int, k: int, pool_anchors: bool = True
) -> Found:
  """ANNCUR: k_i calls place a query, `retrieve` more score the items that then look best.

  Args:
    retrieve: k_r.
    pool_anchors: anchors, whose exact scores are known, compete for the k and are not retrieved again. Otherwise, as
      in the authors' code, only retrieved items are returned; anchors among them are counted once.

  Raises:
    InputError: k_r beyond the items there are, k beyond those that f scores, scores that are NaN or infinite.
  """
  k_i, n = index.embeddings.shape
  _check_budget(n - k_i if pool_anchors else n, retrieve, k, retrieve + k_i if pool_anchors else retrieve)
  queries = jnp.asarray(queries)
  e = _scored("scores of the anchor items", f, queries[:, None], index.anchors[None, :])
  s = cur_scores(e, index.embeddings)
  if pool_anchors:
    s = s.at[:, index.anchors].set(-jnp.inf)
  chosen = top_k(s, retrieve)[1]
  x = _scored(_RETRIEVED, f, queries[:, None], chosen)
  if not pool_anchors:
    fresh = ~jnp.isin(chosen, index.anchors)
    return _best(chosen, x, k, k_i + fresh.sum(1))
  anchors = jnp.broadcast_to(index.anchors, e.shape)
  pool, scores = jnp.concatenate([chosen, anchors], 1), jnp.concatenate([x, e], 1)
  return _best(pool, scores, k, jnp.full(len(queries), k_i + retrieve))


def rerank(f: Scorer, queries: Int[Array, "B"], approximate: Float[Array, "B n"], *, retrieve: int, k: int) -> Found:
  """Retrieve and rerank: the best k by f of the `retrieve` items that any cheap scores put first.

  Raises:
    InputError: as `search`.
  """
  _check_budget(approximate.shape[1], retrieve, k, retrieve)
  chosen = top_k(approximate, retrieve)[1]
  scores = _scored(_RETRIEVED, f, jnp.asarray(queries)[:, None], chosen)
  return _best(chosen, scores, k, jnp.full(len(chosen), retrieve))


def adacur(
  f: Scorer,
  queries: Int[Array, "B"],
  r_anc: Float[Array, "d n"],
  first: Int[Array, "B slots"],
  *,
  rounds: int,
  retrieve: int,
  k: int,
  strength: float = 0.01,
  key: jax.Array | None = None,
) -> Found:
  """ADACUR: `rounds` rounds of `slots` anchors a query, then `retrieve` items by the last prediction.

  Round r solves x = argmin ||R[:, I]' x - e||^2 + lam ||x||^2 over the anchors I so far, lam as in `regularised_pinv`,
  predicts s = x' R and adds the best items outside I. One round is ANNCUR with the anchors `first`.

  Args:
    r_anc: R; the transposed item vectors of a dual encoder serve as well (AXN).
    first: anchors of round 1, e.g. drawn at random or the best by TF-IDF; a row for each query, each item once in it.
    key: draw the anchors without replacement from softmax(s) instead of taking the largest.

  Raises:
    InputError: rounds < 1, strength <= 0, no item left, k or `retrieve` out of range, first anchors that are none or
      twice in a row, scores that are NaN or infinite or have another shape.
  """
  _check_finite("R_anc", r_anc)
  first, n = jnp.asarray(first), r_anc.shape[1]
  _check_first(first, len(queries), n)
  slots = first.shape[1]
  size = rounds * slots
  require(rounds >= 1 and slots >= 1, f"rounds is {rounds} with {slots} anchors each; both must be at least 1")
  require(size < n, f"{rounds} rounds of {slots} anchors leave none of {n} items; lower one of the two")
  require(strength > 0, f"strength is {strength}; the rounds solve a singular system unless it is positive")
  _check_budget(n - size, retrieve, k, size + retrieve)
  queries = jnp.asarray(queries)[:, None]
  fill = lambda a: jnp.pad(a, ((0, 0), (0, size - slots)))
  put = lambda a, b, at: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), at, axis=1)
  ask = lambda name, items: _scored(name, f, queries, items).astype(r_anc.dtype)
  chosen, e = fill(first), fill(ask("scores of the first anchors", first))
  for filled in range(slots, size, slots):  # in Python, as a scorer may be anything
    s = _unseen(r_anc, chosen, e, filled, strength)
    if key is not None:
      s += jax.random.gumbel(jax.random.fold_in(key, filled // slots), s.shape, s.dtype)
    new = top_k(s, slots)[1]
    chosen, e = put(chosen, new, filled), put(e, ask("scores of the anchor items", new), filled)
  last = top_k(_unseen(r_anc, chosen, e, size, strength), retrieve)[1]
  pool, scores = jnp.concatenate([chosen, last], 1), jnp.concatenate([e, ask(_RETRIEVED, last)], 1)
  return _best(pool, scores, k, jnp.full(len(queries), size + retrieve))


@jax.jit
def _unseen(r_anc, chosen, e, filled, strength):
  """Predicted scores, -inf where they are known; slots from `filled` on are empty."""
  s = jax.vmap(functools.partial(_predict, r_anc, filled=filled, strength=strength))(chosen, e)
  # Empty slots repeat the first anchor, so that masking them changes nothing.
  known = jnp.where(jnp.arange(chosen.shape[1]) < filled, chosen, chosen[:, :1])
  return s.at[jnp.arange(len(s))[:, None], known].set(-jnp.inf)


def _predict(r_anc, chosen, e, *, filled, strength):
  """s = e' (G'G + lam I)^-1 G' R for one query, G = R[:, I]; slots from `filled` on are zero columns."""
  used = jnp.arange(len(chosen)) < filled
  a = jnp.where(used[:, None], r_anc[:, chosen].T, 0)
  gram = jnp.matmul(a, a.T, precision="highest")
  lam = strength * _largest_eigenvalue(gram) / jnp.minimum(filled, len(r_anc))
  # Zero columns would make the system singular; a unit on their diagonal leaves their weights 0.
  factor = jax.scipy.linalg.cho_factor(gram + jnp.diag(jnp.where(used & (lam > 0), lam, 1)))
  weights = jax.scipy.linalg.cho_solve(factor, jnp.where(used, e, 0))
  return jnp.matmul(jnp.matmul(weights, a, precision="highest"), r_anc, precision="highest")


def _largest_eigenvalue(gram):
  """Power iteration from the longest column; the error of the Rayleigh quotient is the square of the vector's."""
  unit = lambda v: v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)
  product = functools.partial(jnp.matmul, precision="highest")
  start = unit(gram[:, jnp.argmax(jnp.diag(gram))])
  v = jax.lax.fori_loop(0, _POWER_ITERATIONS, lambda _, v: unit(product(gram, v)), start)
  return v @ product(gram, v)


def top_k(scores: Float[Array, "B n"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
  """The k largest and their items; NaN ranks last, of equal scores the first item wins."""
  return jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores), k)


def recall(found: Int[Array, "B k"], exact: Int[Array, "B k"]) -> Float[Array, "B"]:
  """Top-k-Recall: |found n exact| / k."""
  return jnp.any(found[:, :, None] == exact[:, None, :], axis=1).mean(axis=1)


def evaluate(
  exact: Float[Array, "B n"],
  approximate: Float[Array, "B n"],
  *,
  ks: tuple[int, ...],
  retrieves: tuple[int, ...],
  anchors: Int[Array, "k_i"] | None = None,
) -> Float[Array, "ks retrieves B"]:
  """Top-k-Recall of `rerank` (or, with anchors, of `search` with pooled anchors) for all k and k_r in one pass.

  Reranking by f keeps every item of the exact top k that was retrieved, so recall is a running count along the
  retrieved items of those whose exact rank is below k.

  Raises:
    InputError: k or k_r beyond the items there are.
  """
  n = exact.shape[1] - (0 if anchors is None else len(anchors))
  require(1 <= max(retrieves) <= n and 1 <= max(ks) <= exact.shape[1], f"k {ks} or k_r {retrieves} beyond {n} items")
  order = jnp.argsort(jnp.where(jnp.isnan(exact), jnp.inf, -exact), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  if anchors is not None:
    approximate = approximate.at[:, anchors].set(-jnp.inf)
  hit = jnp.take_along_axis(rank, top_k(approximate, max(retrieves))[1], axis=1) < jnp.array(ks)[:, None, None]
  known = 0 if anchors is None else (rank[:, anchors] < jnp.array(ks)[:, None, None]).sum(-1)
  counts = jnp.stack([hit[..., :r].sum(-1) + known for r in retrieves], axis=1)
  return counts / jnp.array(ks)[:, None, None]


def _scored(name, f, queries, items):
  """f's scores as an array of JAX."""
  scores = jnp.asarray(f(queries, items))
  shape = jnp.broadcast_shapes(queries.shape, items.shape)
  require(scores.shape == shape, f"{name} have shape {scores.shape}; the scorer was asked for {shape}")
  _check_finite(name, scores)
  return scores


def _check_first(first, queries: int, items: int) -> None:
  require(
    first.ndim == 2 and len(first) == queries and first.dtype.kind in "iu",
    f"first anchors are {first.dtype}{list(first.shape)}; expected integers [{queries}, slots], a row for each query",
  )
  if not isinstance(first, jax.core.Tracer):
    ordered = jnp.sort(first, axis=1)
    inside = bool(jnp.all((ordered >= 0) & (ordered < items)))
    require(inside, f"first anchors lie in {int(ordered.min())}..{int(ordered.max())}; items are 0..{items - 1}")
    require(bool(jnp.all(ordered[:, 1:] != ordered[:, :-1])), "an item is twice among the first anchors of a query")


def _best(items, scores, k, calls):
  values, at = top_k(scores, k)
  return Found(jnp.take_along_axis(items, at, axis=1), values, calls)


def _check_budget(items: int, retrieve: int, k: int, scored: int) -> None:
  require(1 <= retrieve <= items, f"retrieve is {retrieve}; it must lie in 1..{items}, the items that are no anchors")
  require(1 <= k <= scored, f"k is {k}, but f scores {scored} items within this budget; raise the budget or lower k")


def _check_finite(name: str, x) -> None:
  """Values that are being traced cannot be checked; `top_k` ranks their NaN last."""
  if not isinstance(x, jax.core.Tracer):
    require(bool(jnp.all(jnp.isfinite(x))), f"{name} holds NaN or infinite values; mend the scorer")
