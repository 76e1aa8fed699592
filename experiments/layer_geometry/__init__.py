"""Layer geometry: every layer's update in a tokenwise part and the rest, nulls, interventions, and what they cost.

With config.model = "hf:DIR" nothing is trained: only that checkpoint is measured.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import results
from experiments.layer_geometry import figures as pictures
from experiments.layer_geometry.claims import make_claims
from experiments.layer_geometry.cost import time_fits, time_interventions
from experiments.overlap import overlapped
from experiments.results import Report
from experiments.snlp import training_loss
from experiments.text import checkpoint_folder, load_text, model_config, train_model
from jaxlab.core.checks import require, require_choice
from jaxlab.data.tokens import Tokens
from jaxlab.depth import layer_geometry as geometry
from jaxlab.depth import layer_geometry_classes as classes
from jaxlab.models import Transformer, hub

LOCAL = ("diagonal", "low_rank", "orthogonal")
CLASSES = ("identity", "token_lookup", "global_affine", *LOCAL, "mlp", "context")
MAIN = "mlp"  # the strongest tokenwise class; claims, doses and noise are about this one
UNTRAINED = "untrained"

_intervene = jax.jit(geometry.intervene, static_argnames=("layer", "skip"))
_collect = jax.jit(geometry.collect)
_neighbours = jax.jit(classes.neighbours, static_argnames="k")


def run(config, workdir: Path, cache: Path, console) -> Report:
  for name in config.intervene.classes:
    require_choice("an entry of config.intervene.classes", name, CLASSES)
  require(MAIN in config.intervene.classes, f"config.intervene.classes lacks {MAIN!r}, the class of the claims")
  models = {}
  for name, model, text in load_models(config, workdir, cache, console):
    measured = []
    for seed in range(config.splits):
      rows, title = split_rows(text.split(config.data.split), config, seed), f"{name}, split {seed}"
      work = functools.partial(measure, config, model, rows, title, console)
      measured.append(results.part(workdir, f"{name}.{seed}".replace(" ", "."), work))
    models[name] = average(measured) | {"parameters": sum(a.size for a in jax.tree.leaves(model))}
  console.say("timing")
  timed = {"fits": time_fits, "interventions": time_interventions}
  cost = {name: results.part(workdir, f"cost.{name}", lambda f=f: f(config.bench)) for name, f in timed.items()}
  metrics = {"models": models, "cost": cost}
  files = {
    pictures.draw_alignment(models, MAIN, workdir): "Cosines of update, tokenwise part and residual by layer, with the "
    "isotropic null and the cosines that R^2 alone gives; energies in the dominant tokenwise subspace",
    pictures.draw_null(models, workdir): "Cosines against the curve of an orthogonal fit, every class and layer",
    pictures.draw_harm(models, MAIN, workdir): "Rank correlation of the residual's size with the KL of taking it away, "
    "by layer; KL against the share that is taken away, and of noise of the same norm",
    pictures.draw_classes(models, CLASSES, workdir): "Unexplained variance of every class by layer",
    pictures.draw_cost(
      cost, workdir
    ): "Seconds against size, with the log-log slopes at the end: overheads rule the start",
  }
  return Report(metrics, make_claims(models, MAIN, UNTRAINED, cost), files)


def load_models(config, workdir: Path, cache: Path, console):
  """(name, model, text in its tokens): one checkpoint, or trained sizes, the largest untrained, and shipped ones.

  With config.idn.weight the largest is trained once more with SNLP's regulariser.
  """
  folder = checkpoint_folder(config)
  if folder:
    yield folder.name, hub.load(folder, dtype="float32"), load_text(config, cache, given=folder)
    return
  text = load_text(config, cache)
  jobs = [(f"{depth} layers", depth, None) for depth in config.depths]
  if config.idn.weight:
    jobs.append((f"{config.depths[-1]} layers, IDN", config.depths[-1], config.idn))
  for name, depth, regulariser in jobs:
    loss, shape = (
      training_loss(config, regulariser),
      model_config(config, text.bpe.get_vocab_size(), context=config.train.length, depth=depth),
    )
    start = Transformer(shape, jax.random.key(config.seed))
    trained = train_model(config, text, start, loss, workdir=workdir / name, console=console, title=name)
    # Off the training mesh: arrays placed differently would compile everything once more.
    yield name, jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), trained), text
  yield UNTRAINED, random_outputs(start, jax.random.key(config.seed + 1)), text
  for name in config.checkpoints:
    given = hub.find(name)
    yield name, hub.load(given, dtype="float32"), load_text(config, cache, given=given)


def random_outputs(model: Transformer, key: jax.Array) -> Transformer:
  """Matrices that start at zero drawn at random: with them at zero an untrained nanochat layer does nothing at all."""
  leaves, structure = jax.tree.flatten(model)
  fill = lambda a, k: jax.random.normal(k, a.shape, a.dtype) / a.shape[-2] ** 0.5
  keys = jax.random.split(key, len(leaves))
  fresh = [fill(a, k) if a.ndim == 3 and not a.any() else a for a, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(structure, fresh)


def split_rows(tokens: Tokens, config, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{"reference", "evaluation": (rows of BOS and text, the document of each row)}, no document in both.

  A third of the documents is for evaluation. Every document gives a row in turn, its pieces in random order.
  """
  random, piece = np.random.default_rng(seed), config.data.row - 1
  counts = np.diff(tokens.offsets) // piece
  usable = random.permutation(np.flatnonzero(counts))
  require(
    len(usable) >= 3, f"only {len(usable)} documents have {piece} tokens; give longer ones or lower config.data.row"
  )
  cut = len(usable) // 3
  result = {}
  for part, chosen in (("evaluation", usable[:cut]), ("reference", usable[cut:])):
    pieces = [(turn, d, at) for d in chosen for turn, at in enumerate(random.permutation(counts[d]))]
    pieces = sorted(pieces, key=lambda p: p[0])[: config.data[part]]
    require(
      len(pieces) == config.data[part],
      f"{len(pieces)} rows of {piece} tokens for {part}, config.data.{part} asks for {config.data[part]}; lower it",
    )
    cut_out = lambda d, at: tokens.document(d)[at * piece : (at + 1) * piece]
    rows = [np.concatenate([[tokens.bos], cut_out(d, at)]) for _, d, at in pieces]
    result[part] = np.array(rows, np.int32), np.array([d for _, d, _ in pieces])
  return result


def predict(reference, query, own, mlp, *, k: int, **options) -> dict[str, jax.Array]:
  """T(x) of every class for the query tokens, fitted on the reference tokens of one layer."""
  near = _neighbours(reference["x"], query["x"], k=k, own=own)
  return {name: _predict(name, reference, query, near, mlp, **options) for name in CLASSES}


@functools.partial(jax.jit, static_argnames=("name", "rank", "ridge", "vocab"))
def _predict(name: str, reference, query, near, mlp, *, rank: int, ridge: float, vocab: int):
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


@jax.jit
def gather(traces, ids, layer, sample, shuffle):
  """Of one layer: evaluation tokens, reference tokens, a sample of these, and these with shuffled increments (N1)."""
  flat = lambda a: a.reshape(-1, a.shape[-1])

  def tokens_of(part):
    x, y = (a[layer] for a in traces[part])
    return {"x": flat(x), "y": flat(y), "context": flat(classes.prefix_mean(x)), "ids": ids[part].reshape(-1)}

  query, reference = tokens_of("evaluation"), tokens_of("reference")
  few = {name: a[sample] for name, a in reference.items()}
  return query, reference, few, reference | {"y": reference["x"] + (reference["y"] - reference["x"])[shuffle]}


@functools.partial(jax.jit, static_argnames="dimensions")
def draw_nulls(query, few, outputs, inside, key, *, dimensions: int) -> dict:
  """Geometry of one class per token, the same with an isotropic residual (N2), and equal-norm noise (N5)."""
  u, t = query["y"] - query["x"], outputs - query["x"]
  basis = geometry.dominant_subspace(inside - few["x"], dimensions=dimensions)
  isotropic, noise = jax.random.split(key)
  return {
    "ours": geometry.geometry(u, t, basis),
    "isotropic": geometry.geometry(t + geometry.isotropic(isotropic, u - t), t, basis),
    "noise": geometry.orthogonal_noise(noise, u - t, t),
  }


@jax.jit
def prior_measures(x, y) -> dict:
  return {
    "linearity": geometry.linearity(x, y),
    "linearity_of_increment": geometry.linearity(x, y - x),
    "block_influence": geometry.block_influence(x, y),
  }


@functools.partial(jax.jit, static_argnames="dimensions")
def describe(query, few, mean, outputs, inside, of_null, *, dimensions: int) -> dict:
  """The figures of one class: mean and median over tokens, in both forms, with and without the mean; and its N1.

  Args:
    mean: the reference tokens' mean increment.
    outputs: T(x) of the evaluation tokens.
    inside: of the sample of reference tokens, each left out of its own fit: they give the dominant subspace.
    of_null: of the evaluation tokens, fitted to shuffled increments.
  """
  x, y = query["x"], query["y"]
  u, t, t_reference = y - x, outputs - x, inside - few["x"]
  basis, state_basis = (geometry.dominant_subspace(a, dimensions=dimensions) for a in (t_reference, inside))
  forms = {
    "increment": geometry.geometry(u, t, basis),
    "increment_centred": geometry.geometry(u, t, basis, mean=mean),
    "state": geometry.geometry(y, outputs, state_basis),
    "state_centred": geometry.geometry(y, outputs, state_basis, mean=inside.mean(axis=0)),
  }
  summary = lambda values: {"mean": values.mean(), "median": jnp.median(values)}
  return jax.tree.map(summary, forms) | {
    "fvu": geometry.fvu(u, t),
    "r2": geometry.explained(u, t),
    "state_fvu": geometry.fvu(y, outputs),
    "dimensions_95": geometry.effective_dimensions(t_reference),
    "shuffled": {
      "fvu": geometry.fvu(u, of_null - x),
      "cos_ut": geometry.geometry(u, of_null - x, basis)["cos_ut"].mean(),
    },
  }


def measure(config, model: Transformer, rows: dict, title: str, console) -> dict:
  """Everything about one model on one split: {"layers": a row a layer, "across_layers": by class}."""
  f = config.fit
  traces = {part: _collect(model, jnp.asarray(tokens)) for part, (tokens, _) in rows.items()}
  ids = {part: jnp.asarray(tokens[:, geometry.SKIP :]) for part, (tokens, _) in rows.items()}
  x, y = (a.reshape(model.depth, -1, a.shape[-1]) for a in traces["reference"])
  count, total = ids["evaluation"].size, ids["reference"].size
  console.say(f"{title}: {model.depth} layers, {total} reference and {count} evaluation tokens")
  require(count <= total, f"{count} evaluation tokens, {total} for reference; there must be at least as many of these")
  shuffle = np.random.default_rng(config.seed).permutation(total)
  mlps = fit_mlps(x, y - x, shuffle, jax.random.key(config.seed), steps=f.steps, batch=f.batch)
  sample = np.linspace(0, total - 1, count).astype(int)
  options = dict(k=f.neighbours, rank=f.rank, ridge=f.ridge, vocab=model.config.vocab_size)
  documents = np.repeat(rows["evaluation"][1], ids["evaluation"].shape[1])
  none, mlp = np.full(count, -1), lambda i: jax.tree.map(lambda a: a[i], mlps)
  layers = []
  if jax.default_backend() != "cpu":
    compile_side_by_side(config, model, rows["evaluation"][0], gather(traces, ids, 0, sample, shuffle), mlp(0), options)
  for layer in console.track(title, range(model.depth)):
    query, reference, few, shuffled = gather(traces, ids, layer, sample, shuffle)
    outputs = predict(reference, query, none, mlp(layer), **options)
    inside = predict(reference, few, sample, mlp(layer), **options)
    of_null = predict(shuffled, query, none, mlp(model.depth + layer), **options)
    key = jax.random.fold_in(jax.random.key(config.seed), layer)
    dimensions = min(f.subspace, x.shape[-1])
    mean = (reference["y"] - reference["x"]).mean(axis=0)
    described = {
      name: describe(query, few, mean, outputs[name], inside[name], of_null[name], dimensions=dimensions)
      for name in CLASSES
    }
    result = draw_nulls(query, few, outputs[MAIN], inside[MAIN], key, dimensions=dimensions)
    result |= {"x": query["x"], "y": query["y"], "outputs": outputs}
    row = jax.tree.map(float, jax.device_get({"classes": described} | prior_measures(query["x"], query["y"])))
    row["affine_lens_kl"] = float(_lens(model, traces["reference"], traces["evaluation"], layer, f.ridge).mean())
    row["nulls"] = compare_nulls(result, documents, f, config.seed)
    layers.append(row | interventions(config, model, rows["evaluation"][0], result, layer, documents))
  return {
    "layers": layers,
    "across_layers": {name: across(layers, name) for name in config.intervene.classes},
    "suffix": jax.tree.map(float, jax.device_get(suffix_dependence(model, jnp.asarray(rows["evaluation"][0])))),
  }


@jax.jit
def suffix_dependence(model, tokens) -> list[dict]:
  """Of the last half of the layers: the input dependence of every update, its cosine, and one IDN step's error."""
  u, v = geometry.frozen_updates(model, tokens, layers=max(1, model.depth // 2))
  size = lambda a: jnp.linalg.norm(a, axis=-1)
  ratio = lambda a, b: jnp.mean(size(a) / jnp.maximum(size(b), 1e-12))
  row = lambda u, v, sum_u, sum_v: {
    "dependence": ratio(u - v, u),
    "cosine": jnp.mean(jnp.sum(u * v, axis=-1) / jnp.maximum(size(u) * size(v), 1e-12)),
    "one_step_error": ratio(sum_v - sum_u, sum_u),
  }
  return [row(*parts) for parts in zip(u, v, jnp.cumsum(u, axis=0), jnp.cumsum(v, axis=0), strict=True)]


def compile_side_by_side(config, model, tokens, parts, mlp, options) -> None:
  """The first call of every class and of every layer's intervention; an accelerator's host has cores for all."""
  query, reference, _, _ = parts
  near = _neighbours(reference["x"], query["x"], k=options["k"], own=np.full(len(query["x"]), -1))
  fixed = {name: value for name, value in options.items() if name != "k"}
  y = query["y"].reshape(len(tokens), tokens.shape[1] - geometry.SKIP, -1)
  jobs = [functools.partial(_predict, name, reference, query, near, mlp, **fixed) for name in CLASSES]
  jobs += [functools.partial(_intervene, model, jnp.asarray(tokens), y, layer=layer) for layer in range(model.depth)]
  jax.block_until_ready(list(overlapped(lambda job: job(), jobs)))


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def fit_mlps(x, u, shuffle, key, *, steps: int, batch: int):
  """The MLPs of all L layers, then those of N1 (increments of other tokens), trained as one batch of 2 L."""
  fit = functools.partial(classes.fit_mlp, steps=steps, batch=batch)
  return jax.vmap(fit)(jnp.concatenate([x, x]), jnp.concatenate([u, u[:, shuffle]]), jax.random.split(key, 2 * len(x)))


@jax.jit
def _lens(model, reference, evaluation, layer, ridge):
  return geometry.affine_lens(model, reference, evaluation, layer=layer, ridge=ridge)


def compare_nulls(result, documents, fit, seed: int) -> dict:
  """cos(u, t) - cos(r, t) and E(u) / E(r) against N2 (isotropic residual) and N3 (an orthogonal fit of the same R^2).

  The intervals are of the differences (of logarithms, for the ratio), documents drawn with replacement.
  """
  ours, theirs = (jax.tree.map(np.asarray, result[name]) for name in ("ours", "isotropic"))
  y, x, outputs = (np.asarray(a) for a in (result["y"], result["x"], result["outputs"][MAIN]))
  residual, whole = ((y - outputs) ** 2).sum(axis=1), ((y - x) ** 2).sum(axis=1)
  gap = lambda g, i: float(np.mean(g["cos_ut"][i] - g["cos_rt"][i]))
  ratio = lambda g, i: float(g["in_u"][i].mean() / max(g["in_r"][i].mean(), 1e-12))
  root = lambda i: float(np.sqrt(max(1 - residual[i].sum() / max(whole[i].sum(), 1e-12), 0.0)))
  log = lambda value: np.log(max(value, 1e-12))
  interval = functools.partial(geometry.document_bootstrap, documents=documents, resamples=fit.resamples, seed=seed)
  everything = np.arange(len(y))
  return {
    "gap": gap(ours, everything),
    "gap_isotropic": gap(theirs, everything),
    "gap_orthogonal": root(everything),
    "ratio": ratio(ours, everything),
    "ratio_isotropic": ratio(theirs, everything),
    "gap_over_isotropic": interval(lambda i: gap(ours, i) - gap(theirs, i)),
    "gap_over_orthogonal": interval(lambda i: gap(ours, i) - root(i)),
    "log_ratio_over_isotropic": interval(lambda i: log(ratio(ours, i)) - log(ratio(theirs, i))),
  }


def interventions(config, model, tokens, result, layer: int, documents) -> dict:
  """KL of y := T(x) by class and mode with its rank correlations; doses and equal-norm noise of the main class."""
  tokens, (y, outputs) = jnp.asarray(tokens), (result["y"], result["outputs"])
  kept = (len(tokens), tokens.shape[1] - geometry.SKIP, -1)
  do = lambda written: _intervene(model, tokens, written.reshape(kept), layer=layer)
  by_class = {}
  for name in config.intervene.classes:
    out = do(outputs[name])
    values = jax.tree.map(np.asarray, _association(out, result["x"], y, outputs[name]))
    by_class[name] = {mode: spread_of(values, mode, documents, config.fit) for mode in geometry.MODES} | {
      name: float(values[name].mean()) for name in ("relative_error", "absolute_error")
    }
  mean_kl = lambda out: {mode: float(out[mode]["kl"].mean()) for mode in geometry.MODES}
  removed = {f"{dose:g}": mean_kl(do(y - dose * (y - outputs[MAIN]))) for dose in config.intervene.doses}
  return {"interventions": by_class, "doses": removed, "noise": mean_kl(do(y + result["noise"]))}


@jax.jit
def _association(out, x, y, outputs) -> dict:
  """Per token errors and harm, and their rank correlations raw and with ||u|| and the entropy of p held fixed."""
  size, error = (jnp.linalg.norm(a, axis=1) for a in (y - x, y - outputs))
  relative = error / jnp.maximum(size, 1e-12)
  values = {"relative_error": relative, "absolute_error": error}
  for mode in geometry.MODES:
    harm = {name: a.reshape(-1) for name, a in out[mode].items()}
    values[mode] = harm | {
      "spearman": geometry.spearman(error, harm["kl"]),
      "spearman_relative": geometry.spearman(relative, harm["kl"]),
      "partial": geometry.partial_spearman(error, harm["kl"], [size, out["entropy"].reshape(-1)]),
    }
  return values


def spread_of(values: dict, mode: str, documents, fit) -> dict:
  """The means of one mode, and the interval of its rank correlation over documents."""
  harm, error = values[mode], values["absolute_error"]
  interval = geometry.document_bootstrap(
    lambda i: _spearman(error[i], harm["kl"][i]), documents, resamples=fit.resamples
  )
  return {name: float(a.mean()) for name, a in harm.items()} | {
    "kl_median": float(np.median(harm["kl"])),
    "spearman_interval": interval,
  }


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
  """On the host: resamples differ in size, and each would be compiled anew."""
  return scipy.stats.spearmanr(a, b).statistic


def across(layers: list[dict], name: str) -> float:
  """Spearman over layers of the mean relative error and the mean single-token KL."""
  rows = [layer["interventions"][name] for layer in layers]
  return float(_spearman([r["relative_error"] for r in rows], [r["single_token"]["kl"] for r in rows]))


def average(trees: list[dict]) -> dict:
  """The mean of every number over the splits."""
  return jax.tree.map(lambda *values: float(np.mean(values)), *trees)
