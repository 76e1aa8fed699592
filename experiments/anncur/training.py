"""The encoders of the experiment: trained on the text, judged on it, and the score matrices they give."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.anncur import baselines
from experiments.anncur import encoders as scorers
from experiments.anncur.domain import Domain
from experiments.overlap import overlapped
from jaxlab.models import TransformerConfig
from jaxlab.tensors import anncur

HEADS = ("emb", "cls")
_ENCODERS = "encoders.npz"
NAMES = {"emb": "EMB-CE", "cls": "CLS-CE"}
STUDENTS = {"match": "MATCH", "trp": "TRP", "match_random": "MATCH on random items"}


class Kept(NamedTuple):
  """Scores of `score` by head, item-item scores of the items `rows`, DE_base in float32, its vectors of the items."""

  scores: dict[str, np.ndarray]
  rows: np.ndarray
  item_scores: np.ndarray
  dual: scorers.Encoder
  item_vectors: jax.Array


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


def train_and_score(config, domain: Domain, workdir: Path, console) -> dict:
  """Trains the encoders; what follows them needs is kept as arrays: the scores they give, and DE_base."""
  encoders, seconds = train_encoders(config, domain, console)
  computing = {name: scorers.cast(encoder, config.dtype) for name, encoder in encoders.items()}
  quality = {head: measure_quality(computing[head], domain, config) for head in HEADS}
  arrays, rate = score(config, domain, computing, console)
  leaves = jax.tree.leaves(encoders["DE_base"])
  arrays |= {f"DE_base.{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
  results.keep_arrays(workdir / _ENCODERS, arrays)
  r_anc = jnp.asarray(arrays["emb"][: len(domain.anchor)])
  anchors = anncur.draw_anchors(jax.random.key(0), r_anc.shape[1], config.search.budget // 2)
  start = time.perf_counter()
  jax.block_until_ready(anncur.cur_index(r_anc, anchors))
  seconds |= {"score matrix": r_anc.size / rate, "cur index": time.perf_counter() - start}
  return {"quality": quality, "pairs_per_second": rate, "seconds": seconds}


def score(config, domain: Domain, encoders, console) -> tuple[dict[str, np.ndarray], float]:
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
  return {**scores, "rows": rows, "item_scores": item_scores}, rate


def kept(config, domain: Domain, workdir: Path) -> Kept:
  """What `train_and_score` kept."""
  arrays = results.kept_arrays(workdir / _ENCODERS, "remove encoders.part.json to train again")
  structure = jax.tree.structure(jax.eval_shape(lambda: untrained(config, domain)["DE_base"]))
  leaves = [jnp.asarray(arrays[f"DE_base.{i}"]) for i in range(structure.num_leaves)]
  encoder = jax.tree.unflatten(structure, leaves)
  vectors = scorers.dual_embeddings(scorers.cast(encoder, config.dtype), domain.searched.items, item=True)
  return Kept({head: arrays[head] for head in HEADS}, arrays["rows"], arrays["item_scores"], encoder, vectors)


def dual_scores(config, domain: Domain, encoder) -> jax.Array:
  """Scores (dev and test queries, items) by a dual encoder."""
  encoder, queries = scorers.cast(encoder, config.dtype), np.concatenate([domain.dev, domain.test])
  q = scorers.dual_embeddings(encoder, domain.searched.queries[queries], item=False)
  return q @ scorers.dual_embeddings(encoder, domain.searched.items, item=True).T


def retrievers(config, domain: Domain, kept: Kept, workdir: Path) -> dict:
  """Approximate scores (dev and test queries, items) of all whose best are reranked."""
  queries, r_anc = np.concatenate([domain.dev, domain.test]), kept.scores["emb"][: len(domain.anchor)]
  words = [domain.words[0][q] for q in queries], [domain.words[1][i] for i in domain.items]
  shape = len(queries), len(domain.items)
  made = {
    "TF-IDF": baselines.tf_idf(*words),
    "BM25": baselines.bm25(*words),
    "DE_base": dual_scores(config, domain, kept.dual),
    "mean score": np.broadcast_to(r_anc.mean(0), shape),
    "random": np.random.default_rng(config.seed).random(shape, np.float32),
  }
  for way, name in STUDENTS.items():
    arrays = results.kept_arrays(workdir / f"student.{way}.npz", f"remove student.{way}.part.json to distil again")
    made[f"DE distilled, {name}"] = arrays["scores"]
  return {name: jnp.asarray(s) for name, s in made.items()}


def recall_on(exact, approximate, search) -> float:
  """Mean recall over all k and budgets of reranking: what a student is chosen by."""
  by_k = anncur.evaluate(exact, approximate, ks=tuple(search.ks), retrieves=tuple(search.budgets)).mean(-1)
  fair = np.array(search.ks)[:, None] <= np.array(search.budgets)
  return float(np.asarray(by_k)[fair].mean())


def distil_and_score(config, domain: Domain, way: str, kept: Kept, workdir: Path, console) -> dict:
  """The student that `distil` finds, chosen on the dev queries as the split of a budget is; its scores are kept."""
  start, cut = time.perf_counter(), len(domain.anchor)
  teacher = kept.scores["emb"][:cut]
  exact = jnp.asarray(kept.scores["emb"][cut:][: len(domain.dev)])
  validate = lambda student: recall_on(exact, dual_scores(config, domain, student)[: len(exact)], config.search)
  student, found = distil(config, domain, way, kept.dual, teacher, validate)
  scores = np.asarray(dual_scores(config, domain, student))
  found["seconds"] = time.perf_counter() - start
  results.keep_arrays(workdir / f"student.{way}.npz", {"scores": scores})
  console.say(f"distilled, {STUDENTS[way]}, in {found['seconds']:.0f} s: {found['start']:.3f} -> {found['best']:.3f}")
  return found


def distil(config, domain: Domain, way: str, first, teacher, validate) -> tuple:
  """The student that is best on validation, from DE_base: (student, what each rate reached).

  Every rate trains in rounds, each a warm-up and a fall to 0, until `patience` rounds in a row bring nothing. DE_base
  itself counts, so that no student ends below its start on the queries it is chosen by.
  """
  c, random, value = config.distil, np.random.default_rng(config.seed), validate(first)
  make = lambda encoder, epoch: student_batches(random, way, domain.anchor, teacher, c)
  best, found = first, {"start": value, "best": value, "rate": 0.0, "rounds": 0, "reached": {}}
  for rate in c.rates:
    student, top, stale, done = first, found["start"], 0, 0
    while stale < c.patience and done < c.rounds:
      student, _ = scorers.train(
        student, scorers.match_loss, domain.searched, make, jax.random.key(done), epochs=1,
        steps=c.shared.steps if way == "match_random" else c.steps, rate=rate, dtype=config.dtype,
      )  # fmt: skip
      value, done = validate(student), done + 1
      stale = 0 if value > top else stale + 1
      top = max(top, value)
      if value > found["best"]:
        best = student
        found |= {"best": value, "rate": rate, "rounds": done}
    found["reached"][f"{rate:g}"] = {"best": top, "rounds": done}
  return best, found


def student_batches(random, way: str, queries, teacher, c) -> dict:
  """Of the teacher's best items alone, as the paper has it (MATCH, TRP), or of items at random."""
  if way == "match_random":
    return baselines.shared_batches(random, queries, teacher, **c.shared)
  options = dict(steps=c.steps, batch=c.batch)
  if way == "trp":
    return baselines.trp_batches(random, queries, teacher, **options)
  return baselines.match_batches(random, queries, teacher, top=c.top, **options)
