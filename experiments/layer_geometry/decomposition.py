"""Every layer's update as a tokenwise part and the rest: how they lie to each other, by class, beside the nulls."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.depth import layer_geometry as geometry
from jaxlab.depth import layer_geometry_classes as classes
from jaxlab.depth.layer_geometry_hnet import StackNetwork

LOCAL = ("diagonal", "low_rank", "orthogonal")
CLASSES = ("identity", "token_lookup", "global_affine", *LOCAL, "mlp", "context")
MAIN = "mlp"  # the strongest tokenwise class; nulls, doses and noise are about this one

_SHARE = 2 / 3
_INTERVALS = ("gap_over_isotropic", "alignment_over_curve", "log_ratio_over_isotropic")
_collect = jax.jit(geometry.collect)
_neighbours = jax.jit(classes.neighbours, static_argnames="k")


def collect(model, rows: dict) -> tuple[dict, dict]:
  """({part: (x, y) of every layer}, {part: token ids at the same positions})."""
  traces = {part: _collect(model, jnp.asarray(tokens)) for part, (tokens, _) in rows.items()}
  read = jax.jit(model.ids) if isinstance(model, StackNetwork) else lambda tokens: tokens
  ids = {part: read(jnp.asarray(tokens))[:, geometry.SKIP :] for part, (tokens, _) in rows.items()}
  few, many = ids["evaluation"].size, ids["reference"].size
  require(few <= many, f"{few} evaluation tokens, {many} for reference; there must be at least as many of these")
  return traces, ids


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def fit_mlps(reference, key, *, steps: int, batch: int) -> dict:
  """{"ours": the MLPs of all L layers, "shuffled": those fitted to other tokens' increments}, one batch of 2 L."""
  x, y = (a.reshape(len(a), -1, a.shape[-1]) for a in reference)
  shuffle, key = jax.random.split(key)
  u = y - x
  other = jax.random.permutation(shuffle, u, axis=1)
  fit = functools.partial(classes.fit_mlp, steps=steps, batch=batch)
  fitted = jax.vmap(fit)(jnp.concatenate([x, x]), jnp.concatenate([u, other]), jax.random.split(key, 2 * len(x)))
  return {"ours": jax.tree.map(lambda a: a[: len(x)], fitted), "shuffled": jax.tree.map(lambda a: a[len(x) :], fitted)}


@jax.jit
def of_layer(tree, layer):
  return jax.tree.map(lambda a: a[layer], tree)


@jax.jit
def gather(traces, ids, layer) -> tuple[dict, dict]:
  """The evaluation and the reference tokens of one layer."""
  flat = lambda a: a.reshape(-1, a.shape[-1])

  def tokens_of(part):
    x, y = (a[layer] for a in traces[part])
    return {"x": flat(x), "y": flat(y), "context": flat(classes.prefix_mean(x)), "ids": ids[part].reshape(-1)}

  return tokens_of("evaluation"), tokens_of("reference")


def predict(query, reference, mlp, *, k: int, **options) -> dict[str, jax.Array]:
  """T(x) of every class for the evaluation tokens, fitted on the reference tokens of one layer."""
  near = _neighbours(reference["x"], query["x"], k=k)
  return {name: _predict(name, query, reference, near, mlp, **_read_by(name, options)) for name in CLASSES}


def _read_by(name: str, options: dict) -> dict:
  """Networks of one width share the programs of all classes but the lookup, whatever their vocabularies."""
  return options if name == "token_lookup" else options | {"vocab": None}


@functools.partial(jax.jit, static_argnames=("name", "rank", "ridge", "vocab"))
def _predict(name: str, query, reference, near, mlp, *, rank: int, ridge: float, vocab: int | None):
  x, y, u, q = reference["x"], reference["y"], reference["y"] - reference["x"], query["x"]
  if name in LOCAL:
    options = {"rank": rank} if name == "low_rank" else {}
    return classes.apply_local(name, x, y, q, *near, ridge=ridge, **options)
  both = lambda part: jnp.concatenate([part["x"], part["context"]], axis=1)
  increment = {
    "identity": lambda: jnp.zeros_like(q),
    "token_lookup": lambda: classes.fit_lookup(reference["ids"], u, vocab=vocab)[query["ids"]],
    "global_affine": lambda: classes.apply_affine(classes.fit_affine(x, u, ridge=ridge), q),
    "mlp": lambda: classes.apply_mlp(mlp, q),
    "context": lambda: classes.apply_affine(classes.fit_affine(both(reference), u, ridge=ridge), both(query)),
  }
  return q + increment[name]()


def compile_side_by_side(query, reference, mlps, options, *others) -> None:
  """The first call of every class, and others'; an accelerator's host has cores for all."""
  near = _neighbours(reference["x"], query["x"], k=options["k"])
  fixed = {name: value for name, value in options.items() if name != "k"}
  mlp = of_layer(mlps["ours"], 0)
  jobs = [functools.partial(_predict, name, query, reference, near, mlp, **_read_by(name, fixed)) for name in CLASSES]
  jax.block_until_ready(list(overlapped(lambda job: job(), [*jobs, *others])))


@jax.jit
def lens(model, tokens, reference, evaluation, layer, ridge):
  return geometry.affine_lens(model, reference, evaluation, layer=layer, ridge=ridge, tokens=tokens)


def describe(query, reference, outputs, mlps, layer: int, key, documents, fit, seed: int) -> tuple[dict, jax.Array]:
  """({"classes", "main", "nulls", "prior"} of one layer, noise of the size of the rest for the interventions)."""
  dimensions = min(fit.subspace, query["x"].shape[-1])
  parts = {name: of_layer(mlp, layer) for name, mlp in mlps.items()}
  main, tokens, noise = _describe_main(query, reference, outputs[MAIN], parts, key, dimensions=dimensions)
  described = {"classes": {name: _describe_class(query, outputs[name]) for name in CLASSES}, "main": main}
  described["prior"] = _prior_measures(query["x"], query["y"])
  nulls = compare_nulls(*jax.tree.map(np.asarray, tokens), documents, resamples=fit.resamples, seed=seed)
  return jax.tree.map(float, jax.device_get(described)) | {"nulls": nulls}, noise


@jax.jit
def _describe_class(query, outputs) -> dict:
  x, y = query["x"], query["y"]
  none = jnp.eye(x.shape[-1], 1)
  cosines = geometry.geometry(y - x, outputs - x, none)
  return {name: cosines[name].mean() for name in ("cos_ut", "cos_ur")} | {
    "state_cos": geometry.geometry(y, outputs, none)["cos_ut"].mean(),
    "fvu": geometry.fvu(y - x, outputs - x),
    "r2": geometry.explained(y - x, outputs - x),
  }


@functools.partial(jax.jit, static_argnames="dimensions")
def _describe_main(query, reference, outputs, mlps, key, *, dimensions: int):
  """(means and medians over tokens, {"ours", "isotropic", "products": values a token}, noise orthogonal to t).

  The subspace is that of the reference tokens' t. "shuffled" is the class fitted to other tokens' increments.
  """
  u, t = query["y"] - query["x"], outputs - query["x"]
  inside = classes.apply_mlp(mlps["ours"], reference["x"])
  basis = geometry.dominant_subspace(inside, dimensions=dimensions)
  isotropic, noise = jax.random.split(key)
  ours = geometry.geometry(u, t, basis)
  theirs = geometry.geometry(t + geometry.isotropic(isotropic, u - t), t, basis)
  centred = geometry.geometry(u, t, basis, mean=(reference["y"] - reference["x"]).mean(axis=0))
  shuffled = classes.apply_mlp(mlps["shuffled"], query["x"])
  means = ("cos_rt", "energy_t", "energy_r", "in_u", "in_t", "in_r")
  summary = {name: ours[name].mean() for name in means}
  summary |= {f"{name}_median": jnp.median(ours[name]) for name in ("cos_ut", "angle_ut", "angle_ur", "angle_rt")}
  summary |= {
    "cos_ut_centred": centred["cos_ut"].mean(),
    "shuffled_fvu": geometry.fvu(u, shuffled),
    "shuffled_cos_ut": geometry.geometry(u, shuffled, basis)["cos_ut"].mean(),
    "dimensions_95": geometry.effective_dimensions(inside),
  }
  used = lambda values: {name: values[name] for name in ("cos_ut", "cos_rt", "in_u", "in_r")}
  return summary, (used(ours), used(theirs), u, t), geometry.orthogonal_noise(noise, u - t, t)


@jax.jit
def _prior_measures(x, y) -> dict:
  return {
    "linearity": geometry.linearity(x, y),
    "linearity_of_increment": geometry.linearity(x, y - x),
    "block_influence": geometry.block_influence(x, y),
  }


def compare_nulls(ours: dict, isotropic: dict, u, t, documents, *, resamples: int, seed: int = 0) -> dict:
  """Alignment, cos(u, t) - cos(r, t) and E(u) / E(r) beside an isotropic rest and what R^2 alone gives.

  A least-squares fit has cos(u, t) = sqrt(R^2) over all tokens. R^2 is that of the best multiple of t, <u, t>^2 /
  (||u||^2 ||t||^2): a fit that overshoots loses R^2 but no alignment, and would exceed the curve for nothing. For the
  same reason cos(u, t) is compared with it alone: overshooting makes -cos(r, t) large.

  Args:
    ours, isotropic: cos_ut, cos_rt, in_u and in_r a token, of the rest and of random directions in its place.
    u, t: (tokens, width).

  Returns:
    Values over all tokens, and {"low", "high"} of the differences (of logarithms, for the ratio) when documents are
    drawn with replacement.
  """
  gap = lambda g, i: float(np.mean(g["cos_ut"][i] - g["cos_rt"][i]))
  ratio = lambda g, i: float(g["in_u"][i].mean() / max(g["in_r"][i].mean(), 1e-12))
  products = [np.sum(np.float64(a) * b, axis=1) for a, b in ((u, t), (u, u), (t, t))]

  def curve(i):
    ut, uu, tt = (p[i].sum() for p in products)
    return float(max(ut, 0.0) / max(np.sqrt(uu * tt), 1e-12))

  def interval(difference):
    low, high = geometry.document_bootstrap(difference, documents, resamples=resamples, seed=seed)
    return {"low": low, "high": high}

  log = lambda value: np.log(max(value, 1e-12))
  everything = np.arange(len(u))
  return {
    "gap": gap(ours, everything),
    "gap_isotropic": gap(isotropic, everything),
    "curve": curve(everything),
    "ratio": ratio(ours, everything),
    "ratio_isotropic": ratio(isotropic, everything),
    "gap_over_isotropic": interval(lambda i: gap(ours, i) - gap(isotropic, i)),
    "alignment_over_curve": interval(lambda i: float(np.mean(ours["cos_ut"][i])) - curve(i)),
    "log_ratio_over_isotropic": interval(lambda i: log(ratio(ours, i)) - log(ratio(isotropic, i))),
  }


def share(model: dict, holds) -> float:
  return float(np.mean(holds(model)))


def state_aligned(model: dict) -> np.ndarray:
  return np.array(model["classes"][MAIN]["state_cos"]) > 0.95


def separated(model: dict) -> np.ndarray:
  return (np.array(model["nulls"]["gap"]) > 0.3) & (np.array(model["nulls"]["ratio"]) > 2)


def beyond_nulls(model: dict) -> np.ndarray:
  return separated(model) & np.all([np.array(model["nulls"][name]["low"]) > 0 for name in _INTERVALS], axis=0)


def worst(values: dict[str, float]) -> str:
  """ "name 0.50, ..." with the smallest first."""
  return ", ".join(f"{name} {values[name]:.2f}" for name in sorted(values, key=values.get))


def spread(splits: list[float]) -> tuple[float, float] | None:
  """The range over splits of the documents, where there are several."""
  return (min(splits), max(splits)) if len(splits) > 1 else None


def claims(models: dict, untrained: dict | None) -> list[Claim]:
  """Shares of layers, of the model that has the least."""
  base = lambda holds: share(untrained, holds) if untrained else None
  of = lambda holds: {name: share(model, holds) for name, model in models.items()}
  beyond, apart, state = of(beyond_nulls), of(separated), of(state_aligned)
  exceed = lambda key: sum(int(np.sum(np.array(m["nulls"][key]["low"]) > 0)) for m in models.values())
  count = sum(len(m["nulls"]["gap"]) for m in models.values())
  identity = [min(m["classes"]["identity"]["state_cos"]) for m in models.values()]
  splits = models[min(beyond, key=beyond.get)]["by_split"]["beyond_nulls"]
  return [
    Claim(
      "Share of layers whose update follows its tokenwise part, and the rest does not, by more than R^2 and an "
      "isotropic rest explain, worst model", "", "higher", ours=min(beyond.values()), threshold=_SHARE,
      baseline=base(beyond_nulls), spread=spread(splits),
      note=f"{worst(beyond)}; of {count} layers {exceed('alignment_over_curve')} exceed the cosine that R^2 gives, "
      f"{exceed('gap_over_isotropic')} the gap of an isotropic rest, {exceed('log_ratio_over_isotropic')} its ratio "
      "of energies, beyond the 95 % interval over documents; baseline: the untrained network",
    ),
    Claim(
      "Share of layers with cos(update, tokenwise part) at least 0.3 above cos(rest, tokenwise part) and twice the "
      "energy in the dominant subspace, worst model", "", "higher", ours=min(apart.values()), threshold=_SHARE,
      baseline=base(separated), note=f"{worst(apart)}; held-out documents, a one-layer network as the tokenwise map; "
      "baseline: the untrained network",
    ),
    Claim(
      "Share of layers whose output has a cosine above 0.95 with the tokenwise map's, worst model", "", "higher",
      ours=min(state.values()), threshold=0.5, baseline=base(state_aligned),
      note=f"{worst(state)}; the identity map alone has at least {min(identity):.2f}",
    ),
  ]  # fmt: skip


def depths(model: dict) -> np.ndarray:
  """Where the layers stand, in 0..1."""
  count = len(model["nulls"]["gap"])
  return np.arange(1, count + 1) / count


def style(i: int, name: str) -> dict:
  """How a model's line looks in every figure."""
  return dict(color=f"C{i % 6}", marker="osD^vP*X"[i % 8], ms=5, lw=1.8, ls="--" if "untrained" in name else "-")


def draw(models: dict, workdir: Path) -> dict[str, str]:
  return {
    draw_layers(models, workdir): "By depth: cosines of the rest with the tokenwise part, and energy of the update in "
    "the dominant subspace over that of the rest, dotted for an isotropic rest",
    draw_classes(models, workdir): "Variance that each class leaves unexplained, mean over layers",
  }


def draw_layers(models: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  for i, (name, model) in enumerate(models.items()):
    x, look = depths(model), style(i, name)
    left.plot(x, model["main"]["cos_rt"], **look)
    right.plot(x, model["nulls"]["ratio"], label=name, **look)
    right.plot(x, model["nulls"]["ratio_isotropic"], ":", color=look["color"], lw=1)
  left.set(xlabel="layer, as a share of the depth", ylabel="cos(rest, tokenwise part)")
  right.set(xlabel="layer, as a share of the depth", ylabel="E(update) / E(rest)", yscale="log")
  right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  return figures.save(figure, workdir, "layers")


def draw_classes(models: dict, workdir: Path) -> str:
  figure, axis = figures.subplots(width=1.4)
  shown = [name for name in CLASSES if name != "identity"]
  for i, (name, model) in enumerate(models.items()):
    fvu = [np.mean(model["classes"][kind]["fvu"]) for kind in shown]
    axis.plot(range(len(shown)), fvu, label=name, **style(i, name) | {"ls": "none", "ms": 6})
  axis.axhline(1, color="black", lw=0.8, ls=":")
  axis.set_xticks(range(len(shown)), [kind.replace("_", "\n") for kind in shown])
  axis.set(ylabel="fraction of variance unexplained", ylim=(0, 1.5))
  axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  return figures.save(figure, workdir, "classes")
