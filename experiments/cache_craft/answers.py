"""Answers, and how far predictions are from those of a full prefill, against the share computed again."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from experiments.cache_craft.methods import FULL, NAIVE, Method, always, at_share, blended, newest, ours
from experiments.cache_craft.requests import Facts, Passages, Query
from experiments.long_context import Subject, paired, sizes_of
from jaxlab.models import inference
from jaxlab.serving.cache_craft import Served, as_cached, craft, everything, serve
from jaxlab.serving.cache_craft_scores import smallest_alpha
from jaxlab.serving.cache_craft_store import ChunkStore

EARLY, NEW, BEST = "tokens stop early", "new chunks count", "as cached, best variant"


class Case(NamedTuple):
  """A query, the store it finds, and its number."""

  store: ChunkStore
  query: Query
  number: int


class Seen(NamedTuple):
  """A query served: predictions float32[answer, vocab] as log-probabilities, and what it took.

  again, moved: tokens computed again of chunks that were cached behind other ones, and all tokens of these; chunk:
  tokens of all chunks.
  """

  logprobs: np.ndarray
  served: Served
  again: int
  moved: int
  chunk: int


_step = jax.jit(inference.step)


def predictions(subject: Subject, served: Served, answer: np.ndarray, room: int) -> np.ndarray:
  """Of every token of the answer, the ones before it read one by one as they are generated."""
  given = np.zeros((1, max(room - 1, 1)), np.int32)  # one shape for answers of all lengths
  given[0, : len(answer) - 1] = answer[:-1]
  behind, _ = _step(subject.network, given, served.state(subject.network))
  logits = jnp.concatenate([served.logits[-1:], behind[0]])[: len(answer)]
  return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))


def seen_by(subject: Subject, method: Method, case: Case, room: int, least: int) -> Seen:
  """One query by one method."""
  answer = np.resize(case.query.answer, room)
  served = method(subject.network, case.store, case.query._replace(answer=answer), case.number, least)
  made, again, moved = served.plan, 0, 0
  for i, choice in enumerate(made.choices):
    known = choice.variant.record.prefix == made.names[:i] if choice.variant else not case.store.of(made.names[i])
    if not known:  # computed whole, where CFO is 1, it counts too
      place = made.groups == i + 1
      again += int(made.computed[place].sum())
      moved += int(place.sum())
  chunk = sum(map(len, case.query.chunks))
  return Seen(predictions(subject, served, case.query.answer, room), served, again, moved, chunk)


def row_of(name: str, found: Sequence[Seen], full: Sequence[Seen], cases: Sequence[Case]) -> dict:
  """{method, right: share of answers (cut: of facts that are), lost: points lost to the full prefill
  and error, kl: mean of the answer's tokens in nats and kl_error, agree: tokens whose likeliest is the full prefill's,
  share: computed again of moved chunks, of_all: of all chunks, layers: token-layers of all, dropped: chunks}."""
  rights = lambda rows: np.array(
    [(row.logprobs.argmax(-1) == case.query.answer).all() for row, case in zip(rows, cases, strict=True)], float
  )
  lost = paired(rights(full), rights(found))
  divergence = [
    float((np.exp(b.logprobs) * (b.logprobs - a.logprobs)).sum(-1).mean()) for a, b in zip(found, full, strict=True)
  ]
  agree = [(a.logprobs.argmax(-1) == b.logprobs.argmax(-1)).mean() for a, b in zip(found, full, strict=True)]
  cut = np.array([case.query.cut for case in cases])
  return {
    "method": name,
    "right": float(rights(found).mean()),
    "cut": float(rights(found)[cut].mean()) if cut.any() else 0.0,
    "lost": 100 * lost["difference"],
    "error": 100 * lost["error"],
    "kl": max(float(np.mean(divergence)), 0.0),
    "kl_error": float(np.std(divergence) / len(divergence) ** 0.5),
    "agree": float(np.mean(agree)),
    "share": sum(s.again for s in found) / max(sum(s.moved for s in found), 1),
    "of_all": sum(s.again for s in found) / max(sum(s.chunk for s in found), 1),
    "layers": sum(s.served.token_layers for s in found) / sum(s.served.of for s in found),
    "dropped": float(np.mean([len(s.served.dropped) for s in found])),
  }


class Table:
  """Rows of methods on the same cases, the full prefill first."""

  def __init__(self, config, subject: Subject, cases: Sequence[Case], room: int, console):
    self._subject, self._cases, self._console = subject, cases, console
    self._sizes = dict(room=room, least=config.least)
    self.full = self._run(always(everything))
    self.rows = {FULL: row_of(FULL, self.full, self.full, cases)}

  def _run(self, method: Method) -> list[Seen]:
    return [seen_by(self._subject, method, case, **self._sizes) for case in self._cases]

  def add(self, methods: Mapping[str, Method]) -> None:
    """Measures them too."""
    for name, method in methods.items():
      self.rows[name] = row = row_of(name, self._run(method), self.full, self._cases)
      said = f"right {row['right']:.3f}, KL {row['kl']:.3g}, again {row['share']:.3f}, layers {row['layers']:.3f}"
      self._console.say(f"  {name}: {said}")

  def within(self, alphas: Sequence[float], share: float) -> float:
    """The largest of the measured alphas that computes at most that share again."""
    return max((a for a in alphas if self.rows[ours(a)]["share"] <= share), default=min(alphas))


def deviation(table: Table, cases: Sequence[Case]) -> dict:
  """How CFO (alpha 1) goes with how far a variant's values are from those of a full prefill.

  Returns:
    {"cfo", "off": of every variant of every chunk that was cached behind others; relative distances in all layers;
    "spearman": their rank correlation, "penalised": that of CFO where new chunks count}.
  """
  shares, penalised, off = [], [], []
  for case, seen in zip(cases, table.full, strict=True):
    made = seen.served.plan
    for i, name in enumerate(made.names):
      for variant in case.store.of(name):
        record, place = variant.record, slice(made.starts[i], made.starts[i + 1])
        if record.prefix == made.names[:i]:
          continue
        parts = zip(variant.parts, seen.served.cached, strict=True)
        pairs = [(np.asarray(part[1]), np.asarray(cached.values[:, 0, place])) for part, cached in parts]
        square = lambda of: sum(float(np.square(of(old, new)).sum()) for old, new in pairs)  # noqa: B023 (used at once)
        off.append((square(lambda old, new: old - new) / square(lambda old, new: new)) ** 0.5)
        shares.append(record.share(made.names[:i]))
        penalised.append(record.share(made.names[:i], penalise_new=True))
  rank = lambda share: float(np.nan_to_num(spearmanr(share, off).statistic)) if len(off) > 2 else 0.0
  keep = np.linspace(0, len(off) - 1, min(len(off), 300)).astype(int)
  some = lambda values: np.round(np.array(values)[keep], 4).tolist()
  return {"cfo": some(shares), "off": some(off), "spearman": rank(shares), "penalised": rank(penalised)}


def facts(config, subject: Subject, console) -> dict:
  """Questions about facts: alpha chosen on some, all methods compared on others, over a store that others filled."""
  f, rng = config.facts, np.random.default_rng(config.seed + 1)
  base = Facts(config, subject)
  store = ChunkStore([subject.tokens.bos], chunks=base.chunks, variants=config.variants, stages=_stages(subject))
  for _ in console.track("filling the store", range(f.warm)):
    query = base.query(rng)
    serve(subject.network, store, query.chunks, query.question, choose=everything, least=config.least)
  draw = lambda count, first: [Case(store, base.query(rng), first + i) for i in range(count)]
  trial, cases = draw(f.validation, 0), draw(f.queries, f.validation)
  alphas = {ours(alpha): always(craft(alpha)) for alpha in config.alphas}
  tried = Table(config, subject, trial, f.answer, console)
  console.say("validation")
  tried.add(alphas)
  alpha = tried.within(config.alphas, config.share)
  quality = {a: tried.rows[ours(a)]["right"] for a in config.alphas}
  target = tried.rows[FULL]["right"] - config.loss
  table = Table(config, subject, cases, f.answer, console)
  console.say(f"alpha {alpha:g}")
  table.add({NAIVE: always(newest), BEST: always(as_cached)} | alphas)
  table.add(_rivals(config, table, alpha))
  return {
    "alpha": alpha,
    "enough": smallest_alpha(config.alphas, quality.get, target),
    "rows": [*table.rows.values()],
    "deviation": deviation(table, cases),
    "stored": len(store),
  }


def _stages(subject: Subject) -> tuple[int, ...]:
  """Tokens may stop at half of the depth."""
  return (len(subject.network.blocks) // 2,)


def _rivals(config, table: Table, alpha: float) -> dict[str, Method]:
  row = table.rows[ours(alpha)]
  rivals = at_share(share=row["share"], of_all=row["of_all"])
  rivals |= {f"CacheBlend {share:g}": blended(share) for share in config.blends}
  rivals[EARLY] = always(craft(alpha), early=True)
  return rivals | {NEW: always(craft(alpha, penalise_new=True))}


def passages(config, subject: Subject, console) -> dict:
  """Real passages: divergence of the answer's tokens, a store for every question, filled by its earlier prompts."""
  p, rng = config.passages, np.random.default_rng(config.seed + 2)
  made, cases = Passages(config, subject), []
  own = sizes_of(p, subject.name)
  for i in console.track("earlier prompts", range(own)):
    store = ChunkStore([subject.tokens.bos], chunks=2 * p.pool, variants=p.histories, stages=_stages(subject))
    earlier, query = made.prompts(i, rng)
    for chunks in earlier:
      serve(subject.network, store, chunks, query.question, choose=everything, least=config.least)
    cases.append(Case(store, query, i))
  table = Table(config, subject, cases, p.answer, console)
  alphas = config.alphas if subject.name == "base" else p.alphas
  table.add({NAIVE: always(newest), BEST: always(as_cached)} | {ours(alpha): always(craft(alpha)) for alpha in alphas})
  alpha = table.within(alphas, config.share)
  rivals = _rivals(config, table, alpha)
  if subject.name != "base":
    rivals = {name: rivals[name] for name in p.rivals}
  table.add(rivals)
  return {"alpha": alpha, "rows": [*table.rows.values()], "deviation": deviation(table, cases)}
