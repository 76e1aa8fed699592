"""SNLP-forward fine-tuning: recall tasks learnt through the solver or by the ordinary loss, both run by SNLP."""

import functools
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import Claim
from experiments.snlp.settings import forward, parse
from experiments.text import Text
from jaxlab.core import mesh as meshes
from jaxlab.data import recall
from jaxlab.depth import snlp
from jaxlab.models import Transformer
from jaxlab.training import loop, losses
from jaxlab.training.optimizers import muon_adamw


def rows(text: Text, split: str, *, row: int, batch: int, seed: int) -> grain.IterDataset:
  """Endless batches {"inputs", "targets"} of one recall question a row; only the answer's tokens are targets."""
  tokens = text.split(split)

  def make(index, rng: np.random.Generator) -> dict:
    task = recall.TASKS[index % len(recall.TASKS)]
    question = recall.example(task, tokens, text.bpe, length=int(rng.integers(recall.SHORTEST, row + 1)), rng=rng)
    ids = np.concatenate([question.prompt, question.answer])
    inputs, targets = np.zeros(row, np.int32), np.full(row, -1, np.int32)
    inputs[: len(ids) - 1] = ids[:-1]
    targets[len(question.prompt) - 1 : len(ids) - 1] = question.answer
    return {"inputs": inputs, "targets": targets}

  return grain.MapDataset.range(2**31 - 1).seed(seed).random_map(make).batch(batch).to_iter_dataset()


def measure(config, text: Text, models: dict[str, Transformer], workdir: Path, console) -> dict:
  """{model: {"before" | "ordinary" | "through SNLP": {"sequential" | setting: share of whole answers right}}}."""
  f = config.finetuning
  s = parse(f.setting)
  solver = {name: s[name] for name in ("layers", "iterations", "surrogate", "initial")}
  ways = {
    "ordinary": lambda m, b, step, key: losses.language_model_loss(m, b),
    "through SNLP": lambda m, b, step, key: snlp.finetuning_loss(m, b, **solver),
  }
  held = iter(rows(text, config.eval.split, row=f.row, batch=f.batch, seed=config.seed + 1))
  questions = [next(held) for _ in range(f.questions // f.batch)]
  accuracy = functools.partial(answers_right, batches=questions, setting=f.setting)
  result = {}
  for name, model in models.items():
    result[name] = {"before": accuracy(model)}
    for way, loss in ways.items():
      folder = workdir / "finetuning" / f"{name}_{way.replace(' ', '_').lower()}"
      optimizer = muon_adamw(model.config, steps=f.steps, batch_tokens=f.batch * f.row, scale=f.scale, warmup=f.warmup)
      with console.training(f"{name}, {way}") as progress:
        tuned = loop.train(
          model,
          rows(text, "train", row=f.row, batch=f.batch, seed=config.seed),
          loss,
          optimizer,
          steps=f.steps,
          workdir=folder,
          seed=config.seed,
          compute_dtype=config.train.dtype,
          checkpoint_every=f.steps,
          mesh=meshes.make_mesh(config.mesh.to_dict()),
          progress=progress,
        )
      result[name][way] = accuracy(loop.cast(tuned, config.train.dtype))
  return result


def answers_right(model: Transformer, *, batches, setting: str) -> dict:
  """Share of questions whose whole answer is the argmax, teacher-forced, sequentially and at the setting."""

  def right(hidden):
    @jax.jit
    def count(model, batch):
      best = jnp.argmax(model.logits(*hidden(model, batch["inputs"])), axis=-1)
      return jnp.all((best == batch["targets"]) | (batch["targets"] < 0), axis=1).mean()

    return float(np.mean([count(model, batch) for batch in batches]))

  return {"sequential": right(lambda m, tokens: m.hidden(tokens)), setting: right(forward(setting))}


def claims(result: dict) -> list[Claim]:
  """Tuned through the solver and run by it, a model is as good as one tuned and run as usual: the worst model."""
  setting = next(name for name in next(iter(result.values()))["before"] if name != "sequential")
  usual = lambda name: result[name]["ordinary"]["sequential"]
  behind = {name: ways["through SNLP"][setting] - usual(name) for name, ways in result.items()}
  worst = min(behind, key=behind.get)
  each = "; ".join(
    f"{name}: before {ways['before']['sequential']:.3g}, through SNLP {ways['through SNLP'][setting]:.3g}, "
    f"as usual {ways['ordinary']['sequential']:.3g}, that one run at {setting} {ways['ordinary'][setting]:.3g}"
    for name, ways in result.items()
  )
  return [
    Claim(
      "Share of recall answers right after tuning through SNLP and run by it, less that of the usual way, worst model",
      "", "higher", ours=behind[worst], threshold=-0.02, baseline=usual(worst), note=each,
    )
  ]  # fmt: skip
