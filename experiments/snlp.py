"""SNLP: train a model with and without the regulariser, run both layer-parallel, report quality and speed.

With config.model = "hf:DIR" nothing is trained: the method is run on that checkpoint as it is.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, timing
from experiments.results import Claim, Report
from experiments.text import Text, checkpoint_folder, load_text, model_config, train_model
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.depth import snlp
from jaxlab.models import Transformer, hub
from jaxlab.models.transformer import sequential
from jaxlab.training import losses
from jaxlab.training.loop import cast
from jaxlab.training.metrics import read_metrics

PLAIN, REGULARISED = "plain", "regularised"


def run(config, workdir: Path, cache: Path, console) -> Report:
  folder = checkpoint_folder(config)
  text = load_text(config, cache, given=folder)
  if folder:
    models = {PLAIN: hub.load(folder)}
  else:
    shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
    check_suffixes(config, shape.depth)
    models = train_pair(config, text, shape, workdir, console)
  depth = next(iter(models.values())).depth
  check_suffixes(config, depth)
  quality = measure_quality(config, text, models, console)
  speed = measure_speed(config, next(reversed(models.values())), console)
  metrics = {"quality": quality, "speed": speed}
  files = {
    draw_perplexity(quality, depth, workdir): "Perplexity lost against the sequential network, by Newton steps K"
  }
  files[draw_trace_error(quality, workdir)] = "Error of one Newton step at each layer of the suffix"
  if not folder:
    files[draw_training(workdir, models)] = "Training loss of the two models"
  return Report(metrics, make_claims(config, quality, speed, depth), files)


def check_suffixes(config, depth: int) -> None:
  for n in (*config.snlp.layers, *config.reg.layers):
    require(1 <= n <= depth, f"n_par={n} layers in parallel, but the model has {depth}; lower snlp.layers / reg.layers")


def train_pair(config, text: Text, shape, workdir: Path, console) -> dict[str, Transformer]:
  """The same initial parameters and data, without and with the regulariser."""

  def plain_loss(model, batch, step, key):
    return losses.language_model_loss(model, batch)

  def regularised_loss(model, batch, step, key):
    h0, trace, side = model.trace(batch["inputs"])
    backout = trace[model.depth // 2] if model.config.backout else None
    ce = losses.mean_loss(losses.token_losses(model, (trace[-1], backout), batch["targets"]), batch["targets"])
    r = snlp.regulariser(
      model,
      h0,
      trace,
      side,
      layers=tuple(config.reg.layers),
      stride=config.reg.stride,
      surrogate=config.snlp.surrogate,
      detach_target=config.reg.detach_target,
      key=key if config.reg.sampled else None,
    )
    weight = snlp.regulariser_weight(step, weight=config.reg.weight, steps=config.train.steps)
    return ce + weight * r, {"cross_entropy": ce, "regulariser": r}

  start = Transformer(shape, jax.random.key(config.seed))
  go = functools.partial(train_model, config, text, start, console=console)
  return {
    PLAIN: go(plain_loss, workdir=workdir / PLAIN, title=PLAIN),
    REGULARISED: go(regularised_loss, workdir=workdir / REGULARISED, title=REGULARISED),
  }


def settings(config, depth: int) -> list[dict]:
  """The grid: n x K with the configured surrogate and start; one batch_fwd, one Jacobi; K = n once."""
  surrogate, layers, steps = config.snlp.surrogate, list(config.snlp.layers), list(config.snlp.iterations)
  grid = [dict(layers=n, iterations=k, surrogate=surrogate, initial="h0") for n in layers for k in steps]
  n = layers[-1]
  grid.append(dict(layers=n, iterations=1, surrogate=surrogate, initial="batch_fwd"))
  grid.append(dict(layers=n, iterations=2, surrogate="jacobi", initial="h0"))
  grid.append(dict(layers=layers[0], iterations=layers[0], surrogate=surrogate, initial="h0"))
  return grid


def describe(setting: dict) -> str:
  return f"n{setting['layers']} K{setting['iterations']} {setting['surrogate']} {setting['initial']}"


def measure_quality(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Perplexity of every model, sequential, without its suffix, and at every setting; agreement and trace errors."""
  e = config.eval
  split = text.split(e.split)
  full = packing.evaluation_batches(split, row=e.length, batch=e.batch, limit=e.tokens)
  slices = packing.mid_document_batches(split, row=e.slice, batch=e.batch, limit=e.tokens)
  depth = next(iter(models.values())).depth
  computing = {name: cast(model, config.train.dtype) for name, model in models.items()}
  plain = lambda m, tokens: m.hidden(tokens)
  evaluate = losses.evaluator(plain, text.token_bytes)
  result = {
    name: {"sequential": evaluate(m, full), "sequential_slices": evaluate(m, slices), "snlp": {}, "early_exit": {}}
    for name, m in computing.items()
  }

  def early_exit(m, tokens, n):
    x, side, _ = m.embed(tokens)
    x, backout, _, _ = sequential(m, x, side, stop=m.depth - n)
    return x, (x if m.config.backout and m.depth // 2 >= m.depth - n else backout)

  for n in config.snlp.layers:
    if n < depth:
      exit_loss = losses.evaluator(functools.partial(early_exit, n=n))
      for name, m in computing.items():
        result[name]["early_exit"][f"n{n}"] = exit_loss(m, full)
  sample = full[0]["inputs"]
  agreement = jax.jit(_agreement, static_argnames=("layers", "iterations", "surrogate", "initial"))
  for setting in console.track("evaluating", settings(config, depth)):
    parallel = losses.evaluator(functools.partial(snlp.hidden, **setting), text.token_bytes)
    for name, m in computing.items():
      top1, cosine = agreement(m, sample, **setting)
      result[name]["snlp"][describe(setting)] = parallel(m, full) | {
        **setting,
        "slices": parallel(m, slices)["perplexity"],
        "top1_agreement": float(top1),
        "logit_cosine": float(cosine),
      }
  error = jax.jit(snlp.trace_error, static_argnames=("layers", "iterations", "surrogate"))
  for name, m in computing.items():
    chosen = dict(layers=config.snlp.layers[-1], iterations=1, surrogate=config.snlp.surrogate)
    result[name]["trace_error"] = np.asarray(error(m, sample, **chosen)).tolist()
    result[name]["jacobian_norms"] = np.asarray(jax.jit(snlp.jacobian_norms)(m, sample, jax.random.key(0))).tolist()
  return result


def _agreement(model, tokens, **setting):
  """Share of positions with the sequential network's argmax, and mean cosine of the logits."""
  a, b = model(tokens), snlp.forward(model, tokens, **setting)
  cosine = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
  return jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1)), jnp.mean(cosine)


def measure_speed(config, model: Transformer, console) -> dict:
  """Whole uncached forwards, one sequence, against the faster of the scanned and the unrolled sequential network."""
  model = cast(model, config.train.dtype)
  result = {}
  for length in config.bench.lengths:
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, model.config.vocab_size)
    contestants = {
      "scan": jax.jit(lambda m, t: m(t)),
      "unrolled": jax.jit(lambda m, t: m(t, unroll=True)),
    }
    for setting in settings(config, model.depth):
      if setting["surrogate"] == config.snlp.surrogate:
        contestants[describe(setting)] = jax.jit(functools.partial(snlp.forward, **setting))
    console.say(f"timing {len(contestants)} forwards of {length} tokens")
    calls = {name: functools.partial(f, model, tokens) for name, f in contestants.items()}
    times = timing.compare(calls, repetitions=config.bench.repetitions, warmup=2)
    best = min(("scan", "unrolled"), key=times.median)
    speedups = {name: times.speedup(name, best) for name in calls if name not in ("scan", "unrolled")}
    result[f"T{length}"] = {
      "milliseconds": times.summary(),
      "sequential": best,
      "speedup": {name: {"ratio": ratio, "p10": low, "p90": high} for name, (ratio, (low, high)) in speedups.items()},
    }
  return result


def make_claims(config, quality: dict, speed: dict, depth: int) -> list[Claim]:
  """The paper's claims in its revised form, and the first version's."""
  surrogate, layers = config.snlp.surrogate, list(config.snlp.layers)
  n = layers[-1]
  key = lambda n, k, initial="h0": f"n{n} K{k} {surrogate} {initial}"
  loss_of = lambda name, setting: (
    100 * (quality[name]["snlp"][setting]["perplexity"] / quality[name]["sequential"]["perplexity"] - 1)
  )
  main = REGULARISED if REGULARISED in quality else PLAIN
  exact = quality[main]["snlp"][key(layers[0], layers[0])]["loss"]
  claims = [
    Claim(
      f"K = n is the network itself (n = {layers[0]})",
      "nats",
      "lower",
      ours=abs(exact - quality[main]["sequential"]["loss"]),
      threshold=1e-3,
      baseline="sequential",
    )
  ]
  few = [k for k in config.snlp.iterations if k in (1, 2, 4) and k < n]
  limits = {1: 25.0, 2: 25.0, 4: 10.0}
  for k in few:
    claims.append(
      Claim(
        f"perplexity lost at n = {n} of {depth} layers, K = {k}, {main} model",
        "%",
        "lower",
        ours=loss_of(main, key(n, k)),
        threshold=limits[k],
        paper={1: 17.0, 2: 5.1}.get(k),
        baseline=loss_of(PLAIN, key(n, k)) if main != PLAIN else "sequential",
        note="paper: 12 chunks of 2 layers, w/o x0 and value embeddings, 2048 tokens; baseline: the plain model",
      )
    )
  if main == REGULARISED:
    # A ratio of two losses says something only where the plain model loses something.
    for k in [k for k in few if k <= 2 and (k == few[0] or loss_of(PLAIN, key(n, k)) > 0.1)]:
      claims.append(
        Claim(
          f"regularised over plain perplexity loss, n = {n}, K = {k}",
          "ratio",
          "lower",
          ours=loss_of(main, key(n, k)) / loss_of(PLAIN, key(n, k)),
          threshold=0.5,
          baseline=loss_of(PLAIN, key(n, k)),
          note="baseline: the plain model's loss in % at the same setting",
        )
      )
    errors = {name: quality[name]["trace_error"][-1] for name in (main, PLAIN)}
    claims.append(
      Claim(
        f"trace error of the last layer, regularised over plain, n = {n}, K = 1",
        "ratio",
        "lower",
        ours=errors[main] / errors[PLAIN],
        threshold=0.5,
        baseline=errors[PLAIN],
        note="baseline: the plain model's relative error",
      )
    )
    change = lambda what: 100 * (quality[main][what]["perplexity"] / quality[PLAIN][what]["perplexity"] - 1)
    claims.append(
      Claim(
        "sequential perplexity changed by the regulariser, full context",
        "%",
        "lower",
        ours=change("sequential"),
        threshold=3.0,
        paper=-0.5,
        baseline=quality[PLAIN]["sequential"]["perplexity"],
      )
    )
    claims.append(
      Claim(
        f"v1: sequential perplexity changed by the regulariser, {config.eval.slice}-token slices without BOS",
        "%",
        "lower",
        ours=change("sequential_slices"),
        threshold=-4.7,
        paper=-23.4,
        baseline=quality[PLAIN]["sequential_slices"]["perplexity"],
        note="the first version of the paper claimed 4.7 to 23.4 % better; the second withdrew it",
      )
    )
  length = f"T{config.bench.lengths[0]}"
  for k in few:
    measured = speed[length]["speedup"][key(n, k)]
    claims.append(
      Claim(
        f"speed-up of an uncached forward, {length[1:]} tokens, n = {n}, K = {k}",
        "x",
        "higher",
        ours=measured["ratio"],
        threshold=config.bench.threshold,
        paper={1: 2.58, 2: 2.09}.get(k),
        baseline=f"jitted sequential ({speed[length]['sequential']})",
        spread=(measured["p10"], measured["p90"]),
        note="paper: eager PyTorch, 2048 tokens, one GPU",
      )
    )
  return claims


def draw_perplexity(quality: dict, depth: int, workdir: Path) -> str:
  shown = lambda r: r["initial"] == "h0" and r["surrogate"] != "jacobi"
  lost = lambda r, q: 100 * (r["perplexity"] / q["sequential"]["perplexity"] - 1)
  most = max(lost(r, q) for q in quality.values() for r in q["snlp"].values() if shown(r))
  figure, axes = figures.subplots(len(quality), squeeze=False, sharey=True)
  for axis, (name, q) in zip(axes[0], quality.items(), strict=True):
    rows = [r for r in q["snlp"].values() if shown(r)]
    for n in sorted({r["layers"] for r in rows}):
      points = sorted((r["iterations"], lost(r, q)) for r in rows if r["layers"] == n)
      axis.plot(*zip(*points, strict=True), "o-", label=f"n = {n} of {depth}")
    axis.axhline(0, color="black", lw=0.8, ls=":")
    axis.set(title=f"{name} model", xlabel="Newton steps K", xscale="log")
    # Linear where little is lost, logarithmic where much is.
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_yticks(ticks := [0, 0.25, 0.5, 1, 3, 10, 30, 100, 300], ticks)
    axis.set_ylim(-0.1, 1.2 * max(0.25, most))
    axis.set_xticks(ticks := sorted({r["iterations"] for r in rows}), ticks)
    axis.minorticks_off()
    axis.legend()
  axes[0][0].set_ylabel("perplexity lost (%)")
  return figures.save(figure, workdir, "perplexity")


def draw_trace_error(quality: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for name, q in quality.items():
    axis.plot(range(1, len(q["trace_error"]) + 1), q["trace_error"], "o-", label=name)
  axis.set(xlabel="layer of the suffix", ylabel="||z - h|| / ||h|| after one step", title="Trace error, K = 1 from h0")
  axis.legend()
  return figures.save(figure, workdir, "trace_error")


def draw_training(workdir: Path, models: dict) -> str:
  figure, axis = figures.subplots()
  for name in models:
    rows = read_metrics(workdir / name)
    axis.plot([r["step"] for r in rows], [r.get("cross_entropy", r["loss"]) for r in rows], label=name, lw=1)
  axis.set(xlabel="step", ylabel="cross-entropy (nats)", title="Training")
  axis.legend()
  return figures.save(figure, workdir, "training")
