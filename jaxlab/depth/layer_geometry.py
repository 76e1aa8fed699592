"""What a layer does to the residual stream: its tokenwise part, the rest, and which of the two matters (Yoo 2026).

A block has inputs x_i and outputs y_i at the tokens i; a tokenwise map T (`layer_geometry_classes`) reads only x_i:

  y_i = T(x_i) + r_i,   u_i = y_i - x_i,   t_i = T(x_i) - x_i,   u_i = t_i + r_i.

The state form compares y with T(x), where the residual stream alone makes every cosine 1; the increment form compares u
with t. r is the same in both. Does r point elsewhere than u and t, and does taking it away (y := T(x)) change what the
model predicts? For any least-squares fit high R^2 forces cos(u, t) = sqrt(R^2) and cos(u, r) = sqrt(1 - R^2): fits are
judged on held-out documents and beside null models. Reference: arXiv 2604.02459.

  x, y = collect(model, tokens)                                     # (L, batch, time - 4, D) each, float32
  parts = geometry(u, t, dominant_subspace(t_reference))            # cosines, angles, energies, a value a token
  harm = intervene(model, tokens, t_x, layer=2)["single_token"]  # harm["kl"] in nats
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxlab.core.checks import require
from jaxlab.core.precision import exactly
from jaxlab.depth.layer_geometry_classes import apply_affine, fit_affine
from jaxlab.depth.layer_geometry_hnet import StackNetwork
from jaxlab.depth.layer_geometry_streams import streams_of_attention, streams_of_states
from jaxlab.depth.snlp_suffix import evaluate, plain
from jaxlab.models import HNet, Mamba2, Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.layers import wide
from jaxlab.models.mamba2 import run_blocks
from jaxlab.models.transformer import sequential

SKIP = 4  # first positions of a row left out: attention sinks, whose norms dwarf all others
MODES = ("single_token", "all_tokens")

Vectors = Float[Array, "tokens width"]
Values = Float[Array, "tokens"]
Network = Transformer | Mamba2 | StackNetwork  # of an H-Net, one of its `layer_geometry_hnet.stacks`


@exactly
def collect(
  model: Network,
  tokens: Int[Array, "batch time"],
  *,
  skip: int = SKIP,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "layers batch kept width"], Float[Array, "layers batch kept width"]]:
  """(x, y): inputs and outputs of every block at positions skip .. time - 1, computed in float32.

  The input of a block with residual lambdas is lambda h + mu x0, what its branches are added to; u would otherwise
  contain the rescaling. Hyper-connection streams are flattened into one vector a token.

  Raises:
    InputError: neither a stacked Transformer nor a Mamba2 nor a stack of an H-Net, or rows of at most `skip` tokens.
  """
  _check(model, tokens, skip)
  h0, trace, side = _trace(model := _widened(model), tokens, attention)
  x = jnp.concatenate([h0[None], trace[:-1]])
  if getattr(model.config, "residual_lambdas", False):
    column = lambda parameter: parameter[...][:, None, None, None]
    x = column(model.blocks.residual_lambda) * x + column(model.blocks.x0_lambda) * side.x0
  return tuple(a.reshape(*a.shape[:3], -1)[:, :, skip:] for a in (x, trace))


@exactly
def geometry(
  u: Vectors, t: Vectors, basis: Float[Array, "width q"], *, mean: Float[Array, "width"] | float = 0.0
) -> dict[str, Values]:
  """How u, t and r = u - t lie to each other, a value a token.

  Returns:
    energy_t, energy_r: ||t||^2 / ||u||^2 and ||r||^2 / ||u||^2;
    cos_ut, cos_rt, cos_ur: cosines, and angle_ut, angle_rt, angle_ur: their arccos in degrees;
    in_u, in_t, in_r: projection energies E(v) = ||V_q' v||^2 / ||v||^2 on `basis`.
    A zero vector has cosine 0 and energy 0. With u = y, t = T(x) these are the figures of the state form.

  Args:
    mean: subtracted from u and t, e.g. the reference tokens' mean increment: a direction that all tokens share makes
      every cosine large. r stays as it is.
  """
  r = u - t
  u, t = u - mean, t - mean
  norm = {"u": _norm(u), "t": _norm(t), "r": _norm(r)}
  vectors = {"u": u, "t": t, "r": r}
  result = {f"energy_{v}": _ratio(norm[v] ** 2, norm["u"] ** 2) for v in "tr"}
  for a, b in ("ut", "rt", "ur"):
    cosine = jnp.clip(_ratio(jnp.sum(vectors[a] * vectors[b], axis=-1), norm[a] * norm[b]), -1.0, 1.0)
    result |= {f"cos_{a}{b}": cosine, f"angle_{a}{b}": jnp.degrees(jnp.arccos(cosine))}
  return result | {f"in_{v}": _ratio(_norm(vectors[v] @ basis) ** 2, norm[v] ** 2) for v in "utr"}


def fvu(u: Vectors, t: Vectors) -> Float[Array, ""]:
  """Fraction of variance unexplained: sum ||u - t||^2 / sum ||u - mean u||^2."""
  return jnp.sum((u - t) ** 2) / jnp.sum((u - u.mean(axis=0)) ** 2)


def explained(u: Vectors, t: Vectors) -> Float[Array, ""]:
  """R^2 about zero, 1 - sum ||u - t||^2 / sum ||u||^2: an orthogonal fit has cos(u, t) = sqrt(R^2) over all tokens."""
  return 1 - jnp.sum((u - t) ** 2) / jnp.sum(u**2)


@exactly
def frozen_updates(
  model: Network,
  tokens: Int[Array, "batch time"],
  *,
  layers: int,
  skip: int = SKIP,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "layers batch kept width"], Float[Array, "layers batch kept width"]]:
  """(u, v): what the last n blocks add to their own inputs, u_j = f_{S+j}(h_{S+j}) - h_{S+j}, and to the suffix's, h_S.

  v_j = f_{S+j}(h_S) - h_S is the part of u_j that the layers between do not change, u_j - v_j its input dependence.
  One IDN step of SNLP from the trace z_j = h_S gives z_{j+1} = h_S + v_0 + ... + v_j, so its error there is the sum of
  v_i - u_i over i <= j: training for IDN must shrink the input dependence, and layers without it are exact in one step.
  All of raw states: residual lambdas belong to f here, as they do in SNLP.

  Raises:
    InputError: as `collect`; n outside 1..L.
  """
  _check(model, tokens, skip)
  model = _widened(model)
  require(1 <= layers <= model.depth, f"layers is {layers}; it must lie in 1..{model.depth}, the model's depth")
  h0, trace, side = _trace(model, tokens, attention)
  states = jnp.concatenate([h0[None], trace])[model.depth - layers :]
  if isinstance(model, StackNetwork):
    frozen = model.frozen(states[0], side, layers=layers)
  elif isinstance(model, Mamba2):
    blocks = jax.tree.map(lambda a: a[model.depth - layers :], model.blocks)
    frozen = jax.vmap(lambda block: block(states[0]))(blocks)
  else:
    stacked = jnp.broadcast_to(states[0], states[1:].shape)
    frozen = evaluate(model, plain(model, layers), stacked, side, attention=attention)[0]
  v = frozen - states[0]
  return tuple(a.reshape(*a.shape[:3], -1)[:, :, skip:] for a in (jnp.diff(states, axis=0), v))


@exactly
def dominant_subspace(t: Vectors, *, dimensions: int = 16) -> Float[Array, "width q"]:
  """V_q: the top right singular vectors of t (uncentred), orthonormal columns, the strongest first.

  Raises:
    InputError: more dimensions than the vectors have.
  """
  require(1 <= dimensions <= t.shape[1], f"the subspace has {dimensions} dimensions; they must lie in 1..{t.shape[1]}")
  return jnp.linalg.eigh(t.T @ t)[1][:, ::-1][:, :dimensions]


@exactly
def effective_dimensions(t: Vectors, *, share: float = 0.95) -> Int[Array, ""]:
  """The least q whose V_q holds `share` of the energy of t."""
  energy = jnp.cumsum(jnp.linalg.eigvalsh(t.T @ t)[::-1])
  return jnp.minimum(1 + jnp.sum(energy < share * energy[-1]), t.shape[1])


@exactly
def intervene(
  model: Network,
  tokens: Int[Array, "batch time"],
  outputs: Float[Array, "batch kept width"],
  *,
  layer: int | Int[Array, ""],
  skip: int = SKIP,
  attention: AttentionFn = dot_product_attention,
) -> dict:
  """What the model predicts after do(y_layer := outputs), against what it predicts without.

  "all_tokens" replaces every position from `skip` on at once: position i also suffers from what earlier positions pass
  on. "single_token" replaces position i alone and looks at i, for all i in one pass: earlier positions then keep their
  states, so position i attends to their clean keys and values and to its own changed ones, or reads the clean recurrent
  state of i - 1 (Mamba-2). One program serves all layers, at the price of running those before `layer` too.

  Args:
    outputs: replacements for the block's outputs at positions skip .. time - 1, as `collect` lays them out.
    layer: 0 .. L - 1; may be traced, and is then not checked.
    attention: of the clean and the all-tokens run; the single-token run computes dense scores.

  Returns:
    {mode: {"kl": KL(p_i || p~_i) in nats, "logits": ||difference of the logits||_2, "flip": another argmax},
     "entropy": of the clean p_i}, each (batch, kept), float32.

  Raises:
    InputError: no such layer, or outputs of another shape.
  """
  _check(model, tokens, skip)
  if isinstance(layer, int):
    require(0 <= layer < model.depth, f"layer is {layer}; it must lie in 0..{model.depth - 1}, the model's blocks")
  model = _widened(model)
  kept, width = _positions(model, tokens) - skip, _state_size(model)
  require(
    outputs.shape == (tokens.shape[0], kept, width),
    f"outputs have shape {outputs.shape}; layer {layer} writes {(tokens.shape[0], kept, width)}",
  )

  def rewrite(index, state):
    clean, *others = jnp.split(state, 3)
    changed = (a.at[:, skip:].set(outputs.reshape(a[:, skip:].shape).astype(a.dtype)) for a in others)
    return jnp.where(index == layer, jnp.concatenate([clean, *changed]), state)

  clean, *others = jnp.split(_run_streams(model, tokens, rewrite, attention)[:, skip:], 3)
  result = {mode: _compare(clean, logits) for mode, logits in zip(MODES, others, strict=True)}
  log_p = jax.nn.log_softmax(clean)
  return result | {"entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)}


def orthogonal_noise(key: jax.Array, r: Vectors, t: Vectors) -> Vectors:
  """Random vectors with the norms of r, orthogonal to t (null N5: is r special, or would any such vector do?)."""
  noise = jax.random.normal(key, r.shape, r.dtype)
  noise = noise - t * _ratio(jnp.sum(noise * t, axis=-1), jnp.sum(t * t, axis=-1))[:, None]
  return noise * _ratio(_norm(r), _norm(noise))[:, None]


def isotropic(key: jax.Array, r: Vectors) -> Vectors:
  """Random vectors with the norms of r, in all directions alike (null N2)."""
  return orthogonal_noise(key, r, jnp.zeros_like(r))


def ranks(a: Shaped[Array, "tokens"]) -> Values:
  """Ranks from 1, ties get their average."""
  ordered = jnp.sort(a)
  below, upto = (jnp.searchsorted(ordered, a, side=side) for side in ("left", "right"))
  return (below + upto + 1) / 2


def spearman(a: Shaped[Array, "tokens"], b: Shaped[Array, "tokens"]) -> Float[Array, ""]:
  """Rank correlation with average ties; NaN where one of the two is constant."""
  return _pearson(ranks(a), ranks(b))


def partial_spearman(a: Values, b: Values, controls: list[Values]) -> Float[Array, ""]:
  """Correlation of the ranks of a and b after the ranks of `controls` are regressed out of both."""
  design = jnp.stack([jnp.ones_like(ranks(a)), *map(ranks, controls)], axis=1)
  basis, _ = jnp.linalg.qr(design)
  rest = lambda values: (v := ranks(values)) - basis @ (basis.T @ v)
  return _pearson(rest(a), rest(b))


def document_bootstrap(
  statistic: Callable[[np.ndarray], float], documents: np.ndarray, *, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
  """(2.5 %, 97.5 %) of a statistic when whole documents are drawn with replacement.

  Args:
    statistic: of an array of token indices.
    documents: the document of every token.
  """
  members = [np.flatnonzero(documents == d) for d in np.unique(documents)]
  random = np.random.default_rng(seed)
  drawn = lambda: np.concatenate([members[i] for i in random.integers(0, len(members), len(members))])
  low, high = np.nanpercentile([statistic(drawn()) for _ in range(resamples)], [2.5, 97.5])
  return float(low), float(high)


@exactly
def linearity(x: Vectors, y: Vectors) -> Float[Array, ""]:
  """1 - min_A ||X A - Y||_F^2 with X, Y centred and of Frobenius norm 1 (Razzhigaev et al. 2024, arXiv 2405.12250).

  In sample, as published: with fewer tokens than dimensions it is 1. Give increments as y for the score without the
  residual stream.
  """
  unit = lambda a: (c := a - a.mean(axis=0)) / jnp.maximum(jnp.linalg.norm(c), 1e-12)
  basis, rest = jnp.linalg.qr(unit(x))  # the singular vectors of x are then those of a small square
  left, singular, _ = jnp.linalg.svd(rest, full_matrices=False)
  inside = singular > singular[0] * max(x.shape) * jnp.finfo(x.dtype).eps
  return jnp.sum(jnp.where(inside[:, None], left.T @ (basis.T @ unit(y)), 0.0) ** 2)


def block_influence(x: Vectors, y: Vectors) -> Float[Array, ""]:
  """Mean of 1 - cos(x_i, y_i)."""
  return jnp.mean(1 - _ratio(jnp.sum(x * y, axis=-1), _norm(x) * _norm(y)))


@exactly
def affine_lens(
  model: Network,
  reference: tuple[Float[Array, "layers many time width"], Float[Array, "layers many time width"]],
  evaluation: tuple[Float[Array, "layers rows time width"], Float[Array, "layers rows time width"]],
  *,
  layer: int | Int[Array, ""],
  ridge: float | Float[Array, ""] = 1e-2,
  tokens: Int[Array, "rows length"] | None = None,
) -> Float[Array, "rows time"]:
  """KL(p || p_lens) of an affine map from the inputs of a block to what the head reads, fitted on the reference.

  A tuned lens whose map is the ridge solution rather than trained on the KL. `reference` and `evaluation` are pairs
  (x, y) from `collect`. What reads a stack of an H-Net is the rest of the network: there the map gives the last block's
  output, one position at a time.

  Args:
    tokens: those of the evaluation, for a stack of an H-Net.

  Raises:
    InputError: a stack without tokens.
  """
  model = _widened(model)
  layers = (-1, model.depth // 2) if getattr(model.config, "backout", False) else (-1,)
  flat = lambda a: a.reshape(-1, a.shape[-1])
  (x, y), (x_eval, y_eval) = reference, evaluation
  targets = jnp.concatenate([flat(y[i]) for i in layers], axis=1)
  predicted = apply_affine(fit_affine(flat(x[layer]), targets, ridge=ridge), x_eval[layer])
  if isinstance(model, StackNetwork):
    require(tokens is not None, "the lens of a stack needs the evaluation's tokens; pass tokens=")
    skip = model.length - predicted.shape[1]
    return intervene(model, tokens, predicted, layer=model.depth - 1, skip=skip)["single_token"]["kl"]
  shape = y_eval.shape[1:3] + ((-1, model.config.width) if _state_size(model) > model.config.width else (-1,))
  logits = lambda states: model.logits(*(a.reshape(shape) for a in states))
  clean, lens = logits([y_eval[i] for i in layers]), logits(jnp.split(predicted, len(layers), axis=-1))
  return _compare(clean, lens)["kl"]


def _run_streams(model: Network, tokens, rewrite, attention: AttentionFn):
  """Logits of three copies of the rows, of which the second keeps the first one's past at every position."""
  if isinstance(model, StackNetwork):
    return model.logits_of_streams(tokens, rewrite, attention)
  three = lambda a, axis=0: None if a is None else jnp.concatenate([a] * 3, axis=axis)
  if isinstance(model, Mamba2):
    return model.logits(run_blocks(model, three(model.embed(tokens)), mix=streams_of_states, rewrite=rewrite)[0])
  x, side, _ = model.embed(tokens)
  side = dataclasses.replace(side, x0=three(side.x0), values=three(side.values, axis=1))
  x, backout, _, _ = sequential(model, three(x), side, attention=streams_of_attention(attention), rewrite=rewrite)
  return model.logits(x, backout)


def _state_size(model: Network) -> int:
  """Numbers a token has between two blocks: all its hyper-connection streams."""
  hyper = getattr(model.config, "hyper", None)
  return model.config.width * (hyper.streams if hyper else 1)


def _compare(clean, changed):
  p, other = jax.nn.log_softmax(clean), jax.nn.log_softmax(changed)
  return {
    "kl": jnp.maximum(jnp.sum(jnp.exp(p) * (p - other), axis=-1), 0.0),
    "logits": _norm(clean - changed),
    "flip": (jnp.argmax(clean, axis=-1) != jnp.argmax(changed, axis=-1)).astype(jnp.float32),
  }


def _pearson(a, b):
  a, b = a - a.mean(), b - b.mean()
  return jnp.sum(a * b) / (_norm(a) * _norm(b))


def _ratio(a, b):
  """a / b, and 0 where b is 0."""
  return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _norm(v):
  return jnp.linalg.norm(v, axis=-1)


def _trace(model: Network, tokens, attention: AttentionFn):
  return model.trace(tokens) if isinstance(model, Mamba2) else model.trace(tokens, attention=attention)


def _widened(model: Network) -> Network:
  """In float32: the increments of a bfloat16 trace are mostly rounding where ||u|| << ||h||."""
  return jax.tree.map(wide, model)


def _positions(model: Network, tokens) -> int:
  """Of every row, those that are left out included."""
  return model.length if isinstance(model, StackNetwork) else tokens.shape[1]


def _check(model, tokens, skip: int) -> None:
  require(not isinstance(model, HNet), "an HNet has blocks of several widths; measure its `layer_geometry_hnet.stacks`")
  require(
    isinstance(model, Transformer | Mamba2 | StackNetwork),
    f"layer geometry needs a Transformer or Mamba2 with stacked blocks, not {type(model).__name__}; see hub",
  )
  kind = f"positions in stage {model.index}" if isinstance(model, StackNetwork) else "tokens"
  count = _positions(model, tokens)
  require(0 <= skip < count, f"rows have {count} {kind} of which {skip} are skipped; use longer rows")
