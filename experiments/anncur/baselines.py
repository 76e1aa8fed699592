"""What ANNCUR is measured against.

Retrievers (TF-IDF, BM25, dual encoders, item-item scores, ...) all give (queries, items) approximate scores, which
`anncur.rerank` reranks with f at the budget; the oracles approximate a matrix that they have seen.

  s = bm25(query_words, item_words)
  found = anncur.rerank(f, queries, s, retrieve=100, k=10)
"""

import collections
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.tensors.anncur import regularised_pinv
from jaxlab.tensors.bows import spherical_clusters

_ROWS = 512  # queries against all items at a time


def tf_idf(queries: Sequence[Sequence[str]], items: Sequence[Sequence[str]]) -> Float[np.ndarray, "Q n"]:
  """Cosine of tf idf vectors, idf = 1 + log((1 + n) / (1 + df)); vocabulary and idf from the items alone.

  Raises:
    InputError: the items have no word.
  """
  q, i = _tf_idf_vectors(queries, items)
  return (q @ i.T).toarray().astype(np.float32)


def tf_idf_neighbours(
  queries: Sequence[Sequence[str]], items: Sequence[Sequence[str]], gold: Int[np.ndarray, "Q"], *, count: int
) -> Int[np.ndarray, "Q count"]:
  """The `count` items nearest to each query by `tf_idf`, its gold item left out: negatives that look right.

  Raises:
    InputError: fewer than count + 1 items, or items without words.
  """
  require(count < len(items), f"{count} neighbours besides the gold item out of {len(items)} items; lower the count")
  q, i = _tf_idf_vectors(queries, items)
  rows = []
  for at in range(0, len(queries), _ROWS):
    scores = (q[at : at + _ROWS] @ i.T).toarray()
    scores[np.arange(len(scores)), gold[at : at + _ROWS]] = -1
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    rows.append(np.take_along_axis(best, order, 1))
  return np.concatenate(rows)


def _tf_idf_vectors(queries, items):
  columns = _vocabulary(items)
  counts = _counts(items, columns)
  idf = 1 + np.log((1 + len(items)) / (1 + np.bincount(counts.indices, minlength=len(columns))))
  scale = lambda matrix: _unit(matrix @ scipy.sparse.diags_array(idf)).tocsr()
  return scale(_counts(queries, columns)), scale(counts)


def bm25(
  queries: Sequence[Sequence[str]], items: Sequence[Sequence[str]], *, k1: float = 1.5, b: float = 0.75
) -> Float[np.ndarray, "Q n"]:
  """Sum over query words of idf tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length)).

  idf = log(1 + (n - df + 1/2) / (df + 1/2)).

  Raises:
    InputError: the items have no word.
  """
  columns = _vocabulary(items)
  counts = _counts(items, columns).tocoo()
  length = np.array([len(item) for item in items])
  df = np.bincount(counts.col, minlength=len(columns))
  idf = np.log1p((len(items) - df + 0.5) / (df + 0.5))
  saturated = counts.data * (k1 + 1) / (counts.data + k1 * (1 - b + b * length[counts.row] / length.mean()))
  weights = scipy.sparse.csr_array((saturated * idf[counts.col], (counts.row, counts.col)), shape=counts.shape)
  return (_counts(queries, columns) @ weights.T).toarray().astype(np.float32)


def _vocabulary(items):
  columns = {word: i for i, word in enumerate(dict.fromkeys(word for item in items for word in item))}
  require(bool(columns), "the items have no word to count; give items with text")
  return columns


def _counts(texts, columns):
  """Sparse counts (texts, words); words outside the vocabulary are passed over."""
  rows, indices, values = [], [], []
  for row, text in enumerate(texts):
    for word, count in collections.Counter(word for word in text if word in columns).items():
      rows.append(row)
      indices.append(columns[word])
      values.append(float(count))
  return scipy.sparse.csr_array((values, (rows, indices)), shape=(len(texts), len(columns)))


def _unit(matrix):
  norm = np.sqrt(matrix.multiply(matrix).sum(axis=1))
  return scipy.sparse.diags_array(1 / np.maximum(norm, 1e-12)) @ matrix


def truncated_svd(scores: Float[Array, "Q n"], rank: int) -> Float[Array, "Q n"]:
  """The best approximation of this rank; it needs every score.

  Raises:
    InputError: rank is not in 1..min(Q, n).
  """
  require(1 <= rank <= min(scores.shape), f"rank is {rank}; it must lie in 1..{min(scores.shape)}")
  u, s, vt = jnp.linalg.svd(scores, full_matrices=False)
  return jnp.matmul(u[:, :rank] * s[:rank], vt[:rank], precision="highest")


def cur_oracle(
  scores: Float[Array, "Q n"], rows: Int[Array, "k_q"], anchors: Int[Array, "k_i"], *, rcond: float = 1e-5
) -> Float[Array, "Q n"]:
  """C U R with U = pinv(C) M pinv(R), the best middle factor for these columns and rows; it needs every score."""
  multiply = lambda *parts: functools.reduce(functools.partial(jnp.matmul, precision="highest"), parts)
  c, r = scores[:, anchors], scores[rows]
  invert = functools.partial(regularised_pinv, method="rcond", strength=rcond)
  return multiply(c, multiply(invert(c), scores, invert(r)), r)


@functools.partial(jax.jit, static_argnames="count")
def cluster_anchors(key: jax.Array, embeddings: Float[Array, "n d"], count: int) -> Int[Array, "count"]:
  """Anchor items by k-means of dual-encoder embeddings: of each cluster the item nearest its mean, ascending.

  A cluster that stays empty gives its place to a random item.

  Raises:
    InputError: count is not in 1..n.
  """
  n = len(embeddings)
  require(1 <= count <= n, f"{count} clusters of {n} items; choose 1..{n}")
  unit = embeddings / jnp.maximum(jnp.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
  keys = jax.random.split(key)
  member = jax.nn.one_hot(spherical_clusters(embeddings.T, keys[0], clusters=count, steps=20), count, axis=0)
  inside = jnp.where(member > 0, (member @ unit) @ unit.T, -jnp.inf)
  # Chosen items first, then the others in random order.
  chosen = jnp.zeros(n).at[jnp.argmax(inside, 1)].max(jnp.any(member > 0, 1).astype(jnp.float32))
  return jnp.sort(jnp.argsort(-chosen - 0.5 * jax.random.uniform(keys[1], (n,)))[:count])


def match_batches(
  random: np.random.Generator,
  queries: Int[np.ndarray, "Q"],
  teacher: Float[np.ndarray, "Q n"],
  *,
  steps: int,
  batch: int,
  top: int = 64,
) -> dict:
  """MATCH: batches of query, the teacher's `top` items and their scores, for `encoders.match_loss`."""
  best = np.argsort(-teacher, axis=1, kind="stable")[:, :top]
  at = random.integers(0, len(queries), (steps, batch))
  return _batches(queries[at], best[at], np.take_along_axis(teacher[at], best[at], -1))


def shared_batches(
  random: np.random.Generator,
  queries: Int[np.ndarray, "Q"],
  teacher: Float[np.ndarray, "Q n"],
  *,
  steps: int,
  batch: int,
  size: int,
) -> dict:
  """MATCH over `size` items at random that all `batch` queries share: each is embedded once for many scores.

  Of the teacher's top alone a student learns their order, not what sets them apart from the rest.

  Raises:
    InputError: batch is not in 1..Q, or size not in 1..n.
  """
  most, n = teacher.shape
  require(1 <= batch <= most and 1 <= size <= n, f"{batch} queries share {size} items; there are {most} and {n}")
  draw = lambda among, count: np.argsort(random.random((steps, among)), axis=1)[:, :count]
  at, drawn = draw(most, batch), draw(n, size)
  return {
    "query": queries[at].astype(np.int32),
    "items": drawn.astype(np.int32),
    "place": np.broadcast_to(np.arange(size, dtype=np.int32), (steps, batch, size)),
    "teacher": teacher[at[..., None], drawn[:, None]].astype(np.float32),
  }


def trp_batches(
  random: np.random.Generator,
  queries: Int[np.ndarray, "Q"],
  teacher: Float[np.ndarray, "Q n"],
  *,
  steps: int,
  batch: int,
  positives: int = 4,
  negatives: int = 8,
) -> dict:
  """TRP: one of the teacher's top `positives` items against the `negatives` ranked just below them.

  A teacher that gives the positive all of its weight makes `match_loss` the cross-entropy.
  """
  best = np.argsort(-teacher, axis=1, kind="stable")
  at, which = random.integers(0, len(queries), (steps, batch)), random.integers(0, positives, (steps, batch))
  items = np.concatenate([best[at, which][..., None], best[at][..., positives : positives + negatives]], -1)
  weight = np.where(np.arange(negatives + 1) == 0, 0.0, -np.inf)
  return _batches(queries[at], items, np.broadcast_to(weight, items.shape))


def _batches(queries: Int[np.ndarray, "steps B"], candidates: Int[np.ndarray, "steps B c"], teacher) -> dict:
  """Batches in which every query has candidates of its own."""
  steps = len(candidates)
  place = np.arange(candidates[0].size, dtype=np.int32).reshape(candidates.shape[1:])
  return {
    "query": queries.astype(np.int32),
    "items": candidates.reshape(steps, -1).astype(np.int32),
    "place": np.broadcast_to(place, candidates.shape),
    "teacher": teacher.astype(np.float32),
  }
