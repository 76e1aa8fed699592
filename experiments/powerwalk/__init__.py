"""PowerWalk: accuracy over walks and steps, full paths against ends of walks, pruning, throughput, cost by edges."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.ticker
import networkx
import numpy as np

from experiments import figures, results, timing
from experiments.powerwalk import baselines
from experiments.results import Claim, Report
from jaxlab.core.checks import require
from jaxlab.graphs import common, fingerprints, powerwalk

# Power iteration that starts from the source, S + F: what online-only answers are worth at the same passes.
POWER = ("power iteration, equal RAG", "scipy power iteration, equal RAG")


def run(config, workdir: Path, cache: Path, console) -> Report:
  a = config.accuracy
  require(a.main in a.walks and 2 in a.steps and 0 in a.steps, "accuracy.main must be one of walks; steps need 0 and 2")
  graphs = {}
  for name in ("data", "undirected"):
    raw = common.load(**config[name], seed=config.seed)
    graphs[name] = fingerprints.walk_graph(raw)
    require(a.k <= raw.nodes, f"accuracy.k={a.k} exceeds the {raw.nodes} nodes of config.{name}; lower it")
    console.say(f"{name}: {raw.nodes} nodes, {len(raw.edges)} edges")
  part = functools.partial(results.part, workdir)
  scaling = [
    part(f"scaling.{nodes}", lambda n=nodes: measure_size(config, n, console)) for nodes in config.scaling.nodes
  ]
  found = {
    name: part(f"accuracy.{name}", lambda g=graph: measure_accuracy(config, g, console))
    for name, graph in graphs.items()
  }
  speed = part("speed", lambda: measure_speed(config, graphs["data"], found["data"], console))
  metrics = {"accuracy": found, "speed": speed, "scaling": scaling}
  metrics["slopes"] = {name: slope(scaling, name) for name in ("index", "answer")}
  files = {
    draw_accuracy(config, found, workdir): "L1 error against steps T, by walks R of the fingerprints",
    draw_cost(scaling, workdir): "Seconds of building the index and of answering, against edges (R-MAT graphs)",
  }
  return Report(metrics, make_claims(config, found, speed, scaling), files)


def means(quality: dict) -> dict:
  return {name: float(np.mean(value)) for name, value in quality.items()}


def average(rows: list[dict]) -> dict:
  return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}


def measure_accuracy(config, graph, console) -> dict:
  """The grid R x T, online only, ends of walks, pruning, short walks, hubs, FORA: all against power iteration."""
  a = config.accuracy
  rng = np.random.default_rng(config.seed)
  sources = jnp.asarray(rng.choice(graph.nodes, min(a.sources, graph.nodes), replace=False), jnp.int32)
  truth = powerwalk.exact(sources, graph)
  score = jax.jit(functools.partial(powerwalk.quality, k=a.k))
  judge = lambda estimate: means(score(estimate, truth))
  ask = functools.partial(powerwalk.query, sources, graph)
  keys = [jax.random.key(config.seed + 100 * i) for i in range(a.seeds)]
  build = functools.partial(fingerprints.build_index, graph, length=a.length, cap=a.cap)
  indexes = {r: [build(key, walks=r) for key in keys] for r in console.track("fingerprints", list(a.walks))}
  result = {
    "grid": {},
    "online": {},
    "bytes": {f"R{r}": float(np.mean([i.bytes for i in indexes[r]])) for r in a.walks},
  }
  for r in a.walks:
    for t in a.steps:
      row = average([judge(ask(index, steps=t)) for index in indexes[r]])
      result["grid"][f"R{r} T{t}"] = row | powerwalk.work(sources, graph, indexes[r][0], steps=t)
  for t in a.steps:
    result["online"][f"T{t}"] = judge(ask(None, steps=t))
  main = indexes[a.main]
  reaches = lambda index: first(lambda t: judge(ask(index, steps=t))["rag"] >= a.rag, a.most_steps)
  power = lambda t: judge(powerwalk.exact(sources, graph, iterations=t))
  result["power iteration"] = {f"T{t}": power(t) for t in a.steps}
  result["passes"] = {"index": reaches(main[0]), "online": reaches(None)}
  result["passes"]["power iteration"] = first(lambda t: power(t)["rag"] >= a.rag, a.most_steps)
  result["passes"] |= {f"R{r}": reaches(indexes[r][0]) for r in a.walks}
  touched = powerwalk.work(sources, graph, main[0], steps=result["passes"]["index"])
  swept = powerwalk.work(sources, graph, None, steps=result["passes"]["power iteration"])
  result["work at equal RAG"] = {"index": touched["edges"] + touched["entries"], "power iteration": swept["edges"]}
  ends = {}
  for factor in a.end_point_factors:
    estimate = lambda key, f=factor: baselines.end_point(
      key, graph, sources, per_source=max(a.walks) * f, length=a.length
    )
    ends[max(a.walks) * factor] = average([judge(estimate(key)) for key in keys])
  result["end_point"] = {f"R{r}": row for r, row in ends.items()}
  full = result["grid"][f"R{max(a.walks)} T0"]["l1"]
  result["end_point_walks_per_full_path"] = walks_needed(ends, full) / max(a.walks)
  lost = jax.jit(lambda eps: powerwalk.decompose(sources, graph, steps=4, eps=eps, prune="drop")[3].mean())
  result["pruning"] = {}
  for eps in a.eps:
    for prune in ("drop", "hold"):
      result["pruning"][f"{prune} {eps:g}"] = judge(ask(main[0], steps=4, eps=eps, prune=prune))
    result["pruning"][f"drop {eps:g}"]["dropped"] = float(lost(eps))
  # What the published code does otherwise: walks of 10 visits, long paths of as many visits as the walks have in all,
  # and numbers of walkers that are rounded.
  others = {"length 10": dict(length=10), "rounded": dict(moves="rounded", length=10)}
  others["long path"] = dict(moves="long_path", walks=1, length=round(a.main / powerwalk.RESET))
  for name, options in others.items():
    index = build(keys[0], **(dict(walks=a.main) | options))
    result[name] = {f"T{t}": judge(ask(index, steps=t)) for t in a.steps}
  result["hubs"] = measure_hubs(config, graph, keys[0], judge, ask)
  reserve, _, edges = baselines.forward_push(sources, graph, r_max=1e-4)
  result["forward push 1e-4"] = judge(reserve) | {"edges": float(edges.mean())}
  delta = 10 / graph.nodes
  estimate = baselines.fora(keys[0], graph, sources[:8], r_max=1e-3, delta=delta)
  result["fora"] = means(score(estimate, truth[:, :8]))
  return result


def first(reached, most: int) -> int:
  """The least t in 0 .. most that `reached` says yes to, else most + 1."""
  return next((t for t in range(most + 1) if reached(t)), most + 1)


def measure_hubs(config, graph, key, judge, ask) -> dict:
  """Fingerprints of the tenth of largest in-degree alone, flow elsewhere pushed on for up to 2T steps."""
  a = config.accuracy
  inside = np.bincount(np.asarray(graph.targets), minlength=graph.nodes)
  chosen = np.sort(np.argsort(-inside, kind="stable")[: max(graph.nodes // 10, 1)])
  index = fingerprints.build_index(graph, key, walks=10 * a.main, length=a.length, cap=a.cap, origins=chosen)
  hubs = jnp.zeros(graph.nodes, bool).at[chosen].set(True)
  return {f"T{t}": judge(ask(index, steps=2 * t, hubs=hubs)) for t in a.steps} | {"bytes": index.bytes}


def walks_needed(ends: dict[int, dict], l1: float) -> float:
  """Walks at which ends of walks have this L1, on the line through log walks and log L1; outside the range its ends."""
  walks = np.array(sorted(ends))
  errors = np.array([ends[w]["l1"] for w in walks])
  return float(np.exp(np.interp(-np.log(l1), -np.log(errors), np.log(walks))))


def measure_speed(config, graph, found: dict, console) -> dict:
  """Queries a second: together, one at a time, and by power iteration of equal RAG, ours, scipy's, networkx's."""
  a, b = config.accuracy, config.bench
  batch = min(b.batch, graph.nodes)
  sources = np.random.default_rng(config.seed + 1).choice(graph.nodes, batch, replace=False).astype(np.int32)
  index = fingerprints.build_index(graph, jax.random.key(config.seed), walks=a.main, length=a.length, cap=a.cap)
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
    "power iteration, equal RAG": (
      batch,
      lambda: powerwalk.exact(jnp.asarray(sources), graph, iterations=online),
    ),
    "scipy power iteration, equal RAG": (
      batch,
      lambda: baselines.scipy_power(sources, transposed, iterations=online),
    ),
    "networkx pagerank": (1, lambda: list(networkx.pagerank(other, alpha=0.85, personalization={int(sources[0]): 1}))),
  }
  console.say(f"timing {len(contestants)} ways to answer {batch} queries")
  times = timing.compare({n: call for n, (_, call) in contestants.items()}, repetitions=b.repetitions, warmup=1)
  rate = {name: queries / times.median(name) for name, (queries, _) in contestants.items()}
  spread = (times.seconds["one by one"] / len(few)) / (times.seconds["batch"] / batch)
  return {
    "queries_per_second": rate,
    "steps": {"timed": b.steps, "equal RAG": steps, "power iteration": online},
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
    "power iteration, equal RAG": lambda some: powerwalk.exact_top_k(some, graph, iterations=power, **options),
  }
  for answer in contestants.values():
    answer(sources[:1])  # compiles: every batch has one shape
  seconds = {name: [] for name in contestants}
  for _ in range(c.repetitions):
    for name, answer in contestants.items():
      start = time.perf_counter()
      answer(sources)
      seconds[name].append(time.perf_counter() - start)
  row = {name: float(np.median(times)) for name, times in seconds.items()}
  transposed = baselines.transition(graph).T.tocsr().astype(np.float32)
  few = sources[: c.scipy]
  start = time.perf_counter()
  np.argpartition(baselines.scipy_power(few, transposed, iterations=power).T, -k)
  row["scipy power iteration, equal RAG"] = (time.perf_counter() - start) * len(sources) / len(few)
  row |= {"nodes": nodes, "edges": len(raw.edges), "load": loaded, "index": built, "bytes": index.bytes}
  row |= {"steps": steps, "power iteration steps": power, "queries": len(sources)}
  ratios = np.array(seconds["power iteration, equal RAG"]) / seconds["answer, equal RAG"]
  console.say(
    f"{row['edges']} edges: loaded in {loaded:.1f} s, index {built:.2f} s, {len(sources)} queries {row['answer']:.2f} s"
  )
  return row | {"spread": np.percentile(ratios, [10, 90]).tolist()}


def slope(rows: list[dict], name: str) -> float:
  """Of the seconds `name` against edges."""
  return timing.slope([(r["edges"], r[name]) for r in rows])


def make_claims(config, found: dict, speed: dict, scaling: list[dict]) -> list[Claim]:
  a = config.accuracy
  cell = lambda name, t: found[name]["grid"][f"R{a.main} T{t}"]
  gain = {name: cell(name, 2)["rag"] - cell(name, 0)["rag"] for name in found}
  worst = min(gain, key=gain.get)
  ratio = {name: found[name]["end_point_walks_per_full_path"] for name in found}
  passes = {name: f["passes"]["online"] / max(f["passes"]["index"], 1) for name, f in found.items()}
  fewest = min(passes, key=passes.get)
  text = lambda values: ", ".join(f"{name} {value:.3g}" for name, value in values.items())
  rate, last = speed["queries_per_second"], scaling[-1]
  peer, rival = max(POWER, key=rate.get), min(POWER, key=last.get)
  return [
    Claim(
      f"RAG@{a.k} of two steps less that of the fingerprint alone, R = {a.main}, least over graphs", "", "higher",
      ours=gain[worst], threshold=0.0, baseline=cell(worst, 0)["rag"],
      note="; ".join(f"{n}: {cell(n, 0)['rag']:.3f} -> {cell(n, 2)['rag']:.3f}" for n in found)
      + "; holds if positive on every graph",
    ),
    Claim(
      "ends of walks needed for the L1 of one full path, undirected graph", "x", "higher",
      ours=ratio["undirected"], threshold=3.0, baseline=f"R = {max(a.walks)} full paths",
      note=f"{text(ratio)}; at a vertex that only loops the advantage vanishes (returns are certain but for a reset)",
    ),
    Claim(
      "queries a second, batched over one by one", "x", "higher",
      ours=speed["batched_over_single"], threshold=10.0, baseline="the same jitted query, one source",
      spread=tuple(speed["spread"]),
      note=f"batch {config.bench.batch}, T = {config.bench.steps}; queries a second: "
      + text(speed["queries_per_second"]),
    ),
    Claim(
      f"passes over the edges to RAG {a.rag}, online only over index + steps, least over graphs", "x", "higher",
      ours=passes[fewest], threshold=3.0, baseline=f"{found[fewest]['passes']['online']} passes online only",
      note="; ".join(
        f"{n}: {f['passes']['online']} online, {f['passes']['power iteration']} by power iteration, "
        + ", ".join(f"{f['passes'][f'R{r}']} with R = {r}" for r in a.walks)
        for n, f in found.items()
      )
      + "; RAG asks for the right top alone: the online-only answers still miss "
      + " and ".join(f"{100 * 0.85 ** f['passes']['online']:.0f} %" for f in found.values())
      + " of the mass",
    ),
    Claim(
      "queries a second at equal RAG, index over the faster power iteration", "x", "higher",
      ours=rate["batch, equal RAG"] / rate[peer], threshold=1.0, baseline=peer.split(",")[0],
      note=f"float32, the whole batch; {speed['steps']['equal RAG']} steps and the index against "
      f"{speed['steps']['power iteration']} steps; edges and index entries a query touches: "
      + text(found["data"]["work at equal RAG"]) + " (a batch of dense columns passes over all)",
    ),
    Claim(
      f"the same, top {a.k} of {last['queries']} queries on {last['edges']} edges", "x", "higher",
      ours=last[rival] / last["answer, equal RAG"], threshold=1.0, baseline=rival.split(",")[0],
      spread=tuple(last["spread"]) if rival.startswith("power") else None,
      note=f"{last['steps']} steps and the index against {last['power iteration steps']} steps; seconds: "
      + text({name: last[name] for name in ("answer, equal RAG", *POWER)}),
    ),
    Claim(
      f"{last['queries']} queries on {last['edges']} edges", "s", "lower",
      ours=last["answer"], threshold=10.0, baseline=last[POWER[0]],
      note=f"T = {config.scaling.steps}, R = {config.scaling.walks}; the index took {last['index']:.2f} s, "
      f"{last['bytes'] / 1e6:.0f} MB; the baseline is power iteration on the same device",
    ),
    Claim(
      "slope of log seconds against log edges, answering", "", "lower",
      ours=slope(scaling, "answer"), threshold=1.15, baseline="1, linear",
      note=f"{scaling[0]['edges']} to {last['edges']} edges; building the index {slope(scaling, 'index'):.3f}; over "
      f"the two largest {slope(scaling[-2:], 'answer'):.3f} and {slope(scaling[-2:], 'index'):.3f}; "
      f"{scaling[0]['answer']:.2g} s at the smallest: where small graphs take as long as larger ones, they do not fill "
      "the device, and the slope over all says little",
    ),
  ]  # fmt: skip


def draw_accuracy(config, found: dict, workdir: Path) -> str:
  a = config.accuracy
  figure, axes = figures.subplots(len(found), sharey=True)
  for axis, (name, f) in zip(axes, found.items(), strict=True):
    for r in a.walks:
      axis.plot(a.steps, [f["grid"][f"R{r} T{t}"]["l1"] for t in a.steps], "o-", label=f"R = {r}")
    axis.plot(a.steps, [f["online"][f"T{t}"]["l1"] for t in a.steps], "k:", label="no index, $(1-c)^T$")
    axis.set(title=f"{'directed' if name == 'data' else name} graph", xlabel="steps T", yscale="log")
  axes[0].set_ylabel("L1 error")
  axes[0].legend()
  return figures.save(figure, workdir, "accuracy")


def draw_cost(scaling: list[dict], workdir: Path) -> str:
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
  return figures.save(figure, workdir, "cost")
