"""Fine-tuning a checkpoint at long context with gradients that are worked out in parts, written as a folder.

SeCO, ChunkFlow and plain backpropagation are all `gradient_of(model_of) -> GradientFn`: model_of says what becomes of
what is trained, the model itself or adapters beside it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from experiments.long_context import opened
from experiments.results import Claim
from experiments.snlp_adapt.adapting import save
from experiments.text import Text, adam_in_state
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require_choice
from jaxlab.data import packing
from jaxlab.models import Transformer, hub
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.config import RopeScaling
from jaxlab.training import loop, lora, losses
from jaxlab.training.loop import GradientFn

TUNED = "tuned"
PARAMETERS = ("all", "lora")
ROPES = ("llama3", "linear", "none")
GradientOf = Callable[[Callable], GradientFn]


def stretched(model: Transformer, length: int, rope: str) -> Transformer:
  """The model for contexts of `length` tokens; as it is where its own is as long.

  Args:
    rope: what becomes of frequencies beyond its context: "llama3" slows the slow ones down, "linear" all, "none" none.
  """
  require_choice("tuning.rope", rope, ROPES)
  c = model.config
  factor = length / c.context
  if factor <= 1:
    return model
  config = dataclasses.replace(c, context=length)
  if rope == "linear":
    config = dataclasses.replace(config, rope_factor=c.rope_factor * factor)
  elif rope == "llama3":
    before = c.rope_scaling or RopeScaling(1.0, original_context=c.context)
    config = dataclasses.replace(config, rope_scaling=dataclasses.replace(before, factor=before.factor * factor))
  leaves, structure = jax.tree.flatten(model)
  model = jax.tree.unflatten(structure, leaves)  # another object, the same arrays
  model.config = model.blocks.config = config
  return model


def backpropagation(model_of: Callable, *, attention=dot_product_attention, remat: str = "full") -> GradientFn:
  """Of the whole sequence at once."""

  def loss(params, batch, step, key, *frozen):
    model = model_of(params, *frozen)
    hidden = model.hidden(batch["inputs"], attention=attention, remat=remat)
    return losses.mean_loss(losses.token_losses(model, hidden, batch["targets"]), batch["targets"]), {}

  return jax.value_and_grad(loss, has_aux=True)


def queries_and_values(name: str) -> bool:
  """The maps that have adapters."""
  return name in ("blocks.q", "blocks.v")


def finetuned(
  t, model: Transformer, data: Iterable, gradient_of: GradientOf, *, rate: float, seed: int, mesh, workdir, progress
) -> Transformer:
  """The model after t.steps of Adam, in t.dtype; resumes from `workdir`.

  Args:
    t: parameters (of `PARAMETERS`), rank, alpha, steps, warmup, dtype, checkpoint_every.
  """
  require_choice("tuning.parameters", t.parameters, PARAMETERS)
  whole = t.parameters == "all"
  adapters = dict(rank=t.rank, alpha=t.alpha, where=queries_and_values)
  model_of = (lambda model: model) if whole else lambda adapters, model: lora.merge(model, adapters)
  trained = loop.train(
    model if whole else lora.init(model, jax.random.key(seed), **adapters),
    data,
    None,
    adam_in_state(rate, steps=t.steps, warmup=t.warmup),
    steps=t.steps,
    workdir=workdir,
    seed=seed,
    compute_dtype=t.dtype,
    checkpoint_every=t.checkpoint_every,
    mesh=mesh,
    frozen=None if whole else loop.cast(model, t.dtype),
    gradient_fn=gradient_of(model_of),
    progress=progress,
  )
  return loop.cast(trained if whole else lora.merge(model, trained), t.dtype)


def rows(text: Text, t, seed: int):
  """Batches of rows of t.length tokens to train on."""
  return packing.batches(text.rows(t.length, seed=seed), t.batch // jax.process_count())


def held_out(text: Text, t, split: str, tokens: int) -> list:
  return packing.evaluation_batches(text.split(split), row=t.length, batch=t.batch, limit=tokens)


evaluate = losses.evaluator(jax.jit(lambda model, inputs: model.hidden(inputs, remat="full")))


def measure(config, gradient_of: GradientOf, workdir: Path, cache: Path, console, make_rows: Callable = rows) -> dict:
  """Fine-tunes config.model on config.data by config.tuning and writes workdir/tuned, which `hub.load` reads.

  Args:
    make_rows: (text, tuning, seed) -> batches for that gradient.

  Returns:
    {name, length, context (the checkpoint's), loss: {"before", "after"} of the test split}.
  """
  t = config.tuning
  name, folder, text = opened(config, config.model, cache)
  original = hub.load(folder, dtype="float32")
  model = stretched(original, t.length, t.rope)
  test = held_out(text, t, "test", t.judged)
  loss_of = lambda model: evaluate(jax.device_put(loop.cast(model, t.dtype), jax.devices()[0]), test)["loss"]
  before = loss_of(model)
  how = dict(rate=t.rate, seed=config.seed, mesh=meshes.make_mesh(config.mesh.to_dict()), workdir=workdir / "tuning")
  with console.training(f"{name} at {t.length} tokens") as progress:
    made = finetuned(t, model, make_rows(text, t, config.seed), gradient_of, **how, progress=progress)
  save(config, made, workdir / TUNED)
  console.say(f"written: {workdir / TUNED}; python -m jaxlab.generate --model={workdir / TUNED} --raw TEXT goes on")
  found = dict(before=before, after=loss_of(hub.load(workdir / TUNED)))
  return dict(name=name, length=t.length, context=original.config.context, loss=found)


def claims(found: dict) -> list[Claim]:
  before, after = found["loss"]["before"], found["loss"]["after"]
  return [
    Claim(
      "Loss of held-out text after fine-tuning, of the folder that was written, over that before", "nats", "lower",
      ours=after - before, threshold=0.0, baseline=before,
      note=f"{found['name']}, rows of {found['length']} tokens; the checkpoint's context is {found['context']}",
    )
  ]  # fmt: skip


def finding(found: dict) -> str:
  before, after = found["loss"]["before"], found["loss"]["after"]
  where = f"{found['name']} fine-tuned at {found['length']} tokens"
  return f"{where}: loss of held-out text {after:.4g}, {before:.4g} before."
