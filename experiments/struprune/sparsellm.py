"""SparseLLM with structure disabled (Bai et al. 2024, arXiv 2402.17946): the rounds over activations, a mask by weight.

What STRUPRUNE is made of, without groups: as many weights stay, anywhere. No map is smaller for it where it is
multiplied as a matrix; a file has a bit a weight besides.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models import Transformer, maps
from jaxlab.models.block import Block
from jaxlab.models.layers import Linear
from jaxlab.weights import calibration, pruning, structured, struprune
from jaxlab.weights.calibration import moments
from jaxlab.weights.struprune import Options
from jaxlab.weights.struprune_solver import Mlp, activations, fitting


def prune(model: Transformer, tokens, *, density: float, options: Options, batch: int) -> Transformer:
  """The network with that share of every map's weights, a layer after the other; maps are plain, with zeros.

  q, k and v by SparseGPT; "o" and the MLP fitted first to what the original's layer adds, reading what the layers
  pruned before it give, as far as held-out rows gain by it.

  Raises:
    InputError: a density outside 0..1, a text of one row, or a model that `struprune.prune` refuses.
  """
  structured.require_prunable(model)
  pruning.require_density(density)
  outer, parts = calibration.opened(model, tokens, batch=batch)
  fitted = struprune.split_rows(tokens)[0] * tokens.shape[1]
  sides = [calibration.embed(outer, part)[1] for part in parts]
  dense = [calibration.embed(outer, part)[0] for part in parts]
  states, blocks = list(dense), []
  shrink = functools.partial(pruning.sparsegpt, density=density)
  for block, kind in calibration.layers(model):
    targets = [_through(block, x, side, **kind) for x, side in zip(dense, sides, strict=True)]
    dense = [out for _, out, *_ in targets]
    seen = _flat([_through(block, x, side, **kind)[2] for x, side in zip(states, sides, strict=True)])
    small = _with(block, {name: shrink(_weight(block, name), moments(seen[None]))[0] for name in ("q", "k", "v")})
    after = [_through(small, x, side, **kind)[3:] for x, side in zip(states, sides, strict=True)]
    start, read = (_flat(part) for part in zip(*after, strict=True))
    o, _ = fit(read, _flat([one[0] for one in targets]) - start, _weight(block, "o"), shrink, fitted=fitted)
    small = _with(small, {"o": o})
    middle = start + small.o(read)
    read = block.mlp_norm(start if block.config.parallel_sublayers else middle)
    mlp = rounds(
      read, _flat(dense) - middle, _mlp(block), shrink, fitted=fitted, kind=block.config.mlp, options=options
    )
    small = _with(small, {f"mlp.{name}": a for name, a in mlp._asdict().items() if a is not None})
    out = middle + mlp.hidden(read, block.config.mlp) @ mlp.down
    states = [a.reshape(x.shape) for a, x in zip(jnp.split(out, len(parts)), states, strict=True)]
    blocks.append(small)
  return maps.with_blocks(model, maps.stack(blocks))


def fit(x, y, weight, shrink, *, fitted: int):
  """(W with zeros so that x W is y, its error on the rows from `fitted` on): least squares towards `weight`, then
  pruned; the ridge, or `weight` as it is, by that error.

  Args:
    x, y: (tokens, inputs) and (tokens, outputs); shrink: (W, moments of its inputs) -> (W with zeros, ...).
  """

  def made(rows, ridge):
    start = weight if ridge is None else fitting(x[:rows], ridge)(y[:rows], weight)
    return shrink(start, moments(x[None, :rows]))[0]

  ridges = (None, *struprune.RIDGES)
  errors = [float(jnp.square(x[fitted:] @ made(fitted, ridge) - y[fitted:]).mean()) for ridge in ridges]
  return made(len(x), ridges[np.nanargmin(errors)]), np.nanmin(errors)


def rounds(x, y, mlp: Mlp, shrink, *, fitted: int, kind: str, options: Options) -> Mlp:
  """The MLP whose up and gate are those of the first or of the last round, whichever errs less on held-out rows once
  down is fitted to them.

  Args:
    x, y: what it reads and is to give, (tokens, width); shrink, fitted: as of `fit`.
  """
  own, target = x[:fitted], y[:fitted]
  to_inputs, up, gate = fitting(own, options.ridge), mlp.up, mlp.gate
  z = own @ up, None if gate is None else own @ gate
  p, seen, made = mlp.hidden(own, kind), moments(x[None]), []
  for outer in range(options.split.outer):
    if outer:
      up, gate = to_inputs(z[0], mlp.up), None if gate is None else to_inputs(z[1], mlp.gate)
    up, gate = shrink(up, seen)[0], None if gate is None else shrink(gate, seen)[0]
    down = shrink(fitting(p, options.ridge)(target, mlp.down), moments(p[None]))[0]
    made.append(Mlp(up, gate, down))
    p, z = activations(own, target, made[-1], z, kind=kind, split=options.split)
  tried = {}
  for one in (made[0], *made[1:][-1:]):
    down, error = fit(one.hidden(x, kind), y, mlp.down, shrink, fitted=fitted)
    tried[error] = one._replace(down=down)
  return tried[min(tried)]


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _through(block: Block, x, side, *, window, row):
  """(the state after attention, the output, what q reads, what attention adds to, attention)."""
  out, seen = calibration.read(block, x, side, window=window, row=row)
  inner, _ = calibration.attend(block, x, side, window=window, row=row)
  return inner + block.o(seen["o"]), out, seen["q"], inner, seen["o"]


def _flat(parts):
  return jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(jnp.float32)


def _weight(block: Block, name: str):
  return maps.named(block)[name].weight[...].astype(jnp.float32)


def _mlp(block: Block) -> Mlp:
  gate = None if block.mlp.gate is None else _weight(block, "mlp.gate")
  return Mlp(_weight(block, "mlp.up"), gate, _weight(block, "mlp.down"))


def _with(block: Block, weights) -> Block:
  own = maps.named(block)
  made = {name: Linear(a.astype(own[name].weight.dtype), own[name].weight.axes) for name, a in weights.items()}
  return maps.replaced(block, made)
