"""SNLP: train a model with and without the regulariser, run both layer-parallel, report quality and speed.

With config.model = "hf:DIR" nothing is trained: the method is run on that checkpoint as it is.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import (
  results,
  snlp_claims,
  snlp_convergence,
  snlp_figures,
  snlp_finetuning,
  snlp_speculation,
  snlp_speed,
  timing,
)
from experiments.results import Report
from experiments.snlp_claims import MHC, MHC_MOVING, MHC_REGULARISED, PLAIN, REGULARISED
from experiments.snlp_settings import forward, parse, refit_config
from experiments.text import Text, checkpoint_folder, load_text, model_config, train_model
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.depth import snlp, snlp_inference, snlp_suffix
from jaxlab.models import Transformer, hub
from jaxlab.models.config import HyperConnections
from jaxlab.models.transformer import sequential
from jaxlab.training import loop, losses
from jaxlab.training.optimizers import muon_adamw

TRAINING_PARTS = ("memory", "hcn", "competitors", "finetuning")  # not for a given checkpoint


def run(config, workdir: Path, cache: Path, console) -> Report:
  """Measures the parts of config.parts; a part that this workdir holds already is not measured again."""
  folder = checkpoint_folder(config)
  parts = config.parts
  if folder:
    config = refit_config(config, hub.read_config(folder)[0].depth)
    parts = [name for name in parts if name not in TRAINING_PARTS]
  for text in (*config.snlp.settings, *config.snlp.cached):
    parse(text)

  @functools.cache
  def prepared():
    text = load_text(config, cache, given=folder)
    if folder:
      models = {PLAIN: hub.load(folder)}
    else:
      shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
      check_suffixes(config, shape.depth)
      models = train_models(config, text, shape, {PLAIN: None, REGULARISED: config.reg}, workdir, console)
    check_suffixes(config, next(iter(models.values())).depth)
    return text, {name: loop.cast(model, config.train.dtype) for name, model in models.items()}

  def with_streams():
    """The pair with hyper-connections and their own regulariser, and one whose targets keep their gradient."""
    own = config.copy_and_resolve_references()
    own.train.steps = config.hcn.steps
    text = load_text(own, cache)
    shape = model_config(own, text.bpe.get_vocab_size(), context=own.train.length, hyper=HyperConnections())
    moving = own.hcn.reg.copy_and_resolve_references()
    moving.detach_target = moving.detach_input = False
    regularisers = {MHC: None, MHC_REGULARISED: own.hcn.reg, MHC_MOVING: moving}
    models = train_models(own, text, shape, regularisers, workdir, console)
    return text, {name: loop.cast(model, config.train.dtype) for name, model in models.items()}

  measures = {
    "quality": lambda: measure_quality(config, *prepared(), console),
    "convergence": lambda: snlp_convergence.measure(config, *prepared(), console),
    "speculation": lambda: snlp_speculation.measure(config, *prepared(), console),
    "hcn": lambda: measure_hcn(config, *with_streams(), console),
    "competitors": lambda: measure_competitors(config, *prepared(), workdir, console),
    "finetuning": lambda: snlp_finetuning.measure(config, *prepared(), workdir, console),
    "memory": lambda: measure_memory(config, load_text(config, cache)),
  }
  metrics = {name: results.part(workdir, name, measures[name]) for name in parts if name != "speed"}
  if "speed" in parts:
    last = lambda: next(reversed(prepared()[1].values()))
    metrics["speed"] = snlp_speed.measure(config.bench, last, workdir, console)
  claims, files = [], {}
  if quality := metrics.get("quality"):
    claims += snlp_claims.quality(config, quality)
    files |= snlp_figures.quality(quality, workdir, trained=not folder)
  if "convergence" in metrics:
    claims += snlp_convergence.claims(metrics["convergence"])
    files |= snlp_convergence.draw(metrics["convergence"], workdir)
  if "hcn" in metrics:
    claims += snlp_claims.hcn(metrics["hcn"])
  if "competitors" in metrics:
    claims += snlp_claims.competitors(metrics["competitors"])
    files |= snlp_figures.competitors(metrics["competitors"], workdir)
  if "finetuning" in metrics:
    claims += snlp_finetuning.claims(metrics["finetuning"], config.finetuning.setting)
  if "memory" in metrics:
    claims += snlp_claims.memory(metrics["memory"])
  if "speculation" in metrics:
    claims += snlp_speculation.claims(metrics["speculation"], PLAIN if folder else REGULARISED)
  if speed := metrics.get("speed"):
    claims += snlp_claims.speed(config, speed["cases"])
    metrics["latency_model"] = snlp_speed.latency_fits(speed["cases"])
    files |= snlp_speed.draw(speed, metrics["latency_model"], tuple(config.bench.shown), workdir)
    if quality:
      files |= snlp_figures.frontier(metrics, workdir)
  return Report(metrics, claims, files)


def check_suffixes(config, depth: int) -> None:
  wanted = [parse(text)["layers"] for text in (*config.snlp.settings, *config.snlp.cached)]
  for n in (*wanted, *config.reg.layers):
    require(1 <= n <= depth, f"n_par={n} layers in parallel, but the model has {depth}; see snlp.settings, reg.layers")


def training_loss(config, reg=None):
  """Cross-entropy, with the regulariser that `reg` describes if given."""
  remat = config.train.remat

  def plain_loss(model, batch, step, key):
    return losses.language_model_loss(model, batch, remat=remat)

  def regularised_loss(model, batch, step, key):
    h0, trace, side = model.trace(batch["inputs"], remat=remat)
    backout = trace[model.depth // 2] if model.config.backout else None
    ce = losses.mean_loss(losses.token_losses(model, (trace[-1], backout), batch["targets"]), batch["targets"])
    r = snlp.regulariser(
      model,
      h0,
      trace,
      side,
      layers=tuple(reg.layers),
      stride=reg.stride,
      surrogate=reg.surrogate,
      detach_target=reg.detach_target,
      detach_input=reg.detach_input,
      key=key if reg.sampled else None,
      remat=remat != "none",
    )
    weight = snlp.regulariser_weight(step, weight=reg.weight, steps=config.train.steps)
    return ce + weight * r, {"cross_entropy": ce, "regulariser": r}

  return regularised_loss if reg else plain_loss


def train_models(config, text: Text, shape, regularisers: dict, workdir: Path, console) -> dict[str, Transformer]:
  """{name: a model trained with that regulariser (None: without)}, from the same parameters and on the same data."""
  start = Transformer(shape, jax.random.key(config.seed))
  return {
    name: train_model(
      config, text, start, training_loss(config, how), workdir=workdir / name, console=console, title=name
    )
    for name, how in regularisers.items()
  }


def measure_hcn(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Perplexities of the models with hyper-connections, solved with their mixing matrices (HCN) and with A = I."""
  e = config.eval
  batches = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.tokens)
  evaluate = losses.evaluator(jax.jit(lambda m, tokens: m.hidden(tokens)))
  result = {name: {"sequential": evaluate(m, batches), "snlp": {}} for name, m in models.items()}
  for setting in console.track("evaluating hyper-connections", config.hcn.settings):
    for surrogate in ("streams", "identity"):
      solved = losses.evaluator(jax.jit(forward(f"{setting} {surrogate}")))
      for name, m in models.items():
        result[name]["snlp"][f"{setting} {surrogate}"] = solved(m, batches)
  return result


def measure_competitors(config, text: Text, models: dict[str, Transformer], workdir: Path, console) -> dict:
  """Shallower or wider networks of the same training beside SNLP's settings: perplexity, and one decoding step's speed.

  {name: {"perplexity", "speedup" over the whole regularised network, "p10", "p90", "parameters"}}.
  """
  c, e = config.competitors, config.eval
  batches = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.tokens)
  main = models[REGULARISED]
  evaluate = losses.evaluator(jax.jit(lambda m, tokens: m.hidden(tokens)))
  result = {"sequential": evaluate(main, batches)}
  networks = {"sequential": (snlp_inference.split(main), {})}
  for setting in c.settings:
    s = parse(setting)
    result[setting] = losses.evaluator(jax.jit(forward(setting)))(main, batches)
    layers = snlp_suffix.fuse(main, s["layers"], chunk=s["chunk"]) if s["chunk"] else s["layers"]
    options = {key: s[key] for key in ("iterations", "surrogate", "initial")}
    networks[setting] = (snlp_inference.split(main, layers), options)
  for name, changes in c.shapes.items():
    shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length, **changes)
    start = Transformer(shape, jax.random.key(config.seed))
    model = train_model(config, text, start, training_loss(config), workdir=workdir / name, console=console, title=name)
    model = loop.cast(model, config.train.dtype)
    result[name] = evaluate(model, batches) | {"parameters": shape.matmul_parameters}
    networks[name] = (snlp_inference.split(model), {})
  runs = {}
  for name, (network, options) in networks.items():
    state = snlp_inference.empty_state(network, batch=1, capacity=c.context + 600)
    state = dataclasses.replace(state, length=jnp.int32(c.context))
    step = functools.partial(snlp_inference.step, **options)
    runs[name] = timing.Steady(step, network, jnp.zeros((1, 1), jnp.int32), carry=state)
  times = timing.compare(runs, repetitions=c.repetitions, inner=20)
  for name in runs:
    ratio, (low, high) = times.speedup(name, "sequential")
    result[name] |= {"speedup": ratio, "p10": low, "p90": high, "milliseconds": times.summary()[name]}
  return result


def measure_memory(config, text: Text) -> dict:
  """Temporary bytes of a compiled training step, plain and regularised."""
  shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
  t, mesh = config.train, meshes.make_mesh(config.mesh.to_dict())
  optimizer = muon_adamw(shape, steps=t.steps, batch_tokens=t.batch * t.length)
  state = loop.initial_state(Transformer(shape, jax.random.key(0)), optimizer, mesh, 0)
  ids = jax.ShapeDtypeStruct((t.batch, t.length), jnp.int32, sharding=meshes.batch_sharding(mesh))
  result = {}
  for name, loss in ((PLAIN, training_loss(config)), (REGULARISED, training_loss(config, config.reg))):
    step = loop.make_step(
      loss, optimizer, meshes.shardings(state, mesh), accumulate=t.accumulate, compute_dtype=t.dtype
    )
    result[name] = timing.memory(step.lower(state, {"inputs": ids, "targets": ids}).compile())
  return result


def measure_quality(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Perplexity of every model, sequential, by the baselines and at every setting; agreement and trace errors."""
  e = config.eval
  split = text.split(e.split)
  full = packing.evaluation_batches(split, row=e.length, batch=e.batch, limit=e.tokens)
  slices = packing.mid_document_batches(split, row=e.slice, batch=e.batch, limit=e.tokens)
  depth = next(iter(models.values())).depth
  evaluate = losses.evaluator(jax.jit(lambda m, tokens: m.hidden(tokens)), text.token_bytes)
  result = {
    name: {
      "depth": depth,
      "sequential": evaluate(m, full),
      "sequential_slices": evaluate(m, slices),
      "snlp": {},
      "baselines": {},
      "cached": {},
    }
    for name, m in models.items()
  }
  for n in dict.fromkeys(parse(text)["layers"] for text in config.snlp.settings):
    for baseline, hidden in (("early exit", early_exit), ("painters", painters)):
      if n < depth:
        loss = losses.evaluator(jax.jit(functools.partial(hidden, n=n)))
        for name, m in models.items():
          result[name]["baselines"][f"{baseline} n{n}"] = loss(m, full)
  sample = full[0]["inputs"]
  expected = {name: jax.jit(lambda m: m(sample))(m) for name, m in models.items()}
  for setting in console.track("evaluating", config.snlp.settings):
    hidden = jax.jit(forward(setting))
    parallel = losses.evaluator(hidden, text.token_bytes)
    for name, m in models.items():
      top1, cosine = _agreement(m, hidden(m, sample), expected[name])
      result[name]["snlp"][setting] = parallel(m, full) | {
        **parse(setting),
        "slices": parallel(m, slices)["perplexity"] if setting in config.snlp.sliced else None,
        "top1_agreement": float(top1),
        "logit_cosine": float(cosine),
      }
  for setting in config.snlp.cached:
    for name, m in models.items():
      result[name]["cached"][setting] = cached_loss(m, full[0], setting)
  error = jax.jit(snlp.trace_error, static_argnames=("layers", "iterations", "surrogate"))
  for name, m in models.items():
    chosen = dict(layers=max(config.reg.layers), iterations=1, surrogate=config.reg.surrogate)
    result[name]["trace_error"] = np.asarray(error(m, sample, **chosen)).tolist()
    result[name]["jacobian_norms"] = np.asarray(jax.jit(snlp.jacobian_norms)(m, sample, jax.random.key(0))).tolist()
  return result


def early_exit(model: Transformer, tokens, n: int):
  """The network without its last n layers."""
  x, side, _ = model.embed(tokens)
  x, backout, _, _ = sequential(model, x, side, stop=model.depth - n)
  return x, (x if model.config.backout and model.depth // 2 >= model.depth - n else backout)


def painters(model: Transformer, tokens, n: int):
  """The last n layers on the same input, their outputs averaged (Layers as Painters)."""
  x, side, _ = model.embed(tokens)
  x, backout, _, _ = sequential(model, x, side, stop=model.depth - n)
  states = snlp.solve(model, x, side, layers=n, iterations=1, surrogate="jacobi").trace
  if model.config.backout and model.depth // 2 >= model.depth - n:
    backout = states[model.depth // 2 - (model.depth - n) + 1]
  return states[1:].mean(axis=0).astype(x.dtype), backout


def cached_loss(model: Transformer, batch: dict, setting: str) -> dict:
  """Teacher-forced loss of the cached decoder, token by token from an empty cache, beside the sequential network's.

  {"recompute", "last_iteration": by what the cache keeps, "uncached": one forward at the setting, "sequential"}.
  """
  rows = jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"])
  network = snlp_inference.split(model, parse(setting)["layers"])
  sums = {kept: _decoded_loss(network, *rows, setting, kept) for kept in snlp_inference.CACHE_KV}
  sums |= _forward_losses(model, *rows, setting)
  return {name: float(total) / int((rows[1] >= 0).sum()) for name, total in sums.items()}


@functools.partial(jax.jit, static_argnames=("setting", "cache_kv"))
def _decoded_loss(network, inputs, targets, setting: str, cache_kv: str):
  options = {key: parse(setting)[key] for key in ("iterations", "surrogate", "initial")}

  def one(state, pair):
    token, target = pair
    logits, state = snlp_inference.step(network, token[:, None], state, cache_kv=cache_kv, **options)
    chosen = jnp.take_along_axis(logits[:, 0], jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
    loss = jax.nn.logsumexp(logits[:, 0], axis=-1) - chosen
    return state, jnp.where(target >= 0, loss, 0.0).sum()

  state = snlp_inference.empty_state(network, batch=inputs.shape[0], capacity=inputs.shape[1])
  return jax.lax.scan(one, state, (inputs.T, targets.T))[1].sum()


@functools.partial(jax.jit, static_argnames="setting")
def _forward_losses(model, inputs, targets, setting: str):
  total = lambda states: losses.token_losses(model, states, targets).sum()
  return {"uncached": total(forward(setting)(model, inputs)), "sequential": total(model.hidden(inputs))}


@jax.jit
def _agreement(model, states, expected):
  """Share of positions with the sequential network's argmax, and mean cosine of the logits."""
  a, b = expected, model.logits(*states)
  cosine = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
  return jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1)), jnp.mean(cosine)
