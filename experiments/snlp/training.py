"""Training SNLP's pair of models: the same start and data, without and with the regulariser."""

from pathlib import Path

import jax

from experiments.snlp.settings import parse
from experiments.text import Text, train_model
from jaxlab.core.checks import require
from jaxlab.core.files import write_text
from jaxlab.depth import snlp
from jaxlab.models import Transformer, hub
from jaxlab.training import losses


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


def save_pair(config, text: Text, models: dict[str, Transformer], folder: Path) -> None:
  """Both models in 16 bits with their tokenizer, as folders that config.pair and `hub.load` read."""
  for name, model in models.items():
    hub.save(jax.tree.map(lambda a: a.astype("bfloat16"), model), folder / name)
    write_text(folder / name / "tokenizer.json", text.bpe.to_str())
  write_text(folder / "training_config.json", config.to_json_best_effort(indent=1))
