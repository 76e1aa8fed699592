"""A classifier of images trained here and pruned: iCBS from magnitude on, its parts left out, and its rivals."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.icbs import ancestor
from experiments.icbs.language import VARIANTS, batches, settings
from experiments.long_context import parse
from jaxlab.core.checks import require_choice
from jaxlab.data import images
from jaxlab.weights import icbs, pruning
from jaxlab.weights.calibration import moments
from jaxlab.weights.per_sample import Tensors

SUBJECT = "images"


def losses(dense, batch):
  """Cross-entropy of a ReLU network, image by image."""
  return optax.softmax_cross_entropy_with_integer_labels(logits(dense, batch[0]), batch[1])


def logits(dense, x):
  return dense("third", jax.nn.relu(dense("second", jax.nn.relu(dense("first", x)))))


NETWORK = Tensors(losses)
_plain = lambda params: lambda name, x: x @ params[name]


@jax.jit
def _judged(params, x, y):
  scores = logits(_plain(params), x)
  right = (jnp.argmax(scores, axis=1) == y).mean()
  return right, optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def load(config, cache: Path):
  """((x, y) to train and calibrate on, (x, y) to be judged on); pixels normalised by the training set's."""
  p = config.pictures
  splits = images.labelled(p.name, cache=cache, path=p.path, most=p.most or None)
  flat = lambda one: one.pixels.reshape(len(one.labels), -1).astype(np.float32) / 255
  train, test = flat(splits["train"]), flat(splits["test"])
  mean, spread = train.mean(), train.std()
  scaled = lambda x, split: ((x - mean) / spread, splits[split].labels)
  return scaled(train, "train"), scaled(test, "test")


def trained(config, train) -> dict[str, jnp.ndarray]:
  """A network of three matrices after epochs of Adam with a falling rate."""
  p = config.pictures
  x, y = train
  shapes = {"first": (x.shape[1], p.width), "second": (p.width, p.width), "third": (p.width, int(y.max()) + 1)}
  keys = jax.random.split(jax.random.key(config.seed), 3)
  params = {
    name: jax.random.normal(key, shape) * np.sqrt(2 / shape[0])
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  each = len(x) // p.train_batch
  steps = p.train_epochs * each
  optimizer = optax.adamw(optax.cosine_decay_schedule(p.rate, steps), weight_decay=p.decay)

  @jax.jit
  def epoch(params, state, x, y):
    def step(carry, batch):
      params, state = carry
      slope = jax.grad(lambda params: losses(_plain(params), batch).mean())(params)
      updates, state = optimizer.update(slope, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), (x, y))[0]

  state, rng = optimizer.init(params), np.random.default_rng(config.seed)
  for _ in range(p.train_epochs):
    order = rng.permutation(len(x))[: each * p.train_batch].reshape(each, -1)
    params, state = epoch(params, state, x[order], y[order])
  return params


def one_shot(params, rows, how: str, density: float, seed: int = 0):
  """(params, masks, scores): map after map, each calibrated behind those pruned before, as `pruning.prune` does."""
  now, masks, scores = dict(params), {}, {}
  slopes = jax.grad(NETWORK.loss, argnums=0)(params, rows) if how == "gradient" else None
  for i, (name, weight) in enumerate(params.items()):
    seen = moments(NETWORK.observe(now, name, rows).inputs) if how in ("wanda", "sparsegpt") else None
    if how == "sparsegpt":
      now[name], scores[name] = pruning.sparsegpt(weight, seen, density=density)
      masks[name] = np.asarray(now[name] != 0)
      continue
    made = {
      "magnitude": lambda w=weight: pruning.magnitude(w),
      "wanda": lambda w=weight, x=seen: pruning.wanda(w, x),
      "gradient": lambda w=weight, n=name: jnp.abs(w * slopes[n]),
      "random": lambda w=weight, i=i: np.random.default_rng((seed, i)).random(w.shape, np.float32),
    }
    require_choice("a method", how, made)
    scores[name] = made[how]()
    masks[name] = pruning.keep(scores[name], density, per="output" if how == "wanda" else "tensor")
    now[name] = jnp.where(masks[name], weight, 0)
  return now, masks, scores


def measure(config, cache: Path, console) -> dict:
  """{"dense": {accuracy in %, loss}, "rows": [{method, density, accuracy, loss}], "curves", "steps"}.

  Curves and steps as of a language model, of magnitude's start at every density of iCBS.
  """
  p = config.pictures
  train, test = load(config, cache)
  params = trained(config, train)
  rng = np.random.default_rng(config.seed)
  pool = rng.permutation(len(train[0]))
  rows = jax.tree.map(lambda a: jnp.asarray(a[pool[: p.one_shot]]), train)
  many = jax.tree.map(lambda a: jnp.asarray(a[pool[: p.more]]), train)
  x, y = map(jnp.asarray, test)

  def judged(params) -> dict[str, float]:
    right, loss = _judged(params, x, y)
    return dict(accuracy=100 * float(right), loss=float(loss))

  def drawn():
    for index in batches(np.arange(len(train[0])), p.batch, config.seed):
      yield train[0][index], train[1][index]

  curves, steps = {}, {}
  begun = functools.cache(functools.partial(one_shot, params, rows))

  def improved(how: str, start: str, density: float, watch=None) -> icbs.Found:
    _, masks, scores = begun(start, density)
    how = settings(p, **VARIANTS[how])
    given = dict(density=density, masks=masks, settings=how, seed=config.seed, measured=watch is not None, watch=watch)
    return icbs.prune(NETWORK, params, scores, drawn(), **given)

  @functools.lru_cache(maxsize=1)  # a gradient a sample is large
  def surgeon(density: float):
    few = jax.tree.map(lambda a: a[: p.ancestor.samples], rows)
    return ancestor.select(NETWORK, params, few, density, p.ancestor, config.seed)

  def watched(density: float):
    curve = []
    watch = lambda epoch, params, covered: curve.append(dict(epoch=epoch, covered=covered) | judged(params))
    found = improved("icbs", p.start, density, watch)
    curves[f"{density:g}"] = curve
    steps[f"{density:g}"] = [[one["predicted"], one["after"] - one["before"]] for one in found.steps if "after" in one]
    return found.params

  def made(method: str, density: float):
    if method == "icbs":
      return watched(density)
    if method in VARIANTS:
      return improved(method, p.start, density).params
    special: dict[str, Callable] = {
      "icbs_from_wanda": lambda: improved("icbs", "wanda", density).params,
      "wanda_more": lambda: one_shot(params, many, "wanda", density)[0],
      "cbs": lambda: surgeon(density)[0],
      "cbs_update": lambda: ancestor.update(*surgeon(density)),
    }
    return special[method]() if method in special else begun(method, density)[0]

  found = []
  for text in p.methods:
    method, density = parse(text)
    found.append(dict(method=method, density=density) | judged(made(method, density)))
    console.say(f"  {text}: {found[-1]['accuracy']:.4g} % right, loss {found[-1]['loss']:.4g}")
  return {"dense": judged(params), "rows": found, "curves": curves, "steps": steps}
