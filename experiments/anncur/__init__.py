"""ANNCUR: a cross-encoder trained on real text, its score matrix, and who finds its neighbours at equal cost."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.anncur import baselines, data
from experiments.anncur import encoders as scorers
from experiments.anncur import figures as pictures
from experiments.anncur.claims import make_claims
from experiments.anncur.cost import measure_cost
from experiments.overlap import overlapped
from experiments.results import Report
from jaxlab.core.checks import require, require_choice
from jaxlab.data import corpora, tokenizer
from jaxlab.models import TransformerConfig
from jaxlab.tensors import anncur

PAIRS = {"functions": data.function_pairs, "sentences": data.sentence_pairs}
HEADS = ("emb", "cls")


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


def run(config, workdir: Path, cache: Path, console) -> Report:
  check_config(config)
  domain = load_domain(config, cache)
  console.say(
    f"{config.data.name}: {len(domain.items)} items searched, {len(domain.train)} queries and {len(domain.pool)} items "
    "to train on"
  )
  encoders, seconds = train_encoders(config, domain, console)
  encoders = {name: scorers.cast(encoder, config.dtype) for name, encoder in encoders.items()}
  quality = {head: measure_quality(encoders[head], domain, config) for head in HEADS}
  scores, item_scores, pair_rate = score(config, domain, encoders, console)
  retrievers, seconds = make_retrievers(config, domain, encoders, scores["emb"], seconds, pair_rate, console)
  recall = measure_recall(config, domain, scores, item_scores, retrievers, console)
  errors = measure_errors(config, scores)
  spectrum = {head: measure_spectrum(scores[head]) for head in HEADS}
  cost = measure_cost(config, domain.searched, domain.test[:1], encoders, console)
  metrics = {
    "quality": quality,
    "pairs_per_second": pair_rate,
    "seconds": seconds,
    "recall": recall["recall"],
    "oracle_split": recall["oracle"],
    "shares": recall["shares"],
    "errors": errors,
    "spectrum": {head: {k: v for k, v in row.items() if k != "singular values"} for head, row in spectrum.items()},
    "cost": cost,
  }
  files = {
    pictures.draw_recall(
      config, metrics["recall"], workdir
    ): "Share of the cross-encoder's top k found, by calls of it",
    pictures.draw_errors(config, errors, workdir): "Error of the predicted scores by anchor items",
    pictures.draw_spectrum(spectrum, workdir): "Singular values of the score matrices without column means",
    pictures.draw_cost(cost, workdir): "Seconds against items: a query, and the algebra of index and search",
  }
  return Report(metrics, make_claims(config, metrics), files)


def check_config(config) -> None:
  s, d = config.search, config.domain
  require(s.budget in s.budgets, f"search.budget={s.budget} must be one of search.budgets {tuple(s.budgets)}")
  require(set(s.claimed) <= set(s.ks) and 1 in s.ks, f"search.claimed {tuple(s.claimed)} and 1 must be in search.ks")
  require(
    max(s.ks) <= min(s.budgets) <= max(s.budgets) < d.size,
    f"search.budgets {tuple(s.budgets)} must lie between the largest k, {max(s.ks)}, and domain.size={d.size}",
  )
  require(
    min(s.budgets) * min(s.shares) >= s.rounds,
    f"search.rounds={s.rounds} exceeds the anchors of the smallest budget; lower it",
  )
  require(
    config.errors.seeds >= 1 and s.seeds >= 1 and all(0 < share < 1 for share in s.shares),
    "search.shares must lie between 0 and 1, seeds must be at least 1",
  )
  require(
    max(config.errors.anchors) <= d.size and d.anchor_queries in config.errors.anchors,
    f"errors.anchors must hold domain.anchor_queries={d.anchor_queries} and not exceed domain.size={d.size}",
  )


def load_pairs(config, cache: Path) -> data.Pairs:
  d = config.data
  if d.name == "wordnet":
    require_choice("config.data.world", d.world, data.PARTS_OF_SPEECH)
    return data.wordnet_pairs(d.path)
  require_choice("config.data.pairs", d.pairs, PAIRS)
  return PAIRS[d.pairs](corpora.documents(d.name, split=d.split, cache=cache, path=d.path))


def load_domain(config, cache: Path) -> Domain:
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


def train_encoders(config, domain: Domain, console) -> tuple[dict, dict]:
  """A dual encoder with negatives of its batch; from it both cross-encoders, and DE_base with mined negatives."""
  switches = dict(embed_norm=True, qk_norm="before_rope", tied_embeddings=True)
  shape = TransformerConfig(vocab_size=config.data.vocabulary, **config.shape, **switches)
  keys = dict(
    zip(("init", "pretrained", *HEADS, "DE_base"), jax.random.split(jax.random.key(config.seed), 5), strict=True)
  )
  gold = domain.gold[domain.train]

  def batches(random, c, steps, encoder=None):
    hard = domain.hard
    if encoder is not None:
      hard = scorers.mine_negatives(encoder, domain.tokens, domain.train, gold, domain.pool, top=c.mined)
    return scorers.gold_batches(
      random, domain.train, gold, domain.pool, hard, steps=steps, batch=c.batch, candidates=c.candidates
    )

  seconds = {}

  def fit(name, encoder, loss, c, mined=False):
    start = time.perf_counter()
    steps, rate = (c[field][name] if name in HEADS else c[field] for field in ("steps", "rate"))
    random = np.random.default_rng([config.seed, *name.encode()])
    make = lambda encoder, epoch: batches(random, c, steps, encoder if mined else None)
    encoder, losses = scorers.train(
      encoder, loss, domain.tokens, make, keys[name], epochs=c.epochs, steps=steps, rate=rate, dtype=config.dtype
    )
    losses = np.asarray(losses)
    seconds[name] = time.perf_counter() - start
    last = losses[-max(len(losses) // 10, 1) :].mean()
    console.say(f"{name}: loss {losses[0]:.3f} -> {last:.3f} in {seconds[name]:.0f} s")
    return encoder

  def from_pretrained(name):
    if name == "DE_base":
      return fit(name, encoders["pretrained"], scorers.dual_loss, config.dual, mined=True)
    start = scorers.with_head(encoders["pretrained"], name, keys[name])
    return fit(name, start, scorers.cross_loss, config.cross)

  first = jax.jit(lambda key: scorers.Encoder(shape, key, head="dual", marks=domain.marks))(keys["init"])
  encoders = {"pretrained": fit("pretrained", first, scorers.dual_loss, config.pretrain)}
  names = (*HEADS, "DE_base")
  return encoders | dict(zip(names, overlapped(from_pretrained, names), strict=True)), seconds


def measure_quality(encoder, domain: Domain, config) -> dict:
  """Accuracy among the gold item and its TF-IDF neighbours; WordNet: among the lemma's synsets."""
  f = scorers.cross_scorer(encoder, *domain.tokens, tile=config.tile)
  chosen = np.concatenate([domain.dev, domain.test])
  near = baselines.tf_idf_neighbours(
    [domain.words[0][q] for q in chosen], [domain.words[1][i] for i in domain.items], domain.at(chosen), count=15
  )
  items = np.concatenate([domain.gold[chosen][:, None], domain.items[near]], 1)
  accuracy = lambda queries: float(np.mean(np.argmax(f(queries[:, None], items), 1) == 0))
  result = {
    "accuracy of 16": accuracy(chosen),
    "with another's query": accuracy(np.roll(chosen, 1)),
    "chance": 1 / 16,
  }
  if domain.candidates is not None:
    senses = [domain.candidates[q] for q in chosen]
    # One rectangle: rows are filled up with their first sense, which the first argmax finds at its own place.
    width = max(map(len, senses))
    filled = np.array([s + s[:1] * (width - len(s)) for s in senses])
    best = np.take_along_axis(filled, np.argmax(f(chosen[:, None], filled), 1)[:, None], 1)[:, 0]
    result["same lemma"] = {
      "accuracy": float(np.mean(best == domain.gold[chosen])),
      "most frequent sense": float(np.mean([s[0] for s in senses] == domain.gold[chosen])),
      "chance": float(np.mean([1 / len(s) for s in senses])),
    }
  return result


def score(config, domain: Domain, encoders, console) -> tuple[dict, tuple[np.ndarray, np.ndarray], float]:
  """Rows of anchor, dev and test queries by both heads (CLS-CE and EMB-CE), item-item rows, and pairs a second."""
  n, queries = np.arange(len(domain.items)), np.concatenate([domain.anchor, domain.dev, domain.test])
  start, scores = time.perf_counter(), {}
  for head in console.track("score matrix", HEADS):
    f = scorers.cross_scorer(encoders[head], *domain.searched, tile=config.tile)
    scores[head] = np.asarray(anncur.score_matrix(f, queries, n))
  rows = np.asarray(anncur.draw_anchors(jax.random.key(config.seed), len(n), len(domain.anchor)))
  f = scorers.cross_scorer(encoders["emb"], jnp.asarray(domain.as_query), domain.searched.items, tile=config.tile)
  item_scores = np.asarray(anncur.score_matrix(f, rows, n))
  pairs = sum(s.size for s in (*scores.values(), item_scores))
  rate = pairs / (time.perf_counter() - start)
  console.say(f"{pairs} pairs scored, {rate:.0f} a second")
  return scores, (rows, item_scores), rate


def make_retrievers(config, domain: Domain, encoders, scores, seconds: dict, rate: float, console):
  """Approximate scores (dev and test queries, items) of all that is reranked; seconds of index and distilling."""
  queries, r_anc = np.concatenate([domain.dev, domain.test]), jnp.asarray(scores[: len(domain.anchor)])
  words = [domain.words[0][q] for q in queries], [domain.words[1][i] for i in domain.items]
  local = domain.searched

  def dual(encoder):
    q = scorers.dual_embeddings(encoder, local.queries[queries], item=False)
    return q @ scorers.dual_embeddings(encoder, local.items, item=True).T

  c, random = config.distil, np.random.default_rng(config.seed)
  retrievers = {
    "TF-IDF": baselines.tf_idf(*words),
    "BM25": baselines.bm25(*words),
    "DE_base": dual(encoders["DE_base"]),
  }
  distil = {
    "MATCH": functools.partial(baselines.match_batches, top=c.top),
    "TRP": baselines.trp_batches,
  }
  seconds = seconds | {"score matrix": r_anc.size / rate}
  for name, batches in distil.items():
    make = lambda encoder, epoch, b=batches: b(random, domain.anchor, np.asarray(r_anc), steps=c.steps, batch=c.batch)
    start, student = time.perf_counter(), scorers.cast(encoders["DE_base"], "float32")
    student, _ = scorers.train(
      student, scorers.match_loss, local, make, jax.random.key(1),
      epochs=c.epochs, steps=c.steps, rate=c.rate, dtype=config.dtype,
    )  # fmt: skip
    retrievers[f"DE distilled, {name}"] = jax.block_until_ready(dual(scorers.cast(student, config.dtype)))
    seconds[f"distil {name}"] = time.perf_counter() - start
    console.say(f"distilled with {name} in {seconds[f'distil {name}']:.0f} s")
  anchors = anncur.draw_anchors(jax.random.key(0), r_anc.shape[1], config.search.budget // 2)
  start = time.perf_counter()
  jax.block_until_ready(anncur.cur_index(r_anc, anchors))
  seconds["cur index"] = time.perf_counter() - start
  retrievers["mean score"] = jnp.broadcast_to(r_anc.mean(0), (len(queries), r_anc.shape[1]))
  retrievers["random"] = random.random((len(queries), r_anc.shape[1]), np.float32)
  embeddings = scorers.dual_embeddings(encoders["DE_base"], local.items, item=True)
  return {name: jnp.asarray(s) for name, s in retrievers.items()} | {"item vectors": embeddings}, seconds


@functools.partial(jax.jit, static_argnames=("ks", "retrieve", "strength", "inverse"))
def recall_of_anchors(r_anc, exact, anchors, *, ks, retrieve, strength, inverse=True):
  """Recall (seeds, k, queries) of `search` by the anchors (seeds, k_i); `inverse` False: s = e R[A], R item-item."""

  def one(chosen):
    e = exact[:, chosen]
    embeddings = anncur.cur_index(r_anc, chosen, strength=strength).embeddings if inverse else r_anc
    s = anncur.cur_scores(e, embeddings)
    return anncur.evaluate(exact, s, ks=ks, retrieves=(retrieve,), anchors=chosen)[:, 0]

  return jax.lax.map(one, anchors)


def measure_recall(config, domain: Domain, scores, item_scores, retrievers: dict, console) -> dict:
  """Recall of every method at every budget; the split of the budget is the best on dev, and for the record on test."""
  s, n = config.search, len(domain.items)
  cut, dev = len(domain.anchor), len(domain.dev)
  r_anc, exact = (jnp.asarray(part) for part in np.split(scores["emb"], [cut]))
  cls = [jnp.asarray(part) for part in np.split(scores["cls"], [cut])]
  ks, rows = tuple(s.ks), jnp.asarray(item_scores[0])
  item_rows = jnp.asarray(item_scores[1])
  keys = [jax.random.key(config.seed + 100 + seed) for seed in range(s.seeds)]
  vectors = retrievers["item vectors"]
  table, oracle, shares = {}, {}, {}

  def record(name, budget, by_share):
    """by_share: {share: (k, queries)}; dev queries come first."""
    mean = {share: (r[:, :dev].mean(1), r[:, dev:].mean(1)) for share, r in by_share.items()}
    for i, k in enumerate(ks):
      best = max(mean, key=lambda share: mean[share][0][i])
      put = lambda to, value, k=k: to.setdefault(name, {}).setdefault(f"k={k}", {}).update({f"C={budget}": value})
      put(table, float(mean[best][1][i]))
      put(oracle, float(max(test[i] for _, test in mean.values())))
      put(shares, best)

  def of_share(budget, share):
    """{method: recall (k, queries)} with that share of the budget on anchors."""
    k_i = int(share * budget) // s.rounds * s.rounds
    options = dict(ks=ks, retrieve=budget - k_i, strength=s.strength)
    uniform = jnp.stack([anncur.draw_anchors(key, n, k_i) for key in keys])
    clusters = jnp.stack([baselines.cluster_anchors(key, vectors, k_i) for key in keys])
    ways = {
      "ANNCUR": (r_anc, exact, uniform),
      "ANNCUR, cluster anchors": (r_anc, exact, clusters),
      "ANNCUR on CLS-CE": (*cls, uniform),
      "fixed_anc_ent_cur": (item_rows, exact, uniform),
    }
    found = {name: np.asarray(recall_of_anchors(*way, **options).mean(0)) for name, way in ways.items()}
    if k_i <= len(rows):
      part = jnp.stack([jnp.sort(jax.random.permutation(key, len(rows))[:k_i]) for key in keys])
      each = [recall_of_anchors(item_rows[p], exact, rows[p][None], inverse=False, **options)[0] for p in part]
      found["fixed_anc_ent"] = np.asarray(jnp.stack(each).mean(0))
    return found | adaptive(config, r_anc, exact, retrievers, keys, k_i=k_i, retrieve=budget - k_i)

  for budget in console.track("recall", list(s.budgets)):
    for name, approximate in retrievers.items():
      if name != "item vectors":
        r = np.asarray(anncur.evaluate(exact, approximate, ks=ks, retrieves=(budget,))[:, 0])
        record(name, budget, {1.0: r})
    found = {}
    for share, by_name in zip(s.shares, overlapped(functools.partial(of_share, budget), s.shares), strict=True):
      for name, r in by_name.items():
        found.setdefault(name, {})[share] = r
    for name, by_share in found.items():
      record(name, budget, by_share)
  return {"recall": table, "oracle": oracle, "shares": shares}


def adaptive(config, r_anc, exact, retrievers, keys, *, k_i: int, retrieve: int) -> dict:
  """ADACUR from random and from the dual encoder's first anchors, sampled, and AXN: recall (k, queries) of each."""
  s, (queries, n) = config.search, exact.shape
  slots = k_i // s.rounds
  f = lambda q, i: exact[q, i]
  best = [anncur.top_k(exact, k)[1] for k in s.ks]

  @functools.partial(jax.jit, static_argnames="sample")
  def one(vectors, first, key, sample):
    found = anncur.adacur(
      f, jnp.arange(queries), vectors, first, rounds=s.rounds, retrieve=retrieve, k=max(s.ks),
      strength=s.strength, key=key if sample else None,
    )  # fmt: skip
    return jnp.stack([anncur.recall(found.items[:, :k], top) for k, top in zip(s.ks, best, strict=True)])

  draw = lambda key: jax.vmap(lambda q: anncur.draw_anchors(q, n, slots))(jax.random.split(key, queries))
  start = anncur.top_k(retrievers["DE_base"], slots)[1]
  mean = lambda rows: np.asarray(jnp.stack(rows).mean(0))
  return {
    "ADACUR": mean([one(r_anc, draw(key), key, False) for key in keys]),
    "ADACUR, sampled": mean([one(r_anc, draw(key), key, True) for key in keys]),
    "ADACUR, first by DE_base": mean([one(r_anc, start, keys[0], False)]),
    "AXN (item vectors of DE_base)": mean([one(retrievers["item vectors"].T, start, keys[0], False)]),
  }


def measure_errors(config, scores) -> dict:
  """Relative error of test queries' predicted scores by k_i: both heads, regularised or not, and the two oracles."""
  cut = config.domain.anchor_queries
  first = cut + config.domain.dev_queries
  ways = {"ridge": dict(strength=config.search.strength), "rcond 0.01": dict(method="rcond", strength=0.01)}
  ways["bare"] = dict(method="rcond", strength=float(np.finfo(np.float32).eps))
  result = {head: {name: {} for name in ways} for head in HEADS}

  @functools.partial(jax.jit, static_argnames="way")
  def error(m, anchors, way):
    def one(chosen):
      index = anncur.cur_index(m[:cut], chosen, **ways[way])
      return relative(anncur.cur_scores(m[first:, chosen], index.embeddings), m[first:])

    return jax.lax.map(one, anchors).mean()

  def of_size(k_i):
    """{(head, way): error} at one number of anchors."""
    keys = [jax.random.key(config.seed + 200 + i) for i in range(config.errors.seeds)]
    drawn = jnp.stack([anncur.draw_anchors(key, config.domain.size, k_i) for key in keys])
    found = {(head, way): error(jnp.asarray(scores[head]), drawn, way) for head in HEADS for way in ways}
    m = jnp.asarray(scores["emb"])
    found["emb", "CUR oracle"] = relative(baselines.cur_oracle(m, jnp.arange(cut), drawn[0])[first:], m[first:])
    if k_i < len(m) - first:
      found["emb", "SVD of the test matrix"] = relative(baselines.truncated_svd(m[first:], k_i), m[first:])
    return found

  for head in HEADS:
    m = jnp.asarray(scores[head])
    result[head]["mean score"] = float(relative(m[:cut].mean(0), m[first:]))
  for k_i, found in zip(config.errors.anchors, overlapped(of_size, config.errors.anchors), strict=True):
    for (head, way), value in found.items():
      result[head].setdefault(way, {})[f"{k_i}"] = float(value)
  return result


@jax.jit
def relative(predicted, exact):
  """||predicted - exact|| / ||exact||."""
  return jnp.linalg.norm(predicted - exact) / jnp.linalg.norm(exact)


def measure_spectrum(m) -> dict:
  """Singular values, and the effective rank exp(entropy of s / sum s), of the matrix and of it without column means."""
  result = {}
  for name, part in (("raw", m), ("centred", m - m.mean(0))):
    s = np.linalg.svd(np.asarray(part, np.float64), compute_uv=False)
    p = s[s > 0] / s.sum()
    result[name] = float(np.exp(-np.sum(p * np.log(p))))
    if name == "centred":
      result["singular values"] = s / s[0]
  return result
