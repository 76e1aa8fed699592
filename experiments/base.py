"""The base model that ships: a small Qwen3-shaped decoder, trained on text and generated recall tasks.

Two phases: short rows at a constant learning rate, then rows of the full context while the rate falls.
"""

import functools
import lzma
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.results import Claim, number
from experiments.text import Text, load_text, model_config, train_model
from jaxlab.core.files import write_text
from jaxlab.data import packing, recall
from jaxlab.models import Transformer, generate, hub
from jaxlab.training import losses
from jaxlab.training.loop import cast
from jaxlab.training.metrics import read_metrics

PHASES = ("short", "long")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Trains both phases, writes the model with its card to `workdir`/base, and says what it can do."""
  text = load_text(config, cache)
  shape = model_config(config, text.bpe.get_vocab_size())
  model = Transformer(shape, jax.random.key(config.seed))
  for phase in PHASES:

    def loss(model, batch, step, key, remat=config[phase].remat):
      return losses.language_model_loss(model, batch, remat=remat)

    model = train_model(config, text, model, loss, workdir=workdir / phase, console=console, title=phase, phase=phase)
  shipped = jax.tree.map(lambda a: a.astype(config.save_dtype), model)
  quality = measure_quality(config, text, shipped, console)
  samples = write_samples(config, text, shipped)
  folder = workdir / "base"
  hub.save(shipped, folder)
  write_text(folder / "tokenizer.json", text.bpe.to_str())
  write_text(folder / "training_config.json", config.to_json_best_effort(indent=1))
  write_text(folder / "README.md", model_card(config, shape, quality, samples))
  parameters = sum(a.size for a in jax.tree.leaves(model))
  return quality | {"samples": samples, "parameters": parameters, "training": loss_curves(workdir)}


def loss_curves(workdir: Path) -> dict:
  """{phase: [[step, loss], ...]}, a hundred points of each."""
  curves = {}
  for phase in PHASES:
    rows = read_metrics(workdir / phase)
    curves[phase] = [[r["step"], r["loss"]] for r in rows[:: max(1, len(rows) // 100)]]
  return curves


def measure_quality(config, text: Text, model: Transformer, console) -> dict:
  """Bits per byte on the held-out split at several contexts, xz's on the same text, accuracy on every recall task."""
  e = config.eval
  computing = cast(model, config.short.dtype)
  evaluate = losses.evaluator(jax.jit(lambda m, tokens: m.hidden(tokens)), text.token_bytes)
  held_out = text.split(e.split)
  result = {"text": {}, "recall": {}}
  for length in e.lengths:
    batch = max(1, e.batch_tokens // length)
    batches = packing.evaluation_batches(held_out, row=length, batch=batch, limit=e.tokens)
    result["text"][f"{length}"] = evaluate(computing, batches)
  raw = text.bpe.decode(np.asarray(held_out.ids).tolist()).encode()
  result["xz_bits_per_byte"] = 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
  exact = jax.jit(functools.partial(exact_answers, lambda model, tokens: model.hidden(tokens)))
  for task in console.track("recall", list(recall.TASKS)):
    result["recall"][task] = {
      f"{length}": recall_accuracy(
        functools.partial(exact, computing), text, task, length=length, count=e.examples, batch_tokens=e.batch_tokens
      )
      for length in e.lengths
    }
  return result


def recall_accuracy(
  exact, text: Text, task: str, *, length: int, count: int, batch_tokens: int, split: str = "test"
) -> float:
  """Share of `count` examples whose whole answer is the greedy continuation of the prompt, in documents of `length`.

  The documents are text of `split`; `exact(ids, starts)` is `exact_answers` of a model.
  """
  hay = text.split(split)
  made = [
    recall.example(task, hay, text.bpe, length=length, rng=np.random.default_rng([i, length])) for i in range(count)
  ]
  size = max(1, batch_tokens // length)
  right = []
  for i in range(0, count, size):
    part = made[i : i + size]
    part += [part[-1]] * (size - len(part))
    ids = np.stack([np.concatenate([e.prompt, e.answer]) for e in part])
    starts = np.array([len(e.prompt) for e in part])
    right += np.asarray(exact(ids, starts)).tolist()
  return float(np.mean(right[:count]))


def exact_answers(hidden, model, ids, starts):
  """Whether argmax predicts every token from `starts` to the end: then greedy decoding gives the answer.

  `hidden(model, tokens)` gives what `model.logits` reads.
  """
  x, backout = hidden(model, ids[:, :-1])
  # Only the last tokens can belong to an answer: no logits of whole documents.
  tail = min(32, ids.shape[1] - 1)
  logits = model.logits(x[:, -tail:], None if backout is None else backout[:, -tail:])
  right = jnp.argmax(logits, axis=-1) == ids[:, -tail:]
  before = jnp.arange(ids.shape[1] - tail, ids.shape[1])[None] < starts[:, None]
  return jnp.all(right | before, axis=1)


def write_samples(config, text: Text, model: Transformer) -> dict[str, str]:
  """Continuations of a few prompts."""
  samples = {}
  for i, prompt in enumerate(config.prompts):
    bos = text.split("train").bos
    ids = jnp.array([[bos, *text.bpe.encode(prompt, add_special_tokens=False).ids]])
    out = generate(model, ids, tokens=config.sample_tokens, key=jax.random.key(i), temperature=0.8, top_p=0.95)
    samples[prompt] = text.bpe.decode(np.asarray(out[0]).tolist())
  return samples


def claims(config, metrics: dict) -> list[Claim]:
  longest = f"{config.eval.lengths[-1]}"
  made = [
    Claim(
      f"Bits a byte of held-out text takes at context {longest}", "bits/byte", "lower",
      ours=metrics["text"][longest]["bits_per_byte"], threshold=metrics["xz_bits_per_byte"],
      baseline=metrics["xz_bits_per_byte"], note="baseline: xz -9e on the same text as one stream",
    )
  ]  # fmt: skip
  for task, accuracy in metrics["recall"].items():
    worst = min(accuracy, key=accuracy.get)
    made.append(
      Claim(
        f"Share of right answers to {task.replace('_', ' ')} questions, worst of {len(accuracy)} document lengths", "",
        "higher", ours=accuracy[worst], threshold=0.95, baseline="chance: 1e-5",
        note=f"worst at {worst} tokens; {config.eval.examples} questions a length, the whole five-digit answer by "
        "greedy decoding",
      )
    )  # fmt: skip
  return made


def finding(config, metrics: dict) -> str:
  longest = f"{config.eval.lengths[-1]}"
  least = min(min(accuracy.values()) for accuracy in metrics["recall"].values())
  return (
    f"{metrics['parameters'] / 1e6:.3g} M parameters: {number(metrics['text'][longest]['bits_per_byte'])} bits a byte "
    f"of held-out text (xz -9e {number(metrics['xz_bits_per_byte'])}), at least {least:.1%} of recall questions right "
    f"up to {longest} tokens."
  )


def model_card(config, shape, quality: dict, samples: dict[str, str]) -> str:
  longest = f"{config.eval.lengths[-1]}"
  tokens = sum(config[p].steps * config[p].batch * config[p].length for p in PHASES)
  rows = "\n".join(
    f"| {task} | " + " | ".join(f"{value:.0%}" for value in by_length.values()) + " |"
    for task, by_length in quality["recall"].items()
  )
  lengths = config.eval.lengths
  text = "\n\n".join(f"> **{prompt}**{continuation}" for prompt, continuation in samples.items())
  return f"""# base

A small English language model for trying methods on: {shape.depth} layers, width {shape.width}, {shape.q_heads} query
and {shape.kv_heads} key-value heads of {shape.head_dim}, context {shape.context}, byte-level BPE of {shape.vocab_size}
tokens, {config.save_dtype}. The architecture is Qwen3's, so `transformers` loads it too.

Trained on {tokens / 1e6:.0f} M tokens: public-domain English books and generated recall tasks. It continues books; it
does not follow instructions, and its facts are a novelist's. Made by `configs/base.py`; training_config.json beside
this file holds every setting.

Held-out books: {number(quality["text"][longest]["bits_per_byte"])} bits per byte at context {longest} (xz -9e:
{number(quality["xz_bits_per_byte"])}).

Recall, whole answers by greedy decoding, by document length in tokens:

| task | {" | ".join(map(str, lengths))} |
|---|{"---|" * len(lengths)}
{rows}

Samples (temperature 0.8, top-p 0.95):

{text}
"""


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  files = {draw_recall(metrics, workdir): "Recall accuracy against document length"}
  if "training" in metrics:
    files[draw_training(metrics["training"], workdir)] = "Training loss of the two phases"
  return files


def draw_training(curves: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  seen = 0
  for phase, points in curves.items():
    steps, loss = np.array(points).T
    axis.plot(seen + steps, loss, lw=0.8, label=f"{phase} rows")
    seen += steps[-1]
  axis.set(xlabel="step", ylabel="loss (nats)", title="Training of the base model")
  axis.legend()
  return figures.save(figure, workdir, "training")


def draw_recall(quality: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for task, by_length in quality["recall"].items():
    axis.plot([int(n) for n in by_length], list(by_length.values()), "o-", label=task.replace("_", " "))
  ticks = [int(n) for n in by_length]
  axis.set(xscale="log", ylim=(-0.03, 1.03), xlabel="document length (tokens)", ylabel="accuracy", title="Recall")
  axis.set_xticks(ticks, ticks)
  axis.minorticks_off()
  axis.legend()
  return figures.save(figure, workdir, "recall")
