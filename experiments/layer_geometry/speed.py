"""What layer geometry costs: local fits against NumPy, single-token interventions against a forward a position."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.ticker
import numpy as np

from experiments import figures, timing
from experiments.results import Claim
from jaxlab.depth import layer_geometry as geometry
from jaxlab.depth import layer_geometry_classes as classes
from jaxlab.models import Transformer
from jaxlab.models.config import nanochat
from jaxlab.models.transformer import sequential

_CHUNK = 256


def numpy_low_rank(reference, outputs, x, *, k: int, rank: int, ridge: float = 1e-2) -> np.ndarray:
  """`classes.low_rank` on `classes.neighbours` in NumPy, in chunks and with batched LAPACK: the peer."""
  unit = lambda a: a / np.sqrt((a * a).mean(axis=1, keepdims=True))
  scaled = unit(reference)
  square = (scaled * scaled).sum(axis=1)
  result = []
  for begin in range(0, len(x), _CHUNK):
    q = x[begin : begin + _CHUNK]
    query = unit(q)
    distance = square - 2 * query @ scaled.T + (query * query).sum(axis=1, keepdims=True)
    index = np.argpartition(distance, k - 1, axis=1)[:, :k]
    d2 = np.maximum(np.take_along_axis(distance, index, axis=1), 0)
    scale = np.exp(-d2 / (4 * np.median(np.sqrt(d2), axis=1, keepdims=True) ** 2))[..., None]  # sqrt of the weight
    near = scale * reference[index]
    increments = scale * outputs[index] - near
    gram = near @ near.transpose(0, 2, 1)
    lam = ridge * np.trace(gram, axis1=1, axis2=2)[:, None, None] / k
    right = np.concatenate([increments, near @ q[..., None]], axis=2)
    solved = np.linalg.solve(gram + lam * np.eye(k, dtype=gram.dtype), right)
    fitted = gram @ solved[..., :-1]
    change = increments.transpose(0, 2, 1) @ solved[..., -1:]
    energy, left = np.linalg.eigh(fitted @ fitted.transpose(0, 2, 1))
    left, energy = left[..., -rank:], energy[:, -rank:, None]
    kept = energy > 10 * np.finfo(energy.dtype).eps * energy[:, -1:]
    inverse = np.where(kept, 1 / np.where(kept, energy, 1), 0)
    inside = left @ (inverse * (left.transpose(0, 2, 1) @ (fitted @ change)))
    result.append(q + (fitted.transpose(0, 2, 1) @ inside)[..., 0])
  return np.concatenate(result)


@functools.partial(jax.jit, static_argnames=("k", "rank"))
def jax_low_rank(reference, outputs, x, *, k: int, rank: int):
  index, weight = classes.neighbours(reference, x, k=k)
  return classes.apply_local("low_rank", reference, outputs, x, index, weight, rank=rank)


def time_fits(bench) -> dict:
  """Seconds of fitting and applying the low-rank class to M tokens, by M; both results agree."""
  random = np.random.default_rng(0)
  draw = lambda n: random.normal(size=(n, bench.width)).astype(np.float32)
  reference = draw(bench.reference)
  outputs = reference + np.tanh(reference @ draw(bench.width) / bench.width**0.5)
  options, result = dict(k=bench.neighbours, rank=bench.rank), {}
  for count in bench.tokens:
    x = draw(count)
    on_device = tuple(map(jnp.asarray, (reference, outputs, x)))
    calls = {
      "jax": functools.partial(jax_low_rank, *on_device, **options),
      "numpy": functools.partial(numpy_low_rank, reference, outputs, x, **options),
    }
    times = timing.compare(calls, repetitions=bench.repetitions, warmup=1)
    difference = np.abs(np.asarray(calls["jax"]()) - calls["numpy"]()).max()
    ratio, spread = times.speedup("jax", "numpy")
    seconds = {name: times.median(name) for name in calls}
    result[f"{count}"] = dict(seconds=seconds, ratio=ratio, spread=spread, difference=float(difference))
  return result


@functools.partial(jax.jit, static_argnames="layer")
def one_forward_a_position(model: Transformer, tokens, outputs, *, layer: int):
  """Single-token KL (1, T) the plain way: the rest of the network once for every replaced position, in batches."""
  x, side, _ = model.embed(tokens)
  y, _, _, _ = sequential(model, x, side, stop=layer + 1)
  finish = lambda state: jax.nn.log_softmax(model.logits(sequential(model, state, side, start=layer + 1)[0]))
  clean = finish(y)[0]

  def one(i):
    changed = finish(y.at[:, i].set(outputs[:, i]))[0, i]
    return jnp.sum(jnp.exp(clean[i]) * (clean[i] - changed))

  return jax.lax.map(one, jnp.arange(tokens.shape[1]), batch_size=16)[None]


def time_interventions(bench) -> dict:
  """Seconds of all single-token interventions in one row of T tokens, by T: one pass, and a forward a position."""
  shape = nanochat(
    depth=bench.depth,
    aspect_ratio=16,
    head_dim=16,
    vocab_size=256,
    window_pattern="L",
    x0=False,
    value_embeddings=False,
  )
  # The head reads no backout state here, so that the plain way needs none either.
  model = Transformer(dataclasses.replace(shape, backout=False), jax.random.key(0))
  model.blocks.o.weight.set_value(0.1 * jax.random.normal(jax.random.key(1), model.blocks.o.weight.get_value().shape))
  one_pass = jax.jit(functools.partial(geometry.intervene, layer=0, skip=0))
  result = {}
  for length in bench.lengths:
    tokens = jax.random.randint(jax.random.key(length), (1, length), 0, 256)
    outputs = geometry.collect(model, tokens, skip=0)[1][0] * 1.1
    calls = {
      "one pass": functools.partial(one_pass, model, tokens, outputs),
      "a forward a position": functools.partial(one_forward_a_position, model, tokens, outputs, layer=0),
    }
    times = timing.compare(calls, repetitions=bench.repetitions, warmup=1)
    one, many = calls["one pass"]()["single_token"]["kl"], calls["a forward a position"]()
    ratio, spread = times.speedup("one pass", "a forward a position")
    seconds = {name: times.median(name) for name in calls}
    difference = float(jnp.abs(one - many).max())
    result[f"{length}"] = dict(seconds=seconds, ratio=ratio, spread=spread, difference=difference)
  return result


def claims(speed: dict) -> list[Claim]:
  count, fits = list(speed["fits"].items())[-1]
  length, passes = list(speed["interventions"].items())[-1]
  largest = lambda part: max(row["difference"] for row in speed[part].values())
  return [
    Claim(
      f"How many times as fast as NumPy with batched LAPACK {count} low-rank maps are fitted", "x", "higher",
      ours=fits["ratio"], threshold=1.0, spread=tuple(fits["spread"]),
      baseline=f"NumPy, {fits['seconds']['numpy']:.3g} s", note=f"largest difference of a value {largest('fits'):.2g}",
    ),
    Claim(
      f"How many times as fast as a forward a position one pass makes {length} single-token interventions", "x",
      "higher", ours=passes["ratio"], threshold=1.0, spread=tuple(passes["spread"]),
      baseline=f"batched forwards, {passes['seconds']['a forward a position']:.3g} s",
      note=f"largest difference of a KL {largest('interventions'):.2g} nats",
    ),
  ]  # fmt: skip


def draw(speed: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  titles = {"fits": ("tokens fitted", "Low-rank fits"), "interventions": ("tokens T in the row", "T interventions")}
  for axis, (key, (label, title)) in zip(axes, titles.items(), strict=True):
    names = list(next(iter(speed[key].values()))["seconds"])
    for name in names:
      points = [(int(size), r["seconds"][name]) for size, r in speed[key].items()]
      shown = {"jax": "here", "numpy": "NumPy"}.get(name, name)
      axis.loglog(*zip(*points, strict=True), "o-", label=f"{shown}: n^{timing.slope(points[-2:]):.2f}")
    axis.set(xlabel=label, ylabel="seconds", title=title)
    axis.set_xticks(sizes := [int(size) for size in speed[key]], [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
  return {figures.save(figure, workdir, "speed"): "Seconds against size, with the log-log slopes at the end"}
