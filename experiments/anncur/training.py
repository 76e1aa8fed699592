"""The encoders of the experiment: trained on the text, judged on it, and the score matrices they give."""

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
# The batches of a student: of the teacher's best items alone, as the paper has it, and with others drawn at random.
DISTILLED = {
  "MATCH": lambda random, queries, teacher, c: baselines.match_batches(
    random, queries, teacher, steps=c.steps, batch=c.batch, top=c.top
  ),
  "TRP": lambda random, queries, teacher, c: baselines.trp_batches(
    random, queries, teacher, steps=c.steps, batch=c.batch
  ),
  "MATCH with random items": lambda random, queries, teacher, c: baselines.match_batches(
    random, queries, teacher, steps=c.steps, batch=c.batch, top=c.top, others=c.top
  ),
}


def train_encoders(config, domain: Domain, console) -> tuple[dict, dict]:
  """A dual encoder with negatives of its batch; from it both cross-encoders, and DE_base with mined negatives."""
  keys = dict(zip(("init", "pretrained", *HEADS, "DE_base"), _keys(config), strict=True))
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

  first = untrained(config, domain)["DE_base"]
  encoders = {"pretrained": fit("pretrained", first, scorers.dual_loss, config.pretrain)}
  names = (*HEADS, "DE_base")
  return encoders | dict(zip(names, overlapped(from_pretrained, names), strict=True)), seconds


def _keys(config):
  return jax.random.split(jax.random.key(config.seed), 3 + len(HEADS))


def untrained(config, domain: Domain) -> dict:
  """The dual encoder that all training starts from, and a cross-encoder of its body."""
  switches = dict(embed_norm=True, qk_norm="before_rope", tied_embeddings=True)
  shape = TransformerConfig(vocab_size=config.data.vocabulary, **config.shape, **switches)
  first = jax.jit(lambda key: scorers.Encoder(shape, key, head="dual", marks=domain.marks))(_keys(config)[0])
  return {"DE_base": first, "emb": scorers.with_head(first, "emb", _keys(config)[2])}


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
  """Approximate scores (dev and test queries, items) of all that is reranked; seconds of index and distilling; what
  `distil` found. A student is chosen on the dev queries, as the split of a budget is.
  """
  queries, r_anc = np.concatenate([domain.dev, domain.test]), jnp.asarray(scores[: len(domain.anchor)])
  words = [domain.words[0][q] for q in queries], [domain.words[1][i] for i in domain.items]
  local = domain.searched

  def dual(encoder):
    q = scorers.dual_embeddings(encoder, local.queries[queries], item=False)
    return q @ scorers.dual_embeddings(encoder, local.items, item=True).T

  retrievers = {
    "TF-IDF": baselines.tf_idf(*words),
    "BM25": baselines.bm25(*words),
    "DE_base": dual(encoders["DE_base"]),
  }
  seconds, students = seconds | {"score matrix": r_anc.size / rate}, {}
  exact = jnp.asarray(scores[len(domain.anchor) :][: len(domain.dev)])
  validate = lambda student: recall_on(exact, dual(scorers.cast(student, config.dtype))[: len(exact)], config.search)
  for name in DISTILLED:
    start = time.perf_counter()
    student, students[name] = distil(config, domain, name, encoders["DE_base"], np.asarray(r_anc), validate)
    retrievers[f"DE distilled, {name}"] = jax.block_until_ready(dual(scorers.cast(student, config.dtype)))
    seconds[f"distil {name}"] = time.perf_counter() - start
    found = students[name]
    console.say(
      f"distilled with {name} in {seconds[f'distil {name}']:.0f} s: {found['start']:.3f} -> {found['best']:.3f}"
    )
  anchors = anncur.draw_anchors(jax.random.key(0), r_anc.shape[1], config.search.budget // 2)
  start = time.perf_counter()
  jax.block_until_ready(anncur.cur_index(r_anc, anchors))
  seconds["cur index"] = time.perf_counter() - start
  retrievers["mean score"] = jnp.broadcast_to(r_anc.mean(0), (len(queries), r_anc.shape[1]))
  random = np.random.default_rng(config.seed).random((len(queries), r_anc.shape[1]), np.float32)
  retrievers["random"] = random
  embeddings = scorers.dual_embeddings(encoders["DE_base"], local.items, item=True)
  return {name: jnp.asarray(s) for name, s in retrievers.items()} | {"item vectors": embeddings}, seconds, students


def recall_on(exact, approximate, search) -> float:
  """Mean recall over all k and budgets of reranking: what a student is chosen by."""
  by_k = anncur.evaluate(exact, approximate, ks=tuple(search.ks), retrieves=tuple(search.budgets)).mean(-1)
  fair = np.array(search.ks)[:, None] <= np.array(search.budgets)
  return float(np.asarray(by_k)[fair].mean())


def distil(config, domain: Domain, name: str, first, teacher, validate) -> tuple:
  """The student that is best on validation, from DE_base: (student, what each rate reached).

  Every rate trains in rounds, each a warm-up and a fall to 0, until `patience` rounds in a row bring nothing. DE_base
  itself counts, so that no student ends below its start on the queries it is chosen by.
  """
  c, random, start = config.distil, np.random.default_rng(config.seed), scorers.cast(first, "float32")
  make = lambda encoder, epoch: DISTILLED[name](random, domain.anchor, teacher, c)
  best, value = start, validate(start)
  found = {"start": value, "best": value, "rate": 0.0, "rounds": 0, "reached": {}}
  for rate in c.rates:
    student, top, stale, done = start, found["start"], 0, 0
    while stale < c.patience and done < c.rounds:
      student, _ = scorers.train(
        student, scorers.match_loss, domain.searched, make, jax.random.key(done), epochs=1, steps=c.steps, rate=rate,
        dtype=config.dtype,
      )  # fmt: skip
      value, done = validate(student), done + 1
      stale = 0 if value > top else stale + 1
      top = max(top, value)
      if value > found["best"]:
        best = student
        found |= {"best": value, "rate": rate, "rounds": done}
    found["reached"][f"{rate:g}"] = {"best": top, "rounds": done}
  return best, found
