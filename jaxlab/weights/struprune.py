r"""STRUPRUNE: heads and neurons pruned for the whole network with one layer in memory (Song et al. 2025,
arXiv 2510.03246).

  survey      one pass, a layer at a time: a score of every group, an importance of every layer's attention and MLP
  allocate    how many each keeps, from those numbers alone (`struprune_allocation`)
  rebuild     a second pass: each layer chooses its groups and weights by ADMM so that it gives what the original gave,
              reading what the layers pruned before it give (`struprune_solver`)

  small = prune(model, tokens, budget=0.7)

A model in host memory (its arrays NumPy's) is streamed: one layer of it is on the device at a time. The paper's
O(sqrt N) is what that comes to where depth grows with the size of a layer; in general it is O(N / L).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.models import Transformer, maps
from jaxlab.models.block import Block, Side
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine
from jaxlab.weights import calibration, structured
from jaxlab.weights.calibration import Moments, moments
from jaxlab.weights.structured import ENDS, Groups, Least, counts
from jaxlab.weights.struprune_allocation import most_sparse, softmax, threshold
from jaxlab.weights.struprune_solver import Admm, Mlp, Split, admm, centred, least_squares, obs, ridged, sparsellm

RULES = ("softmax", "threshold", "uniform")
SCORES = ("wanda", "obs", "magnitude")
TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # of the standard deviation of the importances
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal, tried on held-out rows
_HELD = 4  # one row of so many is held out


@dataclasses.dataclass(frozen=True)
class Survey:
  """scores: of every group, of mean 1 within its kind and layer; importance: (layers, 2), of attention and MLP, each
  over its parameters."""

  scores: Groups
  importance: np.ndarray


class Options(NamedTuple):
  """ridge: of the mean diagonal, while groups are chosen; biases: means of what is left out are added; refit: weights
  are those of least squares, as far as held-out rows gain by it."""

  admm: Admm = Admm()
  split: Split = Split()
  ridge: float = 1e-2
  biases: bool = True
  refit: bool = True


def prune(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  *,
  budget: float,
  rule: str = "softmax",
  temperature: float | None = None,
  score: str = "wanda",
  most: float = 0.9,
  least: Least = Least(),
  multiple: int = 1,
  options: Options = Options(),
  batch: int = 8,
) -> Transformer:
  """The network at that share of its blocks' parameters; at 1 the model as it is.

  Args:
    tokens: calibration text, a multiple of `batch` rows; the last quarter is held out.
    rule: how layers share the loss, of `RULES`; temperature: of "softmax", of the importances' standard deviation; None
      takes that of `TEMPERATURES` whose loss is least where groups are only left out.
    score: of `SCORES`; most: the largest sparsity; multiple: of neurons.

  Raises:
    InputError: a budget outside (0, 1] or too small for `least`, an unknown rule or score, a text of one row, a model
      with other blocks than plain dense ones, or weights that are not finite.
  """
  require(0 < budget <= 1, f"budget is {budget}; it must lie in 0 < budget <= 1")
  require_choice("rule", rule, RULES)
  structured.require_prunable(model)
  if budget == 1:
    return model
  found = survey(model, tokens, score=score, batch=batch)
  how = dict(budget=budget, most=most, least=least, multiple=multiple, biases=options.biases)
  if rule == "softmax" and temperature is None:
    temperature = best_temperature(model, tokens, found, batch=batch, **how)
  kept = allocate(model.config, found, rule=rule, temperature=temperature, **how)
  return rebuild(model, tokens, *kept, options=options, batch=batch)


def survey(model: Transformer, tokens: Int[Array, "rows time"], *, score: str = "wanda", batch: int = 8) -> Survey:
  """Pass 1. The importance of a unit is mean |what it adds|^2 / |the state after it|^2 over its parameters.

  Raises:
    InputError: as `prune`.
  """
  require_choice("score", score, SCORES)
  structured.require_prunable(model)
  outer, parts = calibration.opened(model, tokens, batch=batch)
  sides = lambda part: calibration.embed(outer, part)[1]
  states = [_host(calibration.embed(outer, part)[0]) for part in parts]
  c, found, added = model.config, {name: [] for name in ENDS}, []
  for block, kind in calibration.layers(model):
    total = None
    for i, part in enumerate(parts):
      y, ratios, new = _survey_block(block, states[i], sides(part), **kind)
      total = (ratios, new) if total is None else _add(total, (ratios, new))
      states[i] = _host(y)
    added.append(_host(total[0]) / len(parts))
    for name, groups in zip(ENDS, (c.kv_heads, c.mlp_width), strict=True):
      one = maps.named(block)[name].weight[...]
      found[name].append(_host(_scored(one, total[1][name], how=score, groups=groups)))
    del block, one, total, y, new  # before the next one is loaded
  scores = Groups(*(np.stack(found[name]) for name in ENDS))
  return Survey(structured.normalised(scores), np.stack(added) / _sizes(c))


def _host(a) -> np.ndarray:
  """A copy in host memory: on a CPU a view would keep the device's array alive."""
  return np.array(a)


def _sizes(config: TransformerConfig) -> np.ndarray:
  """(2,) the parameters of attention and of an MLP."""
  return np.array(structured.costs(config)) * np.array([config.kv_heads, config.mlp_width])


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _survey_block(block: Block, x, side: Side, *, window, row):
  """(output, mean |branch|^2 / |state|^2 of both, moments of what o and down read)."""
  inner, attended, middle, _, hidden, out = _through(block, x, side, window=window, row=row)
  ratio = lambda a, b: (jnp.square(b - a).sum(axis=-1) / jnp.square(b).sum(axis=-1)).mean()
  ratios = jnp.stack([ratio(inner, middle), ratio(middle, out)])
  return out, ratios, {"o": moments(attended), "mlp.down": moments(hidden)}


_add = jax.jit(lambda a, b: (a[0] + b[0], {name: calibration.merge(a[1][name], b[1][name]) for name in a[1]}))


@functools.partial(jax.jit, static_argnames=("how", "groups"))
def _scored(weight: Float[Array, "inputs outputs"], x: Moments, *, how: str, groups: int) -> Float[Array, "groups"]:
  weight = weight.astype(jnp.float32)
  if how == "obs":
    gram, _ = ridged(x.second, 0.0, weight, Options().ridge)
    return obs(gram, weight, len(weight) // groups)
  return structured.by_group({"wanda": structured.wanda, "magnitude": structured.magnitude}[how](weight, x), groups)


def _through(block: Block, x, side: Side, *, window, row):
  """(what attention adds to, attention, the state after it, what the MLP reads, its activations, the output)."""
  inner, attended = calibration.attend(block, x, side, window=window, row=row)
  attended = attended.reshape(*attended.shape[:-2], -1)
  middle = inner + block.o(attended)
  read = block.mlp_norm(inner if block.config.parallel_sublayers else middle)
  hidden = _mlp(block).hidden(read, block.config.mlp)
  return inner, attended, middle, read, hidden, middle + block.mlp.down(hidden)


def _mlp(block: Block) -> Mlp:
  weight = lambda one: None if one is None else one.weight[...].astype(jnp.float32)
  return Mlp(weight(block.mlp.up), weight(block.mlp.gate), weight(block.mlp.down))


def allocate(
  config: TransformerConfig,
  found: Survey,
  *,
  budget: float,
  rule: str = "softmax",
  temperature: float | None = None,
  most: float = 0.9,
  least: Least = Least(),
  multiple: int = 1,
  biases: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
  """(key-value heads, neurons) that every layer keeps, biases among the parameters of the budget."""
  depth, sizes = config.depth, np.tile(_sizes(config), config.depth)
  numbers = budget * sizes.sum() - 2 * depth * config.width * biases
  structured.require_room(config, numbers, least)
  how = dict(numbers=numbers, least=least)
  if rule == "threshold":
    # A unit's importance is shared out among its groups by their scores, of mean 1.
    price = np.array(structured.costs(config))
    worth = [found.importance[:, i, None] * price[i] for i in range(2)]
    keep = threshold(Groups(found.scores.heads * worth[0], found.scores.neurons * worth[1]), config, **how)
    shares = np.stack([keep.heads.mean(axis=1), keep.neurons.mean(axis=1)], axis=1)
  elif rule == "uniform":
    shares = np.full((depth, 2), numbers / sizes.sum())
  else:
    require(temperature is not None, "the rule softmax has a temperature; give one, or take best_temperature")
    most = np.tile(most_sparse(config, most, least), depth)
    importance = found.importance.ravel()
    given = dict(sparsity=1 - numbers / sizes.sum(), temperature=temperature * (importance.std() or 1.0), most=most)
    shares = 1 - softmax(importance, sizes, **given).reshape(depth, 2)
  return counts(shares, config, **how, multiple=multiple)


def best_temperature(model: Transformer, tokens, found: Survey, *, batch: int = 8, **how) -> float:
  """That of `TEMPERATURES` whose allocation has the least loss on the held-out rows, where groups are only left out."""
  config = model.config
  keeps = []
  for temperature in TEMPERATURES:
    heads, neurons = allocate(config, found, rule="softmax", temperature=temperature, **how)
    keeps.append(Groups(structured.top(found.scores.heads, heads), structured.top(found.scores.neurons, neurons)))
  _, held = split_rows(tokens)
  return TEMPERATURES[int(np.argmin(masked_losses(model, tokens[-held:], keeps, batch=batch)))]


def masked_losses(model: Transformer, tokens, keeps: Sequence[Groups], *, batch: int = 8) -> np.ndarray:
  """The mean loss of predicting a text of every choice of groups, from one pass over the layers.

  Args:
    batch: at most so many rows at a time, as many as divide the text.
  """
  batch = next(rows for rows in range(min(batch, len(tokens)), 0, -1) if len(tokens) % rows == 0)
  outer, parts = calibration.opened(model, tokens, batch=batch)
  sides = lambda part: calibration.embed(outer, part)[1]
  states = [[_host(calibration.embed(outer, part)[0]) for part in parts] for _ in keeps]
  backout, layer = states, 0
  for block, kind in calibration.layers(model):

    def through(own, keep, block=block, layer=layer, kind=kind):
      pair = jnp.asarray(keep.heads[layer]), jnp.asarray(keep.neurons[layer])
      return [_host(_masked(block, x, sides(part), *pair, **kind)) for x, part in zip(own, parts, strict=True)]

    states = [through(own, keep) for own, keep in zip(states, keeps, strict=True)]
    backout, layer = (states if layer == model.depth // 2 else backout), layer + 1
    del block, through  # before the next one is loaded
  judge = lambda own, back: np.mean([_nll(outer, x, b, p) for x, b, p in zip(own, back, parts, strict=True)])
  return np.array([judge(own, back) for own, back in zip(states, backout, strict=True)])


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _masked(block: Block, x, side: Side, heads, neurons, *, window, row):
  inner, attended = calibration.attend(block, x, side, window=window, row=row)
  scale = jnp.repeat(heads, attended.shape[-2] // len(heads))[:, None]
  attended = jnp.where(scale, attended, 0).reshape(*attended.shape[:-2], -1)
  middle = inner + block.o(attended)
  read = block.mlp_norm(inner if block.config.parallel_sublayers else middle)
  return middle + block.mlp.down(jnp.where(neurons, _mlp(block).hidden(read, block.config.mlp), 0))


@jax.jit
def _nll(outer: Transformer, x, backout, tokens):
  logits = outer.logits(x, backout if outer.config.backout else None)[:, :-1]
  chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
  return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def rebuild(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  heads: Sequence[int],
  neurons: Sequence[int],
  *,
  options: Options = Options(),
  batch: int = 8,
) -> Transformer:
  """Pass 2: the network of so many key-value heads and neurons a layer, chosen and fitted a layer at a time.

  Raises:
    InputError: as `prune`.
  """
  structured.require_prunable(model)
  outer, parts = calibration.opened(model, tokens, batch=batch)
  fitted, _ = split_rows(tokens)
  sides = lambda part: calibration.embed(outer, part)[1]
  dense = [_host(calibration.embed(outer, part)[0]) for part in parts]
  states, blocks = list(dense), []
  how = dict(fitted=fitted * tokens.shape[1], options=options)
  for block, kind in calibration.layers(model):
    inputs = zip(dense, states, map(sides, parts), strict=True)
    given = [[_host(a) for a in _given(block, *one, **kind)] for one in inputs]
    dense = [one[1] for one in given]
    small, after = _rebuild_block(block, given, int(heads[len(blocks)]), int(neurons[len(blocks)]), **how)
    states = [a.reshape(own.shape) for a, own in zip(np.split(after, len(parts)), states, strict=True)]
    blocks.append(small)
    del block  # before the next one is loaded
  return structured.joined(model, blocks)


def _rebuild_block(block: Block, given, heads: int, neurons: int, *, fitted: int, options: Options):
  """(the layer with its groups sliced, the state after it (tokens, width)), on the host, of what `_given` gave."""
  c, how = block.config, dict(fitted=fitted, options=options)
  flat = lambda i: jnp.concatenate([jnp.asarray(one[i], jnp.float32).reshape(-1, one[i].shape[-1]) for one in given])
  start, read = flat(2), flat(3)
  o, bias, keep_heads = _fit_heads(read, flat(0) - start, block, heads, **how)
  middle = start + read @ o + bias
  read = block.mlp_norm(start if c.parallel_sublayers else middle)
  mlp, bias_down, keep = _fit_mlp(read, flat(1) - middle, block, neurons, **how)
  after = middle + mlp.hidden(read, c.mlp) @ mlp.down + bias_down
  found = {"o": (o, bias), "mlp.up": (mlp.up, None), "mlp.gate": (mlp.gate, None), "mlp.down": (mlp.down, bias_down)}
  small = _replaced(block, found, _host(keep_heads), _host(keep), options.biases)
  return small, _host(after)


def split_rows(tokens) -> tuple[int, int]:
  """(rows to fit to, rows held out)."""
  rows = len(tokens)
  require(rows >= 2, f"the calibration text has {rows} row; give two or more, as one of four is held out")
  held = max(1, rows // _HELD)
  return rows - held, held


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _given(block: Block, x, pruned, side: Side, *, window, row):
  """(the state after attention, the output) of the original's state, then what attention adds to and attention of the
  pruned one's."""
  _, _, middle, _, _, out = _through(block, x, side, window=window, row=row)
  inner, attended = calibration.attend(block, pruned, side, window=window, row=row)
  return middle, out, inner, attended.reshape(*attended.shape[:-2], -1)


@functools.partial(jax.jit, static_argnames=("fitted", "options"))
def _fit_heads(x, y, block: Block, keep, *, fitted: int, options: Options):
  """(o, its bias, the key-value heads kept) so that x o + b is y."""
  weight = block.o.weight[...].astype(jnp.float32)
  size = len(weight) // block.config.kv_heads
  gram, cross = ridged(*_moments(x[:fitted], y[:fitted], options)[:2], weight, options.ridge)
  groups = admm(gram, cross, weight, keep, size=size, how=options.admm)
  weight, bias, _ = _fit(x, y, weight, jnp.repeat(groups, size), fitted, options)
  return weight, bias, groups


@functools.partial(jax.jit, static_argnames=("fitted", "options"))
def _fit_mlp(x, y, block: Block, keep, *, fitted: int, options: Options):
  """(MLP, bias, the neurons kept) so that it gives y: before or after the rounds over activations, as held-out rows
  say."""
  mlp, kind = _mlp(block), block.config.mlp
  how = dict(kind=kind, ridge=options.ridge, split=options.split, how=options.admm)
  rounds = sparsellm(x[:fitted], y[:fitted], mlp, keep, **how)
  made = []
  for one, neurons in (rounds[0], rounds[-1]) if len(rounds) > 1 and options.refit else rounds[:1]:
    down, bias, error = _fit(one.hidden(x, kind), y, mlp.down, neurons, fitted, options)
    made.append((error, (Mlp(one.up, one.gate, down), bias, neurons)))
  (first, before), (last, after) = made[0], made[-1]
  return jax.tree.map(lambda a, b: jnp.where(last < first, a, b), after, before)


def _moments(x, y, options: Options):
  """(A, C, means): about the means where a bias takes care of them."""
  if options.biases:
    return centred(x, y)
  zero = lambda a: jnp.zeros_like(a[0])
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  return product(x.T, x) / len(x), product(x.T, y) / len(x), (zero(x), zero(y))


def _fit(x, y, weight, keep, fitted: int, options: Options):
  """(W, b, error on the rows held out): least squares towards `weight`, the ridge chosen on held-out rows, where it is
  better than the weights as they are."""
  rows = jnp.where(keep[:, None], weight, 0)
  bias = lambda w, means: means[1] - means[0] @ w

  def solve(moments, ridge):
    return least_squares(*ridged(*moments[:2], weight, ridge), keep)

  part, whole = _moments(x[:fitted], y[:fitted], options), _moments(x, y, options)
  error = lambda w: jnp.square(x[fitted:] @ w + bias(w, part[2]) - y[fitted:]).mean()
  if not options.refit:
    return rows, bias(rows, whole[2]), error(rows)
  errors = jax.lax.map(lambda ridge: error(solve(part, ridge)), jnp.asarray(RIDGES))
  # Where a few directions hold nearly all of A, the least ridge may be below the rounding of float32 sums: no factor.
  errors = jnp.where(jnp.isnan(errors), jnp.inf, errors)
  plain, least = error(rows), errors.min()
  best = jnp.where(plain < least, rows, solve(whole, jnp.asarray(RIDGES)[errors.argmin()]))
  return best, bias(best, whole[2]), jnp.minimum(plain, least)


def _replaced(block: Block, found, heads, neurons, biases: bool) -> Block:
  """The layer of those matrices, sliced, on the host and in its own dtype."""
  block = jax.tree.map(_host, block)
  own = maps.named(block)
  made = {}
  for name, (weight, bias) in found.items():
    if weight is not None:
      weight = _host(weight.astype(own[name].weight.dtype))
      affine = bias is not None and biases
      made[name] = Affine(weight, _host(bias.astype(weight.dtype))) if affine else Linear(weight, own[name].weight.axes)
  return structured.slice_block(maps.replaced(block, made), heads, neurons)
