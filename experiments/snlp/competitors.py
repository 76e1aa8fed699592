"""Networks trained to be as fast as SNLP's settings: shallower, wider, with parallel sublayers; the same tokens."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import figures, timing
from experiments.results import Claim
from experiments.snlp.settings import REGULARISED, forward, parse, solved_layers
from experiments.snlp.training import training_loss
from experiments.text import Text, model_config, train_model
from jaxlab.data import packing
from jaxlab.depth import snlp_inference
from jaxlab.models import Transformer
from jaxlab.training import loop, losses


def measure(config, text: Text, models: dict[str, Transformer], workdir: Path, console) -> dict:
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
    options = {key: s[key] for key in ("iterations", "surrogate", "initial")}
    networks[setting] = (snlp_inference.split(main, solved_layers(main, s)), options)
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
    state = snlp_inference.filled_to(state, c.context)
    step = functools.partial(snlp_inference.step, **options)
    runs[name] = timing.Steady(step, network, jnp.zeros((1, 1), jnp.int32), carry=state)
  times = timing.compare(runs, repetitions=c.repetitions, inner=20)
  for name in runs:
    ratio, (low, high) = times.speedup(name, "sequential")
    result[name] |= {"speedup": ratio, "p10": low, "p90": high, "milliseconds": times.summary()[name]}
  return result


def claims(result: dict) -> list[Claim]:
  """Every setting against the best trained network as fast, every network against the best setting as fast."""
  rivals = {name: r for name, r in result.items() if "parameters" in r}
  settings = {name: r for name, r in result.items() if name != "sequential" and name not in rivals}

  def best_as_fast(r, among):
    fast = {name: other["perplexity"] for name, other in among.items() if other["speedup"] >= 0.95 * r["speedup"]}
    return min(fast, key=fast.get, default=None)

  pairs = {(setting, best_as_fast(r, rivals)): None for setting, r in settings.items()}
  pairs |= {(best_as_fast(r, settings), rival): None for rival, r in rivals.items()}
  ratio = {
    (setting, rival): settings[setting]["perplexity"] / rivals[rival]["perplexity"]
    for setting, rival in pairs
    if setting and rival
  }
  if not ratio:
    return []
  worst = max(ratio, key=ratio.get)
  figure = lambda name: f"{name} {result[name]['perplexity']:.2f} at {result[name]['speedup']:.2f}x"
  return [
    Claim(
      "Perplexity of SNLP over that of a network trained on the same tokens to decode as fast, worst pair", "ratio",
      "lower", ours=ratio[worst], threshold=1.0, baseline=figure(worst[1]),
      note=f"SNLP {figure(worst[0])}; " + "; ".join(figure(name) for name in result if name not in worst),
    )
  ]  # fmt: skip


def draw(result: dict, workdir: Path) -> dict[str, str]:
  """SNLP's settings and the rivals, speed against perplexity."""
  figure, axis = figures.subplots()
  for kind, rows in (
    ("SNLP, one network", {name: r for name, r in result.items() if "parameters" not in r}),
    ("networks of their own", {name: r for name, r in result.items() if "parameters" in r}),
  ):
    axis.plot([r["speedup"] for r in rows.values()], [r["perplexity"] for r in rows.values()], "o", label=kind)
    for name, r in rows.items():
      axis.annotate(name, (r["speedup"], r["perplexity"]), xytext=(4, 3), textcoords="offset points", size=7)
  axis.set(xlabel="speed-up of one decoding step", ylabel="perplexity", title="The same training tokens")
  axis.legend()
  return {figures.save(figure, workdir, "competitors"): "SNLP beside networks trained to be as fast"}
