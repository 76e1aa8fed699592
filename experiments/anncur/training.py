"""The encoders of the experiment: trained on the text, judged on it, and the score matrices they give."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.anncur import baselines
from experiments.anncur import encoders as scorers
from experiments.anncur.domain import Domain
from experiments.overlap import overlapped
from jaxlab.models import TransformerConfig
from jaxlab.tensors import anncur

HEADS = ("emb", "cls")
NAMES = {"emb": "EMB-CE", "cls": "CLS-CE"}


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
