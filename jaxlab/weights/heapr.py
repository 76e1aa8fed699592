r"""HEAPr: hidden neurons of experts removed where a second-order estimate of the loss says that it costs least (2025,
arXiv 2509.22299).

  E_i(x) = sum_j e_ij(x),   e_ij(x) = h_ij(x) w_ij,   h_ij = silu(Wg_i[j] x) (Wu_i[j] x),   w_ij = column j of Wd_i
  g = d l / d E_i(x)   of a token x, G_i = mean g g^T over the tokens T_i that are routed to expert i
  s_ij = mean 1/2 e_ij^T G_i e_ij = 1/2 mean(h_ij^2) (w_ij^T G_i w_ij) = 1/2 mean(h_ij^2) mean((g . w_ij)^2)

An atomic expert (i, j) is row j of Wg_i and Wu_i and column j of Wd_i: without it the matrices are smaller, exactly.
The gradient is that before the router's weight, which it therefore contains. The last form is ours: it needs neither a
second pass, as the paper's does, nor the matrix G_i. So written, the estimate is that of pruning a mask by its Fisher
information, 1/2 mean((g . e_ij)^2), with h_ij and g . w_ij taken as independent.

  found = statistics(model, rows)                             # one forward and one backward pass
  keep = select(scores(found), 0.25)                          # three of four atomic experts of the whole model
  small = sliced(model, keep, tile=64)

The model's own loss is what is differentiated: no balancing loss, no router noise. Nothing is trained afterwards. A
dense SwiGLU network is a mixture of one expert (`of_one_expert`) and can be pruned as such.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice, require_divides
from jaxlab.models import Transformer, TransformerConfig, maps
from jaxlab.models.config import Experts
from jaxlab.models.experts import tiled
from jaxlab.models.layers import MLP, Linear, MoE, mixed
from jaxlab.training.losses import token_losses
from jaxlab.weights.calibration import require_finite, require_transformer

_HIGHEST = jax.lax.Precision.HIGHEST
POOLS = ("model", "layer", "expert")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """Of the tokens routed to each expert, float32, sums unless said otherwise; g is of the loss summed over all tokens.

  count, weight: (layers, experts), tokens and their router weights.
  energy, peak: (layers, experts, hidden), h^2, and the largest |h|.
  pull, joint: (layers, experts, hidden), (g . w)^2 and (h g . w)^2.
  covariance: (layers, experts, width, width), g g^T, or None.
  """

  count: Array
  weight: Array
  energy: Array
  peak: Array
  pull: Array
  joint: Array
  covariance: Array | None

  def merged(self, other: "Statistics") -> "Statistics":
    """Of both texts."""
    both = jax.tree.map(jnp.add, self, other)
    return dataclasses.replace(both, peak=jnp.maximum(self.peak, other.peak))


def of_one_expert(model: Transformer) -> Transformer:
  """A dense model as a mixture of one expert a layer, the same function.

  Raises:
    InputError: an MLP that is no SwiGLU of plain matrices.
  """
  require_transformer(model)
  mlp = model.blocks.mlp
  plain = isinstance(mlp, MLP) and all(isinstance(one, Linear) for one in (mlp.gate, mlp.up, mlp.down))
  require(plain, "only SwiGLU MLPs of plain matrices are a mixture of one expert")
  layers, width, hidden = mlp.up.weight.shape
  config = dataclasses.replace(model.config, experts=Experts(count=1, active=1, width=hidden))
  moe = jax.eval_shape(jax.vmap(lambda key: MoE(config, key)), jax.random.split(jax.random.key(0), layers))
  moe.router = Linear(jnp.zeros((layers, width, 1), model.dtype), moe.router.weight.axes)
  for name in ("gate", "up", "down"):
    axes = getattr(moe, name).axes
    setattr(moe, name, nnx.Param(getattr(mlp, name).weight[...][:, None], axes=axes))
  return _with_config(maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": moe})), config)


def _with_config(model: Transformer, config: TransformerConfig) -> Transformer:
  model.config = model.blocks.config = config
  return model


def statistics(
  model: Transformer, rows: Int[Array, "rows time"], *, batch: int = 8, covariance: bool = False
) -> Statistics:
  """What every score is made of, from one forward and one backward pass over a calibration text.

  Numbers for each hidden neuron are kept, and nothing for each token: the pass is one program for any depth.

  Args:
    rows: token ids, each predicted from those before it; a multiple of `batch` rows without padding, as a token without
      a target has no gradient but would count as routed.
    covariance: also sum g g^T, width^2 numbers an expert, which scores do not need.

  Raises:
    InputError: no Transformer, a model without experts, or whose experts are pruned; weights that are not finite; rows
      of one token or that do not fill batches.
  """
  require_transformer(model)
  count, time = rows.shape
  require(model.config.experts is not None, "this model has no experts; `of_one_expert` makes a mixture of a dense one")
  require(isinstance(model.blocks.mlp, MoE), "these experts are of unequal widths; prune from the original model")
  require(time >= 2, f"rows have {time} token; a token is predicted from those before it: give 2 or more")
  require(count >= batch and count % batch == 0, f"{count} rows of calibration text; give a multiple of batch={batch}")
  require_finite(model)
  total = None
  for i in range(0, count, batch):
    new = _of_batch(model, jnp.asarray(rows[i : i + batch]), covariance)
    total = new if total is None else _merge(total, new)
  return total


def scores(found: Statistics, *, freq_weight: bool = False) -> Float[Array, "layers experts hidden"]:
  """s_ij; -1 in experts that no token was routed to, which go first.

  Args:
    freq_weight: times the number of tokens of the expert: the loss added to the whole text, in nats, and not the mean
      over the expert's own tokens that the paper ranks by.
  """
  return estimated(found.energy, found.pull, found.count, freq_weight=freq_weight)


def estimated(energy, pull, count, *, freq_weight: bool = False) -> Float[Array, "*stack experts hidden"]:
  """1/2 (energy / count) (pull / count), -1 where the count is 0.

  Args:
    pull: sum over tokens of (g . w)^2, or count times `curvature` of another matrix than the mean of g g^T.
  """
  count = count[..., None]
  times = count if freq_weight else 1
  value = 0.5 * times * (energy / jnp.maximum(count, 1)) * (pull / jnp.maximum(count, 1))
  return jnp.where(count > 0, value, -1)


def curvature(
  covariance: Float[Array, "*stack width width"], down: Float[Array, "*stack hidden width"]
) -> Float[Array, "*stack hidden"]:
  """w_j^T G w_j of every row w_j of `down`."""
  return jnp.einsum("...fd,...dc,...fc->...f", down, covariance, down, precision=_HIGHEST)


def select(
  scores: Float[Array, "layers experts hidden"], ratio: float, *, pool: str = "model", multiple: int = 1
) -> Bool[np.ndarray, "layers experts hidden"]:
  """The atomic experts that stay, int((1 - ratio) n) of n: those of the highest scores, the earlier of equal ones.

  Args:
    ratio: of the routed experts' parameters to remove.
    pool: what is ranked together: all of the "model" (the paper's HEAPr-G), those of a "layer" (HEAPr-L) or of an
      "expert", which gives all experts one width.
    multiple: each expert keeps a multiple of it. Its atomic experts are taken in groups, the best first, a group by the
      sum of its scores.

  Raises:
    InputError: a ratio outside 0..1, an unknown pool, or a multiple that does not divide the hidden size.
  """
  require(0 <= ratio < 1, f"ratio is {ratio}; it must lie in 0 <= ratio < 1")
  require_choice("pool", pool, POOLS)
  layers, experts, hidden = scores.shape
  require(multiple >= 1, f"multiple is {multiple}; it must be at least 1")
  require_divides("multiple", multiple, "the experts' hidden size", hidden)
  scores = np.asarray(scores, np.float64)
  require(bool(np.isfinite(scores).all()), "a score is NaN or infinite; see whether the model's loss is finite")
  order = np.argsort(-scores, axis=-1, kind="stable")
  groups = np.take_along_axis(scores, order, axis=-1).reshape(layers, experts, -1, multiple).sum(axis=-1)
  pools = {"model": 1, "layer": layers, "expert": layers * experts}[pool]
  pooled = groups.reshape(pools, -1)
  count = int((1 - ratio) * pooled.shape[1] + 1e-9)  # (1 - 0.9) * 10 is a little less than 1
  best = np.argsort(-pooled, axis=-1, kind="stable")[:, :count]
  kept = np.zeros(pooled.shape, bool)
  np.put_along_axis(kept, best, True, axis=-1)
  kept = np.repeat(kept.reshape(groups.shape), multiple, axis=-1)
  keep = np.zeros(scores.shape, bool)
  np.put_along_axis(keep, order, kept, axis=-1)
  return keep


def masked(model: Transformer, keep: Bool[np.ndarray, "layers experts hidden"]) -> Transformer:
  """The model with the columns w_ij of the others set to 0: the function that `sliced` gives, in the size of before."""
  moe = _experts_of(model, keep)
  moe.down = nnx.Param(jnp.where(jnp.asarray(keep)[..., None], moe.down[...], 0), axes=moe.down.axes)
  return maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": moe}))


def sliced(
  model: Transformer, keep: Bool[np.ndarray, "layers experts hidden"], *, tile: int = 64, skip_empty: bool = False
) -> Transformer:
  """The model without the other atomic experts, each expert at its own width, in tiles (`models.experts`).

  Parameters and arithmetic fall with the number of tiles. `generate` takes it and `hub` saves and loads it.

  Args:
    tile: hidden neurons that a matrix product has at least; 64 or 128 on a GPU, 128 on a TPU. `select(multiple=tile)`
      leaves no tile partly empty.
    skip_empty: tokens go to no expert that has lost all; otherwise those keep their share of the routing and give 0.

  Raises:
    InputError: keep is not bool (layers, experts, hidden) of this model, or a tile below 1.
  """
  require(tile >= 1, f"tile is {tile}; it must be at least 1")
  moe = _experts_of(model, keep)
  return maps.with_blocks(
    model, maps.replaced(model.blocks, {"mlp": tiled(moe, keep, tile=tile, skip_empty=skip_empty)})
  )


def padded(model: Transformer, keep: Bool[np.ndarray, "layers experts hidden"], *, multiple: int = 1) -> Transformer:
  """The model with all experts as wide as its widest, rounded up to `multiple`, the others' last rows 0.

  An ordinary mixture that every program reads; it saves most where `select` ranked by "expert".

  Raises:
    InputError: as `sliced`.
  """
  moe = _experts_of(model, keep)
  hidden = keep.shape[-1]
  width = min(hidden, max(1, -(-int(keep.sum(axis=-1).max()) // multiple)) * multiple)
  first = jnp.asarray(np.argsort(~keep, axis=-1, kind="stable")[..., :width])
  there = jnp.take_along_axis(jnp.asarray(keep), first, axis=-1)
  across = lambda w: jnp.take_along_axis(w[...], first[:, :, None, :], axis=-1)
  moe.gate, moe.up = (nnx.Param(across(w), axes=w.axes) for w in (moe.gate, moe.up))
  down = jnp.take_along_axis(moe.down[...], first[..., None], axis=2)
  moe.down = nnx.Param(jnp.where(there[..., None], down, 0), axes=moe.down.axes)
  experts = dataclasses.replace(model.config.experts, width=width)
  model = maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": moe}))
  return _with_config(model, dataclasses.replace(model.config, experts=experts))


def _experts_of(model: Transformer, keep) -> MoE:
  """A copy of the model's experts, after checking that `keep` is of them."""
  moe = model.blocks.mlp
  require(isinstance(moe, MoE), "this model has no experts, or has pruned ones; give the original mixture")
  expected = moe.down.shape[:-1]
  right = getattr(keep, "shape", None) == expected and keep.dtype == bool
  require(right, f"keep must be bool of shape {expected}, as `select` gives it")
  return jax.tree.map(lambda a: a, moe)


class _Watched(nnx.Module):
  """Experts whose statistics are the gradients of zeros."""

  def __init__(self, moe: MoE, zeros: Statistics):
    self.moe, self.zeros = moe, nnx.data(zeros)

  def __call__(self, x):
    moe, tokens = self.moe, x.reshape(-1, x.shape[-1])
    routing = moe.route(tokens)
    hidden = moe.hidden(tokens, routing)
    down = moe.down[...].astype(x.dtype)
    out = jax.lax.ragged_dot(hidden, down, routing.sizes)
    out = _observed(out, self.zeros, *jax.lax.stop_gradient((hidden, down, routing.weight)), routing.sizes)
    return mixed(tokens, out, routing).reshape(x.shape)


@jax.custom_vjp
def _observed(out, zeros: Statistics, hidden, down, weight, sizes):
  """`out`; the "gradient" of `zeros` is what the real gradient of `out` says of every neuron."""
  return out


def _observed_fwd(out, zeros, hidden, down, weight, sizes):
  return out, (zeros, hidden, down, weight, sizes)


def _observed_bwd(kept, gradient):
  zeros, hidden, down, weight, sizes = kept
  experts, slots = len(sizes), len(hidden)
  exact = zeros.energy.dtype
  g, h = gradient.astype(exact), hidden.astype(exact)
  owner = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=slots)
  by_expert = functools.partial(jax.ops.segment_sum, segment_ids=owner, num_segments=experts, indices_are_sorted=True)
  along = jax.lax.ragged_dot(g, jnp.swapaxes(down, 1, 2).astype(exact), sizes, precision=_HIGHEST)  # g . w
  found = Statistics(
    count=sizes.astype(exact),
    weight=by_expert(weight.astype(exact)),
    energy=by_expert(h**2),
    peak=jnp.maximum(jax.ops.segment_max(jnp.abs(h), owner, experts, indices_are_sorted=True), 0),
    pull=by_expert(along**2),
    joint=by_expert((h * along) ** 2),
    covariance=None if zeros.covariance is None else covariances(g, sizes),
  )
  nothing = jax.tree.map(jnp.zeros_like, (hidden, down, weight))
  return gradient, found, *nothing, np.zeros(sizes.shape, jax.dtypes.float0)


_observed.defvjp(_observed_fwd, _observed_bwd)


def covariances(g: Float[Array, "slots width"], sizes: Int[Array, "experts"]) -> Float[Array, "experts width width"]:
  """sum g g^T over each expert's rows: one product whose contracted axis is ragged, where XLA has no kernel for that a
  masked product."""
  contracting = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(g, g, sizes, contracting, precision=_HIGHEST)


@functools.partial(jax.jit, static_argnums=2)
def _of_batch(model: Transformer, rows, covariance: bool) -> Statistics:
  moe = model.blocks.mlp
  exact = jnp.promote_types(model.dtype, jnp.float32)
  layers, experts, hidden, width = moe.down.shape
  zeros = lambda *shape: jnp.zeros((layers, experts, *shape), exact)
  per_neuron = [zeros(hidden) for _ in range(4)]
  start = Statistics(zeros(), zeros(), *per_neuron, zeros(width, width) if covariance else None)

  def loss(zeros):
    watched = maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": _Watched(moe, zeros)}))
    return token_losses(model, watched.hidden(rows[:, :-1]), rows[:, 1:]).sum()

  return jax.grad(loss)(start)


_merge = jax.jit(Statistics.merged)
