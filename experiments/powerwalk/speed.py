"""How fast queries are answered: together, one at a time, and beside power iteration; and how cost grows with edges."""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.ticker
import networkx
import numpy as np

from experiments import figures, timing
from experiments.powerwalk import baselines
from experiments.powerwalk.accuracy import equal_l1, fewest_passes, first
from experiments.results import Claim
from jaxlab.graphs import common, fingerprints, powerwalk

# Power iteration that starts from the source, S + F: what online-only answers are worth at the same passes.
POWER = ("power iteration, equal RAG", "scipy power iteration, equal RAG")
CAPPED = "batch, equal RAG, fewest passes"
EQUAL_L1 = "power iteration, equal L1"  # to the L1 of `bench.steps` and the index


def measure(config, graph, found: dict, caps: dict, console) -> dict:
  """Queries a second: together, one at a time, and by power iteration of equal RAG, ours, scipy's, networkx's.

  Args:
    found, caps: what `accuracy.measure` and `accuracy.caps` found on this graph.
  """
  a, b = config.accuracy, config.bench
  batch = min(b.batch, graph.nodes)
  sources = np.random.default_rng(config.seed + 1).choice(graph.nodes, batch, replace=False).astype(np.int32)
  index = fingerprints.build_index(graph, jax.random.key(config.seed), walks=a.main, length=a.length, cap=a.cap)
  alike = math.ceil(equal_l1(config, found, b.steps))
  steps, online = (min(found["passes"][name], a.most_steps) for name in ("index", "power iteration"))
  transposed = baselines.transition(graph).T.tocsr().astype(np.float32)
  edges = list(zip(*(np.asarray(x).tolist() for x in (graph.in_sources, graph.in_targets)), strict=True))
  other = networkx.DiGraph(edges)
  at_once = lambda t: powerwalk.query(jnp.asarray(sources), graph, index, steps=t)
  # One by one on a part of the batch, scaled: they take long.
  few = sources[: max(batch // 8, 1)]
  single = lambda u: jax.block_until_ready(powerwalk.query(jnp.asarray([u]), graph, index, steps=b.steps))
  contestants = {
    "batch": (batch, lambda: at_once(b.steps)),
    "one by one": (len(few), lambda: [single(u) for u in few]),
    "batch, equal RAG": (batch, lambda: at_once(steps)),
    POWER[0]: (batch, lambda: powerwalk.exact(jnp.asarray(sources), graph, iterations=online)),
    EQUAL_L1: (batch, lambda: powerwalk.exact(jnp.asarray(sources), graph, iterations=alike)),
    POWER[1]: (batch, lambda: baselines.scipy_power(sources, transposed, iterations=online)),
    "networkx pagerank": (1, lambda: list(networkx.pagerank(other, alpha=0.85, personalization={int(sources[0]): 1}))),
  }
  best = fewest_passes(caps)
  if best is not None:
    walks, cap, least = (best[1][name] for name in ("walks", "cap", "steps"))
    capped = fingerprints.build_index(graph, jax.random.key(config.seed), walks=walks, length=a.length, cap=cap)
    contestants[CAPPED] = batch, lambda: powerwalk.query(jnp.asarray(sources), graph, capped, steps=least)
  console.say(f"timing {len(contestants)} ways to answer {batch} queries")
  times = timing.compare({n: call for n, (_, call) in contestants.items()}, repetitions=b.repetitions, warmup=1)
  rate = {name: queries / times.median(name) for name, (queries, _) in contestants.items()}
  spread = (times.seconds["one by one"] / len(few)) / (times.seconds["batch"] / batch)
  return {
    "queries_per_second": rate,
    "capped": best and best[0],
    "steps": {"timed": b.steps, "equal RAG": steps, "power iteration": online, EQUAL_L1: alike},
    "batched_over_single": rate["batch"] / rate["one by one"],
    "spread": np.percentile(spread, [10, 90]).tolist(),
  }


def measure_size(config, nodes: int, console) -> dict:
  """Seconds of the index and of all queries on one R-MAT graph, by the index and by power iteration of equal RAG.

  Sources have out-edges: most R-MAT vertices have none, and the answer to those is the source. All pick the top k;
  scipy answers few queries, scaled.
  """
  a, c = config.accuracy, config.scaling
  start = time.perf_counter()
  raw = common.load("rmat", nodes=nodes, degree=c.degree, directed=True, seed=config.seed)
  graph = fingerprints.walk_graph(raw)
  loaded = time.perf_counter() - start
  sources = np.random.default_rng(config.seed).choice(np.unique(raw.edges[:, 0]), c.queries)
  build = lambda i: fingerprints.build_index(graph, jax.random.key(i), walks=c.walks, length=c.length)
  build(0)  # compiles
  start = time.perf_counter()
  index = build(1)
  built = time.perf_counter() - start
  sample, k = jnp.asarray(sources[: c.sample]), min(a.k, nodes)
  truth = powerwalk.exact(sample, graph, iterations=c.exact)
  score = jax.jit(lambda estimate, truth: powerwalk.quality(estimate, truth, k=k)["rag"].mean())
  good = lambda estimate: float(score(estimate, truth)) >= a.rag
  steps = first(lambda t: good(powerwalk.query(sample, graph, index, steps=t)), a.most_steps)
  power = first(lambda t: good(powerwalk.exact(sample, graph, iterations=t)), a.most_steps)
  options = dict(k=k, batch=config.bench.batch)
  contestants = {
    "answer": lambda some: powerwalk.top_k(some, graph, index, steps=c.steps, **options),
    "answer, equal RAG": lambda some: powerwalk.top_k(some, graph, index, steps=steps, **options),
    POWER[0]: lambda some: powerwalk.exact_top_k(some, graph, iterations=power, **options),
  }
  for answer in contestants.values():
    answer(sources[:1])  # compiles: every batch has one shape
  calls = {name: lambda answer=answer: answer(sources) for name, answer in contestants.items()}
  times = timing.compare(calls, repetitions=c.repetitions, warmup=0)
  transposed = baselines.transition(graph).T.tocsr().astype(np.float32)
  few = sources[: c.scipy]
  start = time.perf_counter()
  np.argpartition(baselines.scipy_power(few, transposed, iterations=power).T, -k)
  scipy_seconds = (time.perf_counter() - start) * len(sources) / len(few)
  row = {name: times.median(name) for name in contestants} | {POWER[1]: scipy_seconds}
  row |= {"nodes": nodes, "edges": len(raw.edges), "load": loaded, "index": built, "bytes": index.bytes}
  row |= {"steps": steps, "power iteration steps": power, "queries": len(sources)}
  console.say(
    f"{row['edges']} edges: loaded in {loaded:.1f} s, index {built:.2f} s, {len(sources)} queries {row['answer']:.2f} s"
  )
  return row | {"spread": list(times.speedup("answer, equal RAG", POWER[0])[1])}


def slope(rows: list[dict], name: str) -> float:
  """Of the seconds `name` against edges."""
  return timing.slope([(r["edges"], r[name]) for r in rows])


def claims(config, speed: dict, scaling: list[dict], found: dict) -> list[Claim]:
  """
  Args:
    found: what `accuracy.measure` found on the same graph.
  """
  rate, last = speed["queries_per_second"], scaling[-1]
  peer, rival = max(POWER, key=rate.get), min(POWER, key=last.get)
  worth = f"two steps and the index are worth {equal_l1(config, found):.1f} steps of power iteration in L1"
  if EQUAL_L1 in rate:
    worth += f", and answer {rate['batch'] / rate[EQUAL_L1]:.2g} times as many queries a second as so many, rounded up"
  ours = "batch, equal RAG"
  if CAPPED in rate:
    worth += f"; {speed['capped']} {rate[CAPPED]:.3g}/s, all entries of {config.accuracy.main} walks {rate[ours]:.3g}/s"
    ours = CAPPED
  text = lambda values: ", ".join(f"{name} {value:.3g}" for name, value in values.items())
  made = [
    Claim(
      "How many times as many queries a second a batch answers as single queries do", "x", "higher",
      ours=speed["batched_over_single"], threshold=10.0, baseline="the same jitted query, one source",
      spread=tuple(speed["spread"]),
      note=f"batch {config.bench.batch}, {config.bench.steps} steps; queries a second: {text(rate)}",
    ),
    Claim(
      "How many times as many queries a second as the faster power iteration of equal RAG", "x", "higher",
      ours=rate[ours] / rate[peer], threshold=1.0, baseline=peer.split(",")[0],
      note=f"float32, the whole batch; {speed['steps']['equal RAG']} steps and the index against "
      f"{speed['steps']['power iteration']} steps; {worth}; edges and index entries a query touches: "
      + text(found["work at equal RAG"]),
    ),
    Claim(
      "How many times as fast as power iteration of equal RAG the top of all answers is found, largest graph", "x",
      "higher", ours=last[rival] / last["answer, equal RAG"], threshold=1.0, baseline=rival.split(",")[0],
      spread=tuple(last["spread"]) if rival == POWER[0] else None,
      note=f"{last['queries']} queries, {last['edges']} edges, {last['steps']} steps and the index against "
      f"{last['power iteration steps']} steps; seconds: {text({n: last[n] for n in ('answer, equal RAG', *POWER)})}",
    ),
    Claim(
      "Seconds to answer all queries on the largest generated graph", "s", "lower",
      ours=last["answer"], threshold=10.0, baseline=last[POWER[0]],
      note=f"{last['queries']} queries, {last['edges']} edges, {config.scaling.steps} steps, {config.scaling.walks} "
      f"walks; the index took {last['index']:.2f} s, {last['bytes'] / 1e6:.0f} MB; baseline: power iteration there",
    ),
  ]  # fmt: skip
  if len(scaling) > 1:
    made.append(
      Claim(
        "Exponent of the time to answer against edges", "", "lower",
        ours=slope(scaling, "answer"), threshold=1.15, baseline="1, linear",
        note=f"{scaling[0]['edges']} to {last['edges']} edges; building the index {slope(scaling, 'index'):.3f}; over "
        f"the two largest {slope(scaling[-2:], 'answer'):.3f} and {slope(scaling[-2:], 'index'):.3f}; where small "
        "graphs take as long as larger ones they do not fill the device, and the slope over all says little",
      )
    )  # fmt: skip
  return made


def draw(scaling: list[dict], workdir: Path) -> dict[str, str]:
  figure, axis = figures.subplots()
  edges = [r["edges"] for r in scaling]
  for name, label in (
    ("index", "building the index"),
    ("answer", f"answering {scaling[-1]['queries']:,} queries"),
    (POWER[0], "power iteration, equal RAG"),
  ):
    ends = f"slope {slope(scaling, name):.2f}, at the end {slope(scaling[-2:], name):.2f}"
    axis.loglog(edges, [r[name] for r in scaling], "o-", label=f"{label}: {ends}")
  axis.set(xlabel="edges", ylabel="seconds", title="Cost against size")
  axis.set_ylim(top=axis.get_ylim()[1] * 6)  # room for the legend
  axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.legend(fontsize=8, loc="upper left")
  caption = "Seconds of building the index and of answering, against edges (R-MAT graphs)"
  return {figures.save(figure, workdir, "cost"): caption}
