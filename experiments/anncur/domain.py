"""Queries and items of a text by number, split into those searched and those trained on."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.anncur import baselines, data
from experiments.anncur import encoders as scorers
from jaxlab.core.checks import require, require_choice
from jaxlab.data import corpora, tokenizer

PAIRS = {"functions": data.function_pairs, "sentences": data.sentence_pairs}


class Domain(NamedTuple):
  """Everything by number. Query and item rows index `tokens`; `items` are the n searched items, others are training.

  `as_query` holds the searched items written as queries, `gold` the gold item of every query, `at` its place among the
  searched items.
  """

  tokens: scorers.Tokens
  as_query: np.ndarray
  gold: np.ndarray
  items: np.ndarray
  anchor: np.ndarray
  dev: np.ndarray
  test: np.ndarray
  train: np.ndarray
  pool: np.ndarray
  hard: np.ndarray
  words: tuple[list, list]
  candidates: list | None
  marks: scorers.Marks

  @property
  def searched(self) -> scorers.Tokens:
    return self.tokens._replace(items=self.tokens.items[self.items])

  def at(self, queries):
    return np.searchsorted(self.items, self.gold[queries])


def load_pairs(config, cache: Path) -> data.Pairs:
  d = config.data
  if d.name == "wordnet":
    require_choice("config.data.world", d.world, data.PARTS_OF_SPEECH)
    return data.wordnet_pairs(d.path)
  require_choice("config.data.pairs", d.pairs, PAIRS)
  return PAIRS[d.pairs](corpora.documents(d.name, split=d.split, cache=cache, path=d.path))


def load(config, cache: Path) -> Domain:
  """Worlds are searched or trained on, not both; hard negatives share the mention (WordNet) or many words."""
  c, d = config.data, config.domain
  pairs = load_pairs(config, cache)
  random = np.random.default_rng(config.seed)
  worlds = np.array(pairs.worlds)
  if c.name == "wordnet":
    inside = worlds == c.world
  else:
    order = {world: i for i, world in enumerate(random.permutation(np.unique(worlds)))}
    rank = np.array([order[world] for world in worlds])
    inside = rank <= np.sort(rank)[min(d.size, len(rank)) - 1]
  wanted = d.anchor_queries + d.dev_queries + d.test_queries
  queries = random.permutation(np.flatnonzero(inside[pairs.gold]))[:wanted]
  others = random.permutation(np.setdiff1d(np.flatnonzero(inside), pairs.gold[queries]))
  own = np.unique(pairs.gold[queries])
  items = np.sort(np.concatenate([own, others[: max(d.size - len(own), 0)]]))
  train = np.sort(random.permutation(np.flatnonzero(~inside[pairs.gold]))[: d.train])
  others = random.permutation(np.setdiff1d(np.flatnonzero(~inside), pairs.gold[train]))[: d.train]
  pool = np.union1d(pairs.gold[train], others)
  require(
    len(queries) == wanted and len(items) == d.size and len(pool) > max(config.hard, config.dual.mined),
    f"the text has {int(inside.sum())} items to search and {len(pool)} to train on, {len(queries)} queries for "
    f"{wanted}; lower config.domain or give more text",
  )
  query_words = [data.words(" ".join(q)) for q in pairs.queries]
  item_words = [data.words(" ".join(i)) for i in pairs.items]
  near = baselines.tf_idf_neighbours(
    [query_words[q] for q in train],
    [item_words[i] for i in pool],
    np.searchsorted(pool, pairs.gold[train]),
    count=config.hard,
  )
  hard = pool[near]
  if pairs.candidates is not None:
    for row, q in enumerate(train):
      same = [i for i in pairs.candidates[q] if i != pairs.gold[q]][: config.hard // 2]
      hard[row, : len(same)] = same
  texts = [" ".join(pairs.items[i]) for i in pool] + [" ".join(pairs.queries[q]) for q in train]
  bpe = tokenizer.train(texts, c.vocabulary)
  written = [("", title, f" {description}") for title, description in (pairs.items[i] for i in items)]
  return Domain(
    tokens=scorers.Tokens(
      jnp.asarray(data.encode_queries(bpe, pairs.queries, c.query_tokens)),
      jnp.asarray(data.encode_items(bpe, pairs.items, c.item_tokens)),
    ),
    as_query=data.encode_queries(bpe, written, c.query_tokens),
    gold=pairs.gold,
    items=items,
    anchor=queries[: d.anchor_queries],
    dev=queries[d.anchor_queries : -d.test_queries],
    test=queries[-d.test_queries :],
    train=train,
    pool=pool,
    hard=hard,
    words=(query_words, item_words),
    candidates=pairs.candidates,
    marks=scorers.marks(bpe),
  )
