"""Time and memory of a global batch, and the losses of a few hundred steps, by arm."""

import functools
import itertools

import jax
import numpy as np
import optax

from experiments import timing
from experiments.chunkflow import arms
from jaxlab.core.precision import exactly
from jaxlab.data.packing import Batch, split_row
from jaxlab.models import Transformer, TransformerConfig

# Lengths of a set of instructions as the paper has them: (share, from, to) in units of the longest / 32.
_SHARES = ((0.90, 1 / 16, 1.0), (0.08, 1.0, 4.0), (0.0199, 4.0, 31.0), (0.0001, 31.0, 32.0))


def lengths(count: int, longest: int, seed: int) -> np.ndarray:
  """int64 (count,): 90 % below a 32nd of `longest`, 8 % up to an 8th, the rest longer, the first `longest` itself;
  log-uniform between the bounds."""
  rng = np.random.default_rng(seed)
  kinds = rng.choice(len(_SHARES), count, p=[share for share, *_ in _SHARES])
  low, high = (np.array([row[i] for row in _SHARES])[kinds] for i in (1, 2))
  drawn = np.exp(rng.uniform(np.log(low), np.log(high))) * longest / 32
  drawn[0] = longest
  return np.maximum(2, drawn.astype(np.int64))


def sequences(ids: np.ndarray, sizes: np.ndarray, start: int = 0) -> list[Batch]:
  """Consecutive slices of a text, from token `start` on and round its end."""
  made, at = [], start
  for size in sizes:
    made.append(split_row(np.take(ids, np.arange(at, at + size + 1), mode="wrap").astype(np.int32)))
    at += int(size)
  return made


def fresh(config, vocabulary: int, seed: int = 0, *, dtype: str | None = None):
  context = max(*config.longest, config.curve.longest, max(config.times) * config.chunk)
  shape = config.shape.to_dict() | dict(vocab_size=vocabulary, context=context)
  return _fresh(TransformerConfig(**shape), seed, dtype or config.dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _fresh(shape: TransformerConfig, seed: int, dtype: str) -> Transformer:
  return jax.tree.map(lambda a: a.astype(dtype), Transformer(shape, jax.random.key(seed)))


def batches(config, ids, longest: int) -> list[list[Batch]]:
  """The same global batches for every arm."""
  sizes = [lengths(config.batch, longest, config.seed + i) for i in range(config.batches)]
  starts = np.cumsum([0, *(int(own.sum()) for own in sizes)])
  return [sequences(ids, own, int(start)) for own, start in zip(sizes, starts, strict=False)]


def measure(config, ids, vocabulary: int, longest: int, contestants: dict[str, dict], console) -> dict:
  """{label: {"seconds": of all global batches, every repetition; "tokens": a second, at the median; "temporary": bytes;
  "micro_steps": of a batch}}.

  Args:
    contestants: {label, which an arm's name begins: how it is made}. Repetitions alternate, and every shape is compiled
      and run once before the clock starts.
  """
  model, data, found, runs, programs = fresh(config, vocabulary), batches(config, ids, longest), {}, {}, {}
  totals = [sum(int((one["targets"] >= 0).sum()) for one in batch) for batch in data]
  for label, how in contestants.items():
    console.say(f"{label}, longest {longest}")
    arm = arms.arm(label.split()[0], **how)
    prepared = [[(kind, jax.device_put(arrays)) for kind, arrays in arm.prepare(batch)] for batch in data]
    arm, temporary = arms.compiled(arm, model, itertools.chain(*prepared), programs)
    found[label] = {"temporary": temporary, "micro_steps": float(np.mean([len(steps) for steps in prepared]))}
    runs[label] = functools.partial(_all, arm, model, prepared, totals)
  times = timing.compare(runs, repetitions=config.repetitions, warmup=1)
  for label, row in found.items():
    row |= {"seconds": times.seconds[label].tolist(), "tokens": sum(totals) / times.median(label)}
  return found


def _all(arm, model, prepared, totals):
  for steps, total in zip(prepared, totals, strict=True):
    last = arms.run(arm, model, steps, total)
  return last


def curve(config, ids, vocabulary: int, name: str, console) -> dict:
  """{"loss": of every step, "held_out": at the end, of the longest sequences alone}."""
  c = config.curve
  model, longest = fresh(config, vocabulary, dtype="float32"), c.longest
  arm = arms.arm(name, chunk=c.chunk)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, c.rate, max(1, c.steps // 20), c.steps))

  @jax.jit
  def update(model, state, gradient):
    change, state = optimizer.update(gradient, state, model)
    return optax.apply_updates(model, change), state

  state, found, at = optimizer.init(model), [], 0
  with console.training(name) as progress:
    for step in range(c.steps):
      sizes = lengths(c.batch, longest, config.seed + step)
      loss, gradient = arms.gradient(arm, model, sequences(ids, sizes, at))
      model, state = update(model, state, gradient)
      at += int(sizes.sum())
      found.append(float(loss))
      progress({"step": step + 1, "steps": c.steps, "loss": found[-1]})
  test = sequences(ids[::-1][: c.held_out * (longest + 1)][::-1], np.full(c.held_out, longest))
  whole = arms.arm("one", chunk=c.chunk)
  held = float(np.mean([float(arms.gradient(whole, model, [one])[0]) for one in test]))
  return {"loss": found, "held_out": held}


@exactly
def agreement(config, ids, vocabulary: int) -> dict:
  """{arm: relative difference of its gradient from that of a sequence a step}, in float32."""
  c = config.curve
  model, batch = fresh(config, vocabulary, dtype="float32"), sequences(ids, lengths(c.batch, c.longest, config.seed))
  of = lambda name: arms.gradient(arms.arm(name, chunk=c.chunk), model, batch)[1]
  reference = of("one")
  return {name: arms.difference(of(name), reference) for name in arms.ARMS if name != "one"}


def growth(config, vocabulary: int) -> dict:
  """{longest: temporary bytes of ChunkFlow's step}, a sequence of so many tokens at one chunk, from 4 chunks on; and
  the bytes of a cached token: keys and values, and what comes back to them in float32."""
  model = fresh(config, vocabulary)
  arm, found = arms.arm("chunkflow", chunk=config.chunk), {}
  for times in config.times:
    size = times * config.chunk
    one = {name: np.zeros(size, np.int32) for name in ("inputs", "targets")}
    found[f"{size}"] = arms.compiled(arm, model, arm.prepare([one]))[1]
  s = config.shape
  numbers = 2 * s.depth * s.kv_heads * s.head_dim
  return {"bytes": found, "cached": numbers * (jax.numpy.dtype(config.dtype).itemsize + 4)}
