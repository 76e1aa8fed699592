"""How well the predictor tells boundaries on unseen text, and whether sections of a document end there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.long_context import Subject, documents
from jaxlab.attention.dhsa_boundaries import RATIO, agreement, attention_ratio, scored, select_boundaries
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.inference import run_layers

_NEAR = 4  # tokens within which the end of a section is found
_SECTION = (16, 200)  # tokens of a section, at most a quarter of a row


def fitting_heads(subject: Subject, heads: int) -> int:
  """The most heads, up to `heads`, that divide the numbers of a position's keys."""
  c = subject.network.model.config
  return math.gcd(c.kv_heads * c.head_dim, heads)


def measure(config, subject: Subject, predictor) -> dict:
  """Means over layers and held-out rows.

  Returns:
    {"precision", "recall", "f1" at the threshold of training, "overlap" of the `top` highest with those of rho;
    "f1_all": of calling every position a boundary, "f1_random": of as many as there are, anywhere; "overlap_random";
    "sections": the share of the ends of sections that the boundaries of the first layer find, "sections_random": as
    many at random, "sections_labels": those of rho}.
  """
  e = config.predictor
  rows = documents(subject.tokens, e.rows, e.length, seed=config.seed)
  found = [_agreements(predictor, subject.network, row[None], min(e.top, e.length // 4)) for row in rows]
  mean = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
  composed, ends = sections(subject, e.rows, e.length, seed=config.seed)
  return mean | {"top": min(e.top, e.length // 4)} | _sections(predictor, subject, composed, ends, config)


@functools.partial(jax.jit, static_argnames="top")
def _agreements(predictor, network, tokens, top: int):
  found = []

  def attend(layer, _, x, q, k, v, window):
    rho, score = attention_ratio(q, k, window=window)[0], predictor.score(q, k)[0]
    share = (rho >= RATIO).sum() / (rho > 0).sum()
    found.append(
      agreement(score, rho, top=top)
      | {"f1_all": 2 * share / (1 + share), "f1_random": share, "overlap_random": top / (rho > 0).sum()}
    )
    return dot_product_attention(q, k, v, window=window, start=0)

  x, side, _ = network.model.embed(tokens)
  run_layers(network, x, side, attend)
  return {name: jnp.stack([row[name] for row in found]).mean() for name in found[0]}


def sections(subject: Subject, count: int, length: int, *, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
  """(rows of pieces of different documents, the last position of every piece but a row's last)."""
  rng, rows, ends = np.random.default_rng(seed), [], []
  tokens = subject.tokens
  for _ in range(count):
    row, last = [tokens.bos], []
    while len(row) < length:
      size = int(rng.integers(_SECTION[0], min(_SECTION[1], length // 4)))
      document = tokens.document(int(rng.integers(len(tokens))))
      at = int(rng.integers(max(1, len(document) - size)))
      row += document[at : at + size].tolist()
      last.append(len(row) - 1)
    rows.append(row[:length])
    ends.append(np.array([end for end in last if end < length - 1]))
  return np.array(rows, np.int32), ends


def _sections(predictor, subject: Subject, rows: np.ndarray, ends: list[np.ndarray], config) -> dict:
  found = {"sections": [], "sections_random": [], "sections_labels": []}
  rng, length = np.random.default_rng(config.seed), rows.shape[1]
  for row, true in zip(rows, ends, strict=True):
    predicted, labels = (np.asarray(a) for a in _first_layer(predictor, subject.network, row[None]))
    apart, most = config.select.apart, 2 * len(true)
    kept = lambda score, most=most, apart=apart: np.unique(
      select_boundaries(jnp.asarray(score), length, most=most, theta=-np.inf, apart=apart, instruction=0)
    )[1:-1]
    scores = {"sections": predicted, "sections_labels": labels}
    scores["sections_random"] = np.where(labels > 0, rng.random(length), -np.inf)
    for name, score in scores.items():
      near = np.abs(kept(score)[:, None] - 1 - true).min(axis=0) <= _NEAR
      found[name].append(near.mean())
  return {name: float(np.mean(shares)) for name, shares in found.items()}


@jax.jit
def _first_layer(predictor, network, tokens):
  """(predicted score, rho) of the first layer, whose boundaries all layers share."""
  found = []

  def attend(layer, _, x, q, k, v, window):
    if not found:
      found.extend((predictor.score(q, k)[0], attention_ratio(q, k, window=window)[0]))
    return dot_product_attention(q, k, v, window=window, start=0)

  x, side, _ = network.model.embed(tokens)
  run_layers(network, x, side, attend)
  real = scored(jnp.array([tokens.shape[1]]), tokens.shape[1])[0]
  return tuple(jnp.where(real, score, -jnp.inf) for score in found)
