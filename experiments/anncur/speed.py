"""Time of ANNCUR against the number of items, and against its peers in one process."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, timing
from experiments.anncur import encoders as scorers
from experiments.anncur.domain import Domain
from experiments.results import Claim
from jaxlab.tensors import anncur

_K = 10
_ALGEBRA = 20  # repetitions of what takes microseconds, a unit of config.bench.repetitions


def measure(config, domain: Domain, encoders: dict, console) -> dict:
  """{items: seconds of a query by each way, of search and index, and ratios (median, (p10, p90))}.

  Items beyond those there are repeat them: what f and a product cost does not depend on the text. R is noise.
  """
  b, result, searched = config.bench, {}, domain.searched
  noise = np.random.default_rng(config.seed).normal(size=(config.domain.anchor_queries, max(b.sizes)))
  for n in b.sizes:
    r_anc = noise[:, :n].astype(np.float32)
    index = anncur.cur_index(jnp.asarray(r_anc), anncur.draw_anchors(jax.random.key(0), n, b.anchors))
    tokens = searched._replace(items=searched.items[jnp.arange(n) % len(searched.items)])
    queries = time_queries(config, tokens, index, jnp.asarray(domain.test[:1]), encoders)
    algebra = time_algebra(b, r_anc, index)
    row = {name: times.median(name) for times in (queries, algebra) for name in times.seconds}
    pairs = (
      (queries, "ANNCUR", "all items by f"),
      (queries, "ANNCUR", "rerank DE_base"),
      (algebra, "search", "search, NumPy"),
      (algebra, "index", "index, NumPy"),
    )
    result[f"{n}"] = row | {f"{peer} / {ours}": times.speedup(ours, over=peer) for times, ours, peer in pairs}
    console.say(f"{n} items: all by f {row['all items by f']:.3g} s, ANNCUR {row['ANNCUR']:.3g} s")
  return result


def time_queries(config, tokens, index, query, encoders: dict) -> timing.Times:
  """One query: every item by f, the best of DE_base reranked, and ANNCUR with as many calls."""
  b, n = config.bench, len(tokens.items)
  cross, dual = (scorers.cast(encoders[name], config.dtype) for name in ("emb", "DE_base"))
  vectors = scorers.dual_embeddings(dual, tokens.items, item=True)
  scorer = lambda cross, tokens: scorers.cross_scorer(cross, *tokens, tile=config.tile)

  # Encoders and tokens are arguments: as constants of a compiled function they would be copied into it.
  @jax.jit
  def every(cross, tokens, q):
    return anncur.top_k(scorer(cross, tokens)(q[:, None], jnp.arange(n)[None]), _K)

  @jax.jit
  def rerank(cross, dual, tokens, vectors, q):
    s = scorers.embed(dual, tokens.queries[q], item=False) @ vectors.T
    return anncur.rerank(scorer(cross, tokens), q, s, retrieve=b.anchors + b.retrieve, k=_K)

  @jax.jit
  def predict(cross, tokens, index, q):
    return anncur.search(scorer(cross, tokens), q, index, retrieve=b.retrieve, k=_K)

  contestants = {
    "all items by f": functools.partial(every, cross, tokens, query),
    "rerank DE_base": functools.partial(rerank, cross, dual, tokens, vectors, query),
    "ANNCUR": functools.partial(predict, cross, tokens, index, query),
  }
  return timing.compare(contestants, repetitions=b.repetitions, warmup=1)


def time_algebra(b, r_anc: np.ndarray, index: anncur.Index) -> timing.Times:
  """What ANNCUR does besides calls of f, jitted and in NumPy: the index from R, and e E with its largest."""
  e = np.ones((1, b.anchors), np.float32)
  anchors, embeddings = np.asarray(index.anchors), np.asarray(index.embeddings)
  build = jax.jit(lambda r, a: anncur.cur_index(r, a).embeddings)
  search = jax.jit(lambda e, v: anncur.top_k(anncur.cur_scores(e, v), b.retrieve))
  contestants = {
    "search": functools.partial(search, jnp.asarray(e), index.embeddings),
    "search, NumPy": lambda: numpy_search(e, embeddings, b.retrieve),
    "index": functools.partial(build, jnp.asarray(r_anc), index.anchors),
    "index, NumPy": lambda: np.linalg.pinv(r_anc[:, anchors], rcond=0.01) @ r_anc,
  }
  return timing.compare(contestants, repetitions=_ALGEBRA * b.repetitions, warmup=2)


def numpy_search(e, embeddings, retrieve: int):
  """The host's way to the `retrieve` largest of e E, in order."""
  s = e @ embeddings
  best = np.argpartition(-s, retrieve - 1, axis=1)[:, :retrieve]
  order = np.argsort(-np.take_along_axis(s, best, 1), axis=1)
  return np.take_along_axis(best, order, 1)


def claims(config, metrics: dict) -> list[Claim]:
  cost, seconds, students = metrics["cost"], metrics["seconds"], metrics["students"]
  sizes = [int(n) for n in cost]
  last = cost[f"{sizes[-1]}"]
  ratio = lambda ours, peer: dict(ours=last[f"{peer} / {ours}"][0], spread=tuple(last[f"{peer} / {ours}"][1]))
  matrix = seconds["score matrix"]
  distil = min(found["seconds"] for found in students.values())
  budget = config.bench.anchors + config.bench.retrieve
  made = [
    Claim(
      "Seconds to distil a dual encoder over seconds of ANNCUR's index, both with the score matrix", "x", "higher",
      ours=(matrix + distil) / (matrix + seconds["cur index"]), threshold=1.0,
      baseline=f"{matrix + distil:.1f} s, the fastest of {len(students)} ways, each until dev stops gaining",
      note=f"matrix {matrix:.1f} s, distilling {distil:.1f} s, index {seconds['cur index']:.2f} s, with compilation; "
      "recall on dev before and after: "
      + ", ".join(
        f"{name} {found['start']:.3f} and {found['best']:.3f}"
        + (f" ({found['rounds']} rounds at rate {found['rate']:g})" if found["rounds"] else "")
        for name, found in students.items()
      ),
    ),
    Claim(
      "How many times as fast as scoring all items ANNCUR answers a query, most items", "x", "higher",
      **ratio("ANNCUR", "all items by f"), threshold=10.0, baseline=f"{last['all items by f']:.3g} s",
      note=f"{sizes[-1]} items, {budget} calls, {last['ANNCUR'] * 1e3:.1f} ms; as fast as reranking a dual encoder's "
      f"items with as many calls: {last['rerank DE_base / ANNCUR'][0]:.2f} x",
    ),
    Claim(
      "How many times as fast as NumPy the product of scores and embeddings and its largest entries are found", "x",
      "higher", **ratio("search", "search, NumPy"), threshold=1.0, baseline=f"{last['search, NumPy'] * 1e3:.2f} ms",
      note=f"{sizes[-1]} items, the {config.bench.retrieve} largest; matmul and argpartition against matmul and top_k",
    ),
  ]  # fmt: skip
  if len(sizes) > 1:
    power = {name: timing.slope([(n, cost[f"{n}"][name]) for n in sizes]) for name in ("all items by f", "ANNCUR")}
    made.append(
      Claim(
        "Exponent of ANNCUR's time a query against items", "", "lower", ours=power["ANNCUR"], threshold=0.5,
        baseline=f"all items by f {power['all items by f']:.2f}", note=f"{sizes[0]} to {sizes[-1]} items",
      )
    )  # fmt: skip
  return made


def draw(cost: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  sizes = [int(n) for n in cost]
  groups = (
    ("A query", {"all items by f": "o-", "rerank DE_base": "s--", "ANNCUR": "^-"}),
    ("Algebra", {"index": "o-", "index, NumPy": "o--", "search": "^-", "search, NumPy": "^--"}),
  )
  for axis, (title, names) in zip(axes, groups, strict=True):
    for name, style in names.items():
      points = [(n, cost[f"{n}"][name]) for n in sizes]
      axis.loglog(*zip(*points, strict=True), style, label=f"{name}, slope {timing.slope(points):.2f}")
    axis.set(xlabel="items n", ylabel="seconds", title=title)
    axis.set_ylim(top=axis.get_ylim()[1] * 30)  # room for the legend
    axis.legend(fontsize=8, loc="upper left")
  return {figures.save(figure, workdir, "cost"): "Seconds against items: a query, and the algebra of index and search"}
