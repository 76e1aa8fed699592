"""SNLP's speed: whole steps on random weights, every setting beside the sequential network in one process.

A case is one shape, batch and kind of step ("decode": one token on a filled cache; "forward": an uncached pass). Its
settings are written as `settings` describes; all are compiled with the case's `compiler` options of XLA.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, results, timing
from experiments.results import Claim
from experiments.snlp.quality import lost, scale_lost
from experiments.snlp.settings import parse, solved_layers
from jaxlab.depth import snlp_inference
from jaxlab.models import Transformer
from jaxlab.models.config import HyperConnections, nanochat
from jaxlab.training import loop

DEFAULT = "unrolled, default compiler"  # a sequential contestant beside those of a case with compiler options
TRAINED = "model"  # the shape of a case that times the experiment's own model
_ROW = 20


def random_model(shape: dict, dtype: str) -> Transformer:
  """A nanochat of random parameters, none of them zero."""
  shape = dict(shape)
  if shape.get("hyper"):
    shape["hyper"] = HyperConnections(**shape["hyper"])
  config = nanochat(**shape)

  def make(key):
    model = Transformer(config, key)
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(key, len(leaves))
    noisy = lambda a, k: a + 0.02 * jax.random.normal(k, a.shape)
    return loop.cast(jax.tree.unflatten(structure, [noisy(a, k) for a, k in zip(leaves, keys, strict=True)]), dtype)

  return jax.jit(make)(jax.random.key(0))


def measure(bench, given, workdir: Path, console) -> dict:
  """{"bandwidth": bytes/s, "cases": {case: {"milliseconds", "speedup", "sequential", "kernels", "floor_ms"}}}.

  Every case is a part of the run, kept in the workdir as it is measured. `given()` is the experiment's own model.
  """
  bandwidth = functools.partial(timing.copy_bandwidth, repetitions=min(bench.repetitions, 10))
  result = {"bandwidth": results.part(workdir, "bandwidth", bandwidth), "cases": {}}
  models = functools.lru_cache(maxsize=1)(
    lambda name: given() if name == TRAINED else random_model(bench.shapes[name].to_dict(), bench.dtype)
  )
  for case in bench.cases:
    name = describe(case)

    def one(case=case, name=name):
      console.say(f"timing {len(case['settings'])} settings: {name}")
      return measure_case(models(case["shape"]), case, bench.repetitions, result["bandwidth"])

    result["cases"][name] = results.part(workdir, "speed." + name.replace(", ", "."), one)
  return result


def describe(case: dict) -> str:
  where = f"context {case['context']}" if case["kind"] == "decode" else f"{case['tokens']} tokens"
  return f"{case['shape']}, {case['kind']}, {where}, batch {case['batch']}"


def measure_case(model: Transformer, case: dict, repetitions: int, bandwidth: float) -> dict:
  contestants, floors, sequential = {}, {}, []
  for name, (function, tree, setting) in _runs(model, case).items():
    options = {} if name == DEFAULT else dict(case.get("compiler", {}))
    contestants[name] = _contestant(function, tree, model, case, options)
    floors[name] = 1e3 * _bytes(model, case, setting) / bandwidth
    sequential += [name] if setting is None else []
  times = timing.compare(contestants, repetitions=repetitions, warmup=3, inner=_ROW)
  best = min(sequential, key=times.median)
  speedups = {name: times.speedup(name, best) for name in contestants if name not in sequential}
  counted = case.get("kernels", ())
  return {
    "depth": model.depth,
    "milliseconds": times.summary(),
    "sequential": best,
    "speedup": {name: {"ratio": ratio, "p10": low, "p90": high} for name, (ratio, (low, high)) in speedups.items()},
    "kernels": {name: timing.kernels(contestants[name]) for name in counted},
    "floor_ms": floors,
  }


def _runs(model: Transformer, case: dict) -> dict:
  """{name: (step, its network, setting or None)} of the sequential networks and every setting."""
  scan = (lambda m, t, c: m.extend(t, c)) if case["kind"] == "decode" else (lambda m, t: (m(t), None))
  runs = {"unrolled": (snlp_inference.step, snlp_inference.split(model), None), "scan": (scan, model, None)}
  if case.get("compiler"):
    runs[DEFAULT] = runs["unrolled"]
  networks = {}
  for text in case["settings"]:
    s = parse(text)
    part = tuple(s[name] for name in ("layers", "chunk", "groups", "tail"))
    if part not in networks:
      networks[part] = snlp_inference.split(model, solved_layers(model, s))
    options = {k: s[k] for k in ("iterations", "surrogate", "initial")}
    # Keys of the last iteration: one projection less, and what the paper's own decoder writes.
    step = functools.partial(snlp_inference.step, cache_kv="last_iteration", **options)
    runs[text] = (step, networks[part], s)
  return runs


def _contestant(function, tree, model: Transformer, case: dict, compiler_options: dict):
  batch = case["batch"]
  if case["kind"] == "forward":
    tokens = jax.random.randint(jax.random.key(1), (batch, case["tokens"]), 0, model.config.vocab_size)
    return timing.Steady(lambda n, t: function(n, t)[0], tree, tokens, compiler_options=compiler_options)
  tokens = jax.random.randint(jax.random.key(1), (batch, 1), 0, model.config.vocab_size)
  capacity = case["context"] + case["room"]
  fill = lambda a: a if a.ndim < 2 else jax.random.normal(jax.random.key(2), a.shape, a.dtype)
  if isinstance(tree, Transformer):
    state = jax.tree.map(fill, tree.empty_cache(batch, capacity))
    state = dataclasses.replace(state, length=jnp.int32(case["context"]))
  else:
    state = jax.tree.map(fill, snlp_inference.empty_state(tree, batch=batch, capacity=capacity))
    state = snlp_inference.filled_to(state, case["context"])
  return timing.Steady(function, tree, tokens, carry=state, compiler_options=compiler_options)


def _bytes(model: Transformer, case: dict, setting: dict | None) -> float:
  """Bytes the step must read: the weights and keys of every evaluated layer, and the head; activations not counted."""
  c, size = model.config, model.dtype.itemsize
  head = c.width * c.vocab_size
  layer = (c.matmul_parameters - head) / c.depth
  seen = case["context"] if case["kind"] == "decode" else 0
  keys = [2 * case["batch"] * c.kv_heads * c.head_dim * min(seen, (w or seen) + 1) for w in c.windows]
  times = np.ones(c.depth)
  if setting:
    times[c.depth - setting["layers"] :] = setting["iterations"] + (setting["initial"] == "batch_fwd")
  return size * (head + float((times * (layer + np.array(keys))).sum()))


def fit_latency(result: dict) -> dict:
  """t = t_0 + chains t_lat + layers b over the plain settings of one case, by least squares (milliseconds).

  chains = S + K evaluations in a row, layers = S + n K evaluated in all (plus one round of each for batch_fwd).
  """
  depth = result["depth"]
  rows = {result["sequential"]: (depth, depth)}
  for text in result["speedup"]:
    s = parse(text)
    if not s["chunk"]:
      rounds = s["iterations"] + (s["initial"] == "batch_fwd")
      rows[text] = (depth - s["layers"] + rounds, depth - s["layers"] + s["layers"] * rounds)
  a = np.array([[1.0, *row] for row in rows.values()])
  measured = np.array([result["milliseconds"][name]["median"] for name in rows])
  # Relative errors: the slow settings would otherwise decide alone.
  t, *_ = np.linalg.lstsq(a / measured[:, None], np.ones(len(rows)), rcond=None)
  return {
    "t_0": t[0],
    "t_lat": t[1],
    "b": t[2],
    "predicted": dict(zip(rows, (a @ t).tolist(), strict=True)),
    "measured": dict(zip(rows, measured.tolist(), strict=True)),
  }


def latency_fits(cases: dict) -> dict:
  """The latency model of every case with enough plain settings to tell its three terms apart."""
  enough = lambda c: sum(not parse(text)["chunk"] for text in c["speedup"]) >= 5
  return {name: fit_latency(c) for name, c in cases.items() if enough(c)}


def claims(bench, cases: dict) -> list[Claim]:
  """Speed-ups over the compiled sequential network, for the cases that the config names."""
  made = []
  for c in bench.claims:
    case = cases[c["case"]]
    measured = case["speedup"][c["setting"]]
    made.append(
      Claim(
        c["says"], "x", "higher", ours=measured["ratio"], threshold=c["threshold"], paper=c.get("paper"),
        baseline=f"compiled sequential step ({case['sequential']})", spread=(measured["p10"], measured["p90"]),
        note=f"{c['case']}, {c['setting']}" + ("; paper: eager PyTorch, 2048 tokens" if c.get("paper") else ""),
      )
    )  # fmt: skip
  return made


def draw(result: dict, fits: dict, shown: tuple[str, ...], workdir: Path) -> dict[str, str]:
  """{file: caption} of the speed figures."""
  files = {draw_speed(result, shown, workdir): "Speed-up by setting and case"}
  return files | ({draw_latency(fits, workdir): "Latency model against measurement"} if fits else {})


def draw_latency(fits: dict[str, dict], workdir: Path) -> str:
  columns = min(len(fits), 3)
  figure, axes = figures.subplots(columns, -(-len(fits) // columns), squeeze=False)
  for axis in axes.flat[len(fits) :]:
    axis.axis("off")
  for axis, (name, fit) in zip(axes.flat, fits.items(), strict=False):
    for setting, measured in fit["measured"].items():
      axis.plot(fit["predicted"][setting], measured, "o", color="C0")
      axis.annotate(setting, (fit["predicted"][setting], measured), xytext=(4, -3), textcoords="offset points", size=7)
    edge = [0, 1.15 * max(*fit["measured"].values(), *fit["predicted"].values())]
    axis.plot(edge, edge, ":", color="black", lw=0.8)
    model = f"{fit['t_0']:.3f} + {fit['t_lat']:.4f} chains + {fit['b']:.4f} layers"
    axis.set(xlim=edge, ylim=edge, xlabel=f"predicted ms: {model}", ylabel="measured ms")
    axis.set_title(name, size=9)
  return figures.save(figure, workdir, "latency_model")


def draw_speed(result: dict, shown: tuple[str, ...], workdir: Path) -> str:
  """Speed-up of chosen settings in every case that has some of them."""
  cases = {name: [s for s in shown if s in c["speedup"]] for name, c in result["cases"].items()}
  cases = {name: present for name, present in cases.items() if present}
  figure, axis = figures.subplots(width=max(1.8, len(cases) / 5))
  width = 0.8 / max(map(len, cases.values()), default=1)
  for setting in shown:
    at = [(j, name, present) for j, (name, present) in enumerate(cases.items()) if setting in present]
    x = [j + (present.index(setting) - len(present) / 2 + 0.5) * width for j, _, present in at]
    measured = [result["cases"][name]["speedup"][setting] for _, name, _ in at]
    y = np.array([[r["ratio"], r["p10"], r["p90"]] for r in measured]).reshape(-1, 3)
    spread = np.maximum(0, [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
    axis.bar(x, y[:, 0], width, yerr=spread, label=setting, error_kw=dict(lw=0.8))
  axis.axhline(1, color="black", lw=0.8, ls=":")
  axis.set_xticks(range(len(cases)), [name.replace(", ", "\n").replace("_", "\n") for name in cases], size=7)
  axis.set(ylabel="speed-up over the sequential network")
  axis.legend(fontsize=7, ncols=max(len(shown), 1), loc="lower center", bbox_to_anchor=(0.5, 1.0))
  return figures.save(figure, workdir, "speed")


def frontier(metrics: dict, workdir: Path) -> dict[str, str]:
  """Settings whose quality and speed were both measured; the first case stands for speed."""
  name, case = next(iter(metrics["speed"]["cases"].items()))
  quality = metrics["quality"]
  figure, axis = figures.subplots()
  for model in quality:
    both = [text for text in quality[model]["snlp"] if text in case["speedup"]]
    points = {text: (case["speedup"][text]["ratio"], lost(quality, model, text)) for text in both}
    points["sequential"] = (1.0, 0.0)
    axis.plot(*zip(*points.values(), strict=True), "o", label=model)
    for text, (speed, loss) in points.items():
      # Those that another one beats in both would only cover the names of the rest.
      if not any(s > speed and least < loss for s, least in points.values()):
        axis.annotate(text, (speed, loss), xytext=(4, 3), textcoords="offset points", size=7)
  scale_lost(axis, max(lost(quality, model, text) for model in quality for text in both))
  axis.set_ylim(bottom=-0.2)
  axis.set(xlabel=f"speed-up ({name})", ylabel="perplexity lost (%)", title="Speed against quality")
  axis.legend()
  return {
    figures.save(figure, workdir, "frontier"): "Speed-up against perplexity lost; named where nothing is better in both"
  }
