r"""iCBS: pruning as a sequence of small quadratic problems over blocks of weights (Rosenberg et al. 2024,
arXiv 2411.17796; after the Combinatorial Brain Surgeon, Yu et al. 2022, arXiv 2203.04466).

A weight is its original value w0 or 0; the density of every map never changes. Of one map at a time a block of n
weights is taken, k that are pruned and missed most and n - k that are kept and needed least, and decided together:

  x_i = 1 prunes i,   dw = w - w0,   step = -(dw + w0 x),   g and H of the loss at the pruned network as it is
  dL(x) = a g.step + step^T H step / 2 + lam |step|^2 = const + x^T Q x,          to be least with sum x = k
  Q = diag(w0 (H dw) - a w0 g + lam w0 (2 dw + w0)) + (w0 w0^T) H / 2
  const = dw^T H dw / 2 - a g.dw + lam |dw|^2

H is the mean of g_b g_b^T over samples, so that Q is of low rank beside its diagonal and is never formed (`qcbo`).

  network = Tensors(losses)                                         # or Language() for a Transformer (`per_sample`)
  scores = {name: magnitude(w) for name, w in weights.items()}
  found = prune(network, weights, scores, batches, density=0.1)     # batches: an endless iterator
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.weights import qcbo
from jaxlab.weights.calibration import require_finite
from jaxlab.weights.per_sample import Network, Pairs
from jaxlab.weights.pruning import keep, require_density
from jaxlab.weights.qcbo import Dense, LowRank

HESSIANS = ("per_sample", "mean", "diagonal", "exact")
SELECTIONS = ("gradient", "magnitude", "scores", "random")
_NEVER = np.iinfo(np.int32).min


@dataclasses.dataclass(frozen=True)
class Settings:
  """How blocks are chosen and decided; the defaults are the published ones but for the solver, which never worsens.

  Attributes:
    block: n. gradient, ridge: a and lam.
    fix_prune, fix_keep: shares of the pruned weights with the lowest scores, and of the kept ones with the highest,
      that stay so for good. tabu: at most this share of a map's other weights waits before it is in a block again.
    epochs, steps, least: steps in each epoch, shared out by log10 of the maps' sizes, `least` a map or more as far as
      they reach.
    hessian: "per_sample", the Fisher matrix; "mean", of the mean gradient alone; "diagonal", no interactions; "exact",
      one product with the Hessian a weight of the block.
    select: what a block is chosen by: "gradient" |w0 g|, "magnitude" |w0|, the "scores" of the start, "random".
    solver, restarts, betas, iterations: of `qcbo.solve`.
    released_cutoff: Q without its negative entries, as the published code has it.
    restore: a move that raises the loss of the held-out batch is taken back.
  """

  block: int = 1024
  gradient: float = 0.75
  ridge: float = 1e-3
  fix_prune: float = 0.42
  fix_keep: float = 0.35
  tabu: float = 0.40
  epochs: int = 10
  steps: int = 30
  least: int = 10
  hessian: str = "per_sample"
  select: str = "gradient"
  solver: str = "sa+swap"
  restarts: int = 10
  betas: tuple[float, float, float] = qcbo.BETAS
  iterations: int = 1000
  released_cutoff: bool = False
  restore: bool = False

  def __post_init__(self):
    require_counts(block=self.block, epochs=self.epochs, steps=self.steps)
    require_choice("hessian", self.hessian, HESSIANS)
    require_choice("select", self.select, SELECTIONS)
    require_choice("solver", self.solver, qcbo.SOLVERS)
    for name in ("fix_prune", "fix_keep", "tabu"):
      share = getattr(self, name)
      require(0 <= share <= 1, f"{name} is {share}; it is a share, 0..1")
    require(self.ridge >= 0, f"ridge is {self.ridge}; it must not be negative")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Of one map, flat: mask, True stays; fixed for good; last: the map's step in which a weight was in a block."""

  mask: Bool[Array, "n"]
  fixed: Bool[Array, "n"]
  last: Int[Array, "n"]


class Plan(NamedTuple):
  """Of one map: pruned and kept weights in a block, and for how many of its steps they are tabu afterwards."""

  pruned: int
  kept: int
  reach: int


def start(scores: Float[Array, "inputs outputs"], mask: Bool[Array, "inputs outputs"], s: Settings) -> State:
  """The state before the first step."""
  scores, mask = np.asarray(scores, np.float32).ravel(), np.asarray(mask, bool).ravel()
  fixed = np.zeros(len(mask), bool)
  for where, rank, share in ((~mask, scores, s.fix_prune), (mask, -scores, s.fix_keep)):
    index = np.flatnonzero(where)
    count = int(share * len(index))
    if count:
      fixed[index[np.argpartition(rank[index], count - 1)[:count]]] = True
  return State(jnp.asarray(mask), jnp.asarray(fixed), jnp.full(len(mask), _NEVER, jnp.int32))


def plan(state: State, block: int, tabu: float) -> Plan:
  """Half of a block is pruned weights, half kept ones, as far as there are; all that are free if they fit a block.

  A block keeps its number of pruned weights, so that these numbers hold for all steps: the list of tabu weights is as
  long as leaves a block of both kinds.
  """
  free = np.asarray(~state.fixed)
  mask = np.asarray(state.mask)
  pruned, kept = int((free & ~mask).sum()), int((free & mask).sum())
  if not (pruned and kept):
    return Plan(0, 0, 0)
  if block >= pruned + kept:
    return Plan(pruned, kept, 0)
  k = min(max(block // 2, 1), pruned)
  m = min(max(block - k, 1), kept)
  k = min(max(block - m, 1), pruned)
  reach = min(int(tabu * (pruned + kept)) // (k + m), (pruned - k) // k, (kept - m) // m)
  return Plan(k, m, reach)


def select(values: Float[Array, "n"], state: State, step: Int[Array, ""], *, plan: Plan) -> Int[Array, "block"]:
  """The free pruned weights of the largest values, then the free kept ones of the smallest; none that is tabu."""
  return _select(values, state, step - plan.reach, plan.pruned, plan.kept)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _select(values, state: State, oldest, pruned: int, kept: int):
  free = ~state.fixed & (state.last < oldest)
  most = jax.lax.top_k(jnp.where(free & ~state.mask, values, -jnp.inf), pruned)[1]
  least = jax.lax.top_k(jnp.where(free & state.mask, -values, -jnp.inf), kept)[1]
  return jnp.concatenate([most, least])


def build_block(
  original: Float[Array, "n"],
  change: Float[Array, "n"],
  samples: Float[Array, "batch n"],
  *,
  gradient: float = 0.75,
  ridge: float = 1e-3,
) -> tuple[LowRank, Float[Array, ""]]:
  """(Q, const) of a block from each sample's gradient: original w0, change dw, gradient a, ridge lam."""
  g = samples.mean(axis=0)
  root = samples / math.sqrt(len(samples))
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  seen = product(root, change)
  linear = _linear(original, change, product(seen, root), g, gradient, ridge)
  return LowRank((original * root).T, linear), _constant(change, seen @ seen, g, gradient, ridge)


def build_dense(
  original: Float[Array, "n"],
  change: Float[Array, "n"],
  hessian: Float[Array, "n n"],
  g: Float[Array, "n"],
  *,
  gradient: float = 0.75,
  ridge: float = 1e-3,
) -> tuple[Dense, Float[Array, ""]]:
  """(Q, const) of a block from any Hessian and the mean gradient."""
  moved = jnp.matmul(hessian, change, precision=jax.lax.Precision.HIGHEST)
  q = original[:, None] * original * hessian / 2 + jnp.diag(_linear(original, change, moved, g, gradient, ridge))
  return Dense(q), _constant(change, change @ moved, g, gradient, ridge)


def build_diagonal(original, change, samples, *, gradient: float = 0.75, ridge: float = 1e-3):
  """As `build_block`, of H's diagonal alone: every weight by itself."""
  curve = (samples**2).mean(axis=0)
  g = samples.mean(axis=0)
  linear = _linear(original, change, curve * change, g, gradient, ridge) + original**2 * curve / 2
  return LowRank(jnp.zeros((len(original), 1)), linear), _constant(change, curve @ change**2, g, gradient, ridge)


def _linear(original, change, moved, g, gradient, ridge):
  return original * (moved - gradient * g + ridge * (2 * change + original))


def _constant(change, energy, g, gradient, ridge):
  return energy / 2 - gradient * (g @ change) + ridge * (change @ change)


@functools.partial(jax.jit, static_argnames=("hessian",))
def _problem(original, state: State, pairs: Pairs, index, gradient, ridge, *, hessian: str):
  w0 = original.ravel()[index].astype(jnp.float32)
  change = jnp.where(state.mask[index], 0, -w0)
  samples = pairs.at(index)
  samples = samples.mean(axis=0, keepdims=True) if hessian == "mean" else samples
  build = build_diagonal if hessian == "diagonal" else build_block
  return build(w0, change, samples, gradient=gradient, ridge=ridge)


def exact_hessian(network: Network, params, name: str, batch, index: Int[Array, "n"]) -> Float[Array, "n n"]:
  """Of the mean loss, restricted to those entries of one map, a product with it after the other."""
  weight = network.get(params, name)

  def loss(values):
    changed = weight.ravel().at[index].set(values).reshape(weight.shape)
    return network.loss(network.put(params, name, changed), batch)

  def column(i):
    one = jnp.zeros(len(index), weight.dtype).at[i].set(1)
    return jax.jvp(jax.grad(loss), (weight.ravel()[index],), (one,))[1]

  return jax.jit(lambda: jax.lax.map(column, jnp.arange(len(index))))()


@jax.jit
def _values(original, pairs: Pairs):
  """|w0 g| of every weight."""
  return jnp.abs(original * pairs.mean()).ravel()


@functools.partial(jax.jit, donate_argnums=1)
def _moved(original, state: State, index, x, step) -> tuple[Array, State]:
  """(the map's weights, its state) after a block was decided."""
  mask = state.mask.at[index].set(~x)
  state = State(mask, state.fixed, state.last.at[index].set(step))
  return jnp.where(mask.reshape(original.shape), original, 0), state


def decide(problem, key, *, plan: Plan, s: Settings) -> tuple[Bool[Array, "block"], Float[Array, ""]]:
  """(x, its energy as the solver has it) of a block that `select` chose, from "no change" on."""
  begin = _no_change(plan)
  if s.hessian == "diagonal":
    lowest = jnp.argsort(problem.linear)[: plan.pruned]
    x = jnp.zeros_like(begin).at[lowest].set(True)
    return x, problem.energy(x)
  how = dict(k=plan.pruned, how=s.solver, betas=s.betas, restarts=s.restarts, iterations=s.iterations)
  if s.released_cutoff:
    scale = qcbo.scale_of(problem)
    x, energy = qcbo.solve(qcbo.cut(problem.times(scale), released=True), begin, key, **how)
    return x, energy / scale
  return qcbo.solve(problem, begin, key, **how)


def schedule(sizes: Mapping[str, int], s: Settings, rng: np.random.Generator) -> list[str]:
  """The maps of one epoch's steps, in random order; each at least `least` times as far as the steps reach."""
  weight = {name: math.log10(max(size, 10)) for name, size in sizes.items()}
  share = s.steps / sum(weight.values())
  names = [name for name in sizes for _ in range(max(s.least, math.ceil(share * weight[name])))]
  return [names[i] for i in rng.permutation(len(names))[: s.steps]]


class Found(NamedTuple):
  """params: pruned. masks: {map: bool like its matrix}. steps: a dict a step, see `prune`. covered: after each epoch,
  the share of all weights that were in a block."""

  params: object
  masks: dict[str, np.ndarray]
  steps: list[dict]
  covered: list[float]


def prune(
  network: Network,
  params,
  scores: Mapping[str, Float[Array, "inputs outputs"]],
  batches: Iterator,
  *,
  density: float,
  per: str = "tensor",
  masks: Mapping[str, Bool[Array, "inputs outputs"]] | None = None,
  settings: Settings = Settings(),
  seed: int = 0,
  held=None,
  measured: bool = False,
  watch: Callable[[int, object, float], None] | None = None,
) -> Found:
  """Maps at a density, from those of the largest scores on, made better block by block.

  Args:
    params: the original ones; they are left as they are.
    scores: of the maps to be pruned (`pruning`): what the start and the fixed weights are chosen by.
    batches: what each step's gradients are taken on; one is drawn a step.
    density, per: of the start, as in `pruning.keep`; or its `masks`.
    held: a batch for `restore`.
    measured: also takes the loss of each step's own batch after it.
    watch: called as watch(epochs done, params, share of weights that were in a block), before the first epoch too; it
      must not keep the params, which are overwritten.

  Returns:
    `Found`; each step has {epoch, map, swapped: weights exchanged, predicted: dL, before: the batch's loss}, with
    `measured` also {after}, with `restore` {held: the loss after the move, restored}.

  Raises:
    InputError: scores or masks that do not fit the maps, a density outside 0..1, weights that are not finite (named),
      no batch left or an empty one, a loss or an energy that is no number, `restore` without `held`.
  """
  s = settings
  require_density(density)
  require(not s.restore or held is not None, "restore takes a held-out batch; give held")
  names = network.names(params)
  unknown = sorted(set(scores) - set(names))
  require(not unknown, f"scores of {', '.join(unknown)}; the network's maps are {', '.join(names)}")
  require(bool(scores), "no map has scores; give those of the maps to be pruned")
  require_finite(params)
  original = {name: jnp.copy(network.get(params, name)) for name in scores}
  states = {}
  now = jax.tree.map(jnp.copy, params)
  for name, weight in original.items():
    mask = keep(scores[name], density, per=per) if masks is None else masks[name]
    for what, given in (("scores", scores[name]), ("mask", mask)):
      fits = np.shape(given) == weight.shape
      require(fits, f"the {what} of {name} have shape {np.shape(given)}, the map {weight.shape}; give one a weight")
    states[name] = start(scores[name], mask, s)
    now = network.put(now, name, jnp.where(jnp.asarray(mask), weight, 0))
  plans = {name: plan(state, s.block, s.tabu) for name, state in states.items()}
  sizes = {name: weight.size for name, weight in original.items()}
  visits = dict.fromkeys(original, 0)
  rng, key = np.random.default_rng(seed), jax.random.key(seed)
  best = float(network.loss(now, held)) if s.restore else 0.0
  steps, covered = [], []
  watch = watch or (lambda *_: None)
  watch(0, now, 0.0)
  for epoch in range(1, s.epochs + 1):
    for name in schedule(sizes, s, rng):
      made = dict(epoch=epoch, map=name, swapped=0)
      steps.append(made)
      batch = next(batches, None)
      require(batch is not None, f"no batch is left after {len(steps) - 1} steps; give an endless iterator")
      empty = any(0 in np.shape(leaf) for leaf in jax.tree.leaves(batch))
      require(not empty, f"the batch of step {len(steps)} is empty; give one or more samples")
      if plans[name].pruned == 0:
        continue
      own = jax.random.fold_in(key, len(steps))
      given = network, now, name, batch, original[name], scores[name], states[name], visits[name]
      index, x, before, predicted = _step(*given, own, plan=plans[name], s=s)
      made |= dict(swapped=int((~x[: plans[name].pruned]).sum()), predicted=float(predicted), before=float(before))
      finite = math.isfinite(made["predicted"]) and math.isfinite(made["before"])
      require(finite, f"step {len(steps)}, map {name}: loss {made['before']}, predicted change {made['predicted']}")
      weight, states[name] = _moved(original[name], states[name], index, x, visits[name])
      now = network.put(now, name, weight)
      if measured:
        made["after"] = float(network.loss(now, batch))
      if s.restore:
        made["held"] = float(network.loss(now, held))
        made["restored"] = made["held"] > best
        best = min(best, made["held"])
        if made["restored"]:
          weight, states[name] = _moved(original[name], states[name], index, _no_change(plans[name]), visits[name])
          now = network.put(now, name, weight)
      visits[name] += 1
    reached = sum(int((state.last > _NEVER).sum()) for state in states.values())
    covered.append(reached / sum(sizes.values()))
    watch(epoch, now, covered[-1])
  final = {name: np.asarray(state.mask).reshape(original[name].shape) for name, state in states.items()}
  return Found(now, final, steps, covered)


def _step(network, params, name, batch, original, scores, state: State, visit: int, key, *, plan: Plan, s: Settings):
  """(index of a block, x, the batch's loss, the predicted change)."""
  pairs = network.observe(params, name, batch)
  first, second = jax.random.split(key)
  if s.select == "gradient":
    values = _values(original, pairs)
  elif s.select == "random":
    values = jax.random.uniform(first, (original.size,))
  else:
    values = jnp.abs(original if s.select == "magnitude" else jnp.asarray(scores)).ravel()
  index = select(values, state, visit, plan=plan)
  if s.hessian == "exact":
    flat = original.ravel()[index]
    change = jnp.where(state.mask[index], 0, -flat)
    hessian = exact_hessian(network, params, name, batch, index)
    g = pairs.at(index).mean(axis=0)
    problem, constant = build_dense(flat, change, hessian, g, gradient=s.gradient, ridge=s.ridge)
  else:
    problem, constant = _problem(original, state, pairs, index, s.gradient, s.ridge, hessian=s.hessian)
  x, energy = decide(problem, second, plan=plan, s=s)
  return index, x, pairs.losses.mean(), energy + constant


def _no_change(plan: Plan) -> Bool[Array, "block"]:
  return jnp.arange(plan.pruned + plan.kept) < plan.pruned
