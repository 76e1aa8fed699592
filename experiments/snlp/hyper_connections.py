"""SNLP with hyper-connections: HCN solves with the streams' mixing matrices, IDN with A = I."""

import jax

from experiments.results import Claim
from experiments.snlp.settings import forward, parse
from experiments.snlp.training import train_models
from experiments.text import load_text, model_config
from jaxlab.data import packing
from jaxlab.models.config import HyperConnections
from jaxlab.training import loop, losses

# Without a regulariser; with the paper's, which takes no gradient from the targets; with one that does.
MHC, MHC_REGULARISED, MHC_MOVING = "mhc", "mhc_regularised", "mhc_moving_targets"


def measure(config, workdir, cache, console) -> dict:
  """{model: {"sequential", "snlp": {setting + surrogate: ...}}} of three models, trained here: perplexities."""
  own = config.copy_and_resolve_references()
  own.train.steps = config.hcn.steps
  text = load_text(own, cache)
  shape = model_config(own, text.bpe.get_vocab_size(), context=own.train.length, hyper=HyperConnections())
  moving = own.hcn.reg.copy_and_resolve_references()
  moving.detach_target = moving.detach_input = False
  regularisers = {MHC: None, MHC_REGULARISED: own.hcn.reg, MHC_MOVING: moving}
  models = train_models(own, text, shape, regularisers, workdir, console)
  models = {name: loop.cast(model, config.train.dtype) for name, model in models.items()}
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


def claims(measured: dict) -> list[Claim]:
  """The regulariser keeps the network; the note says how much better a surrogate the mixing matrices are."""
  settings = dict.fromkeys(text.rsplit(" ", 1)[0] for text in measured[MHC]["snlp"])
  most = max(settings, key=lambda text: (parse(text)["layers"], parse(text)["iterations"]))
  sequential = {name: m["sequential"]["perplexity"] for name, m in measured.items()}
  changed = {name: 100 * (sequential[name] / sequential[MHC] - 1) for name in (MHC_REGULARISED, MHC_MOVING)}
  gap = lambda m: m["snlp"][f"{most} streams"]["loss"] - m["snlp"][f"{most} identity"]["loss"]
  lost = lambda name, m: 100 * (m["snlp"][f"{most} streams"]["perplexity"] / sequential[name] - 1)
  return [
    Claim(
      "Perplexity added to a network with hyper-connections by training with HCN's regulariser", "%", "lower",
      ours=changed[MHC_REGULARISED], threshold=3.0, paper=2.4, baseline=sequential[MHC],
      note=f"no gradient through the targets, as published; with it {changed[MHC_MOVING]:+.2g} %. HCN loses at {most} "
      + ", ".join(f"{name} {lost(name, m):.2g} % ({gap(m):+.2g} nats beside A = I)" for name, m in measured.items()),
    )
  ]  # fmt: skip
