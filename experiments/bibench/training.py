"""Training by Adam or SGD: runs of other seeds and rates side by side or one after another, a program an operator."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.bibench.tasks import Task
from jaxlab.weights import bibench
from jaxlab.weights.bibench_layers import adopted, apply, clipped, init, outline

_MOMENTUM, _DECAY, _MILESTONES = 0.9, 1e-4, (0.5, 0.75)  # of SGD; of the schedule in steps
_ROWS = 500  # judged at once


class Recipe(NamedTuple):
  """Of one run: Adam, or SGD with momentum .9 and decay 1e-4; a cosine to 0, or a tenth at half and three quarters."""

  seed: Array | int
  rate: Array | float
  adam: Array | bool = True
  stepped: Array | bool = False


class Run(NamedTuple):
  """What is trained; every array has an axis of runs in front."""

  params: dict
  stats: dict
  moments: tuple


_ADAM, _SGD = optax.scale_by_adam(), optax.trace(_MOMENTUM)


def recipes(seeds, rates) -> list[Recipe]:
  """By Adam and a cosine, seed after seed of each rate."""
  return [Recipe(seed, rate) for rate, seed in itertools.product(rates, seeds)]


def stacked(trees: list):
  """On the host: an operation a leaf would be a program a shape."""
  return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def taken(tree, index):
  """One run's, or a slice of runs."""
  return jax.tree.map(lambda a: np.asarray(a)[index], tree)


def update(recipe: Recipe, slopes, run: Run, done, warmup: float = 0.0):
  """(params, moments) after a step, `done` the share of training before it; rates rise during the first `warmup`."""
  falling = jnp.where(
    recipe.stepped,
    jnp.prod(jnp.array([jnp.where(done >= place, 0.1, 1.0) for place in _MILESTONES])),
    (1 + jnp.cos(jnp.pi * done)) / 2,
  )
  rate = recipe.rate * falling * (jnp.minimum(1, done / warmup) if warmup else 1)
  adam, first = _ADAM.update(slopes, run.moments[0])
  sgd, second = _SGD.update(jax.tree.map(lambda g, p: g + _DECAY * p, slopes, run.params), run.moments[1])
  move = lambda p, a, s: p - rate * jnp.where(recipe.adam, a, s)
  return jax.tree.map(move, run.params, adam, sgd), (first, second)


class Trainer:
  """One operator in a task's network: `train` gives a `Run`, `judge` the accuracies of one.

  Args:
    epochs, batch, warmup: of `train`. taught: the loss is the distance from a teacher's logits and hidden states.
  """

  def __init__(self, task: Task, operator: str, *, epochs: int, batch: int, warmup: float = 0.0, taught: bool = False):
    self.task, self.operator, self.epochs, self.batch, self.taught = task, operator, epochs, batch, taught
    self.warmup = warmup
    self.example = task.parts["train"][0][:2]
    self.each = len(task.parts["train"][0]) // batch
    binary = outline(task.network, self.example, operator).binary
    self.binary = {name: on and operator in bibench.ALGORITHMS for name, on in binary.items()}
    over = (0, 0, 0, 0, None, None, None)
    self._begin = jax.jit(self._made)
    self._step = jax.jit(jax.vmap(self._one_step, in_axes=over), donate_argnums=0)
    self._judge = jax.jit(jax.vmap(self._right, in_axes=(0, 0, None, None)))

  def begin(self, recipe: Recipe, given: Run | None = None) -> Run:
    """Made by the seed; latent weights, norms and whole layers from `given`, a checkpoint."""
    run = self._begin(recipe.seed)
    return run if given is None else run._replace(params=adopted(run.params, given.params), stats=given.stats)

  def _made(self, seed) -> Run:
    params, stats = init(self.task.network, jax.random.key(seed), self.example, self.operator)
    return Run(params, stats, (_ADAM.init(params), _SGD.init(params)))

  def train(self, plan: list[Recipe], given: list[Run] | None = None, watch=None) -> Run:
    """All runs of a plan; given: a checkpoint for each. watch(epoch, run) after every epoch."""
    group = len(plan) if self.task.together else 1
    made = []
    for first in range(0, len(plan), group):
      mine = plan[first : first + group]
      start = given[first : first + group] if given else [None] * group
      run = stacked([self.begin(recipe, one) for recipe, one in zip(mine, start, strict=True)])
      teachers = stacked([(one.params, one.stats) for one in start]) if self.taught else None
      made.append(self._epochs(run, stacked(mine), [recipe.seed for recipe in mine], teachers))
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *made)

  def _epochs(self, run: Run, recipe: Recipe, seeds: list[int], teachers) -> Run:
    x, y = self.task.parts["train"]
    rngs = [np.random.default_rng((seed, 1)) for seed in seeds]  # the same batches for every operator and rate
    number = 0
    for epoch in range(self.epochs):
      orders = np.stack([rng.permutation(len(x))[: self.each * self.batch].reshape(self.each, -1) for rng in rngs])
      for i in range(self.each):
        run = self._step(run, recipe, teachers, orders[:, i], np.array([number, epoch], np.int32), x, y)
        number += 1
    return run

  def _one_step(self, run: Run, recipe: Recipe, teacher, chosen, when, x, y):
    number, epoch = when
    key = jax.random.fold_in(jax.random.key(recipe.seed), number)
    batch = self.task.augment(key, x[chosen])
    at = bibench.schedule(epoch, self.epochs)

    def loss(params):
      (logits, hidden), stats = self._apply(params, run.stats, batch, at=at, train=True)
      if teacher is None:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[chosen]).mean(), stats
      (wanted, states), _ = apply(self.task.network, *teacher, batch, "fp32")
      far = optax.softmax_cross_entropy(logits, jax.nn.softmax(wanted)).mean()
      return far + sum(jnp.mean((a - b) ** 2) for a, b in zip(hidden, states, strict=True)), stats

    slopes, stats = jax.grad(loss, has_aux=True)(run.params)
    params, moments = update(recipe, slopes, run, number / (self.epochs * self.each), self.warmup)
    return Run(clipped(params, self.binary), stats, moments)

  def _apply(self, params, stats, x, **how):
    return apply(self.task.network, params, stats, x, self.operator, **how)

  def _right(self, params, stats, x, y):
    (logits, _), _ = self._apply(params, stats, x)
    return (jnp.argmax(logits, axis=-1) == y).sum()

  def judge(self, run: Run, x, y) -> np.ndarray:
    """The accuracy of every run, 0..1; as trained, so that a FDA's noise has ended."""
    runs = len(jax.tree.leaves(run.params)[0])
    group = runs if self.task.together else 1
    right = np.zeros(runs)
    rows = min(_ROWS, len(x))
    whole = len(x) // rows * rows
    for first in range(0, runs, group):
      part = taken((run.params, run.stats), slice(first, first + group))
      counts = [self._judge(*part, x[i : i + rows], y[i : i + rows]) for i in range(0, whole, rows)]
      right[first : first + group] = np.sum(jax.device_get(counts), axis=0)
    return right / whole
