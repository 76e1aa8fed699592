"""SNLP: layer-parallel inference by structured Newton corrections (Han et al. 2026, arXiv 2605.17842).

A network of L layers is a chain h_l = f_l(h_{l-1}). The first S = L - n layers run one after the other; the n of the
suffix are solved together. With z_0 = h_S fixed and z_{j+1} the estimate of layer S + j's output, one Newton step is

  F_j = f_{S+j}(z_j) for all j at once,   r_j = F_j - z_{j+1},   e_j = r_j + A_j e_{j-1},   z_{j+1} <- z_{j+1} + e_j,

with a cheap surrogate A_j for the Jacobian of f_{S+j}: identity (IDN), the streams' mixing matrices (HCN), ... After k
steps the first k outputs are exact, so n steps are the network itself. A regulariser trains the network so that one or
two steps are enough. Works on any stacked `Transformer`, a loaded Llama or Qwen3 too:

  logits = snlp.forward(model, tokens, layers=24, iterations=2)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core import newton
from jaxlab.core.checks import require, require_choice
from jaxlab.core.recurrence import linear_recurrence, matrix_recurrence
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.layers import wide
from jaxlab.models.transformer import Side, layer_parallel, sequential

SURROGATES = ("identity", "jacobi", "damped", "scaled", "diagonal", "streams", "exact")
INITIAL = ("h0", "batch_fwd")


def forward(model: Transformer, tokens: Int[Array, "batch time"], **options) -> Float[Array, "batch time vocab"]:
  """Logits of the layer-parallel network; the options are those of `solve`."""
  return model.logits(*hidden(model, tokens, **options))


def hidden(
  model: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  layers: int,
  attention: AttentionFn = dot_product_attention,
  **options,
):
  """(final state, backout state or None) of the layer-parallel network: what `model.logits` reads.

  A backout layer inside the suffix is read from the approximate trace.
  """
  _check_layers(model, layers)
  x, side, _ = model.embed(tokens)
  start = model.depth - layers
  x, backout, _, _ = sequential(model, x, side, stop=start, attention=attention)
  trace = solve(model, x, side, layers=layers, attention=attention, **options).trace
  inside = model.depth // 2 - start
  if model.config.backout and inside >= 0:
    backout = trace[inside + 1]
  return trace[-1], backout


def solve(
  model: Transformer,
  h: Float[Array, "batch time *state"],
  side: Side,
  *,
  layers: int,
  iterations: int,
  surrogate: str = "identity",
  initial: str = "h0",
  damping: float = 0.0,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
  tolerance: float | None = None,
) -> newton.Solution:
  """Solves the suffix from its exact input h = h_S.

  Args:
    layers: n, layers in the suffix.
    iterations: K, Newton steps.
    surrogate: "identity" A = I; "jacobi" A = 0; "damped" A = (1 - damping) I; "scaled" A_j = lambda_j I of a model with
      residual lambdas; "diagonal" A_j = diag(J_j) by one Hutchinson probe (needs `key`); "streams" the products
      Hres_mlp Hres_attn of a model with static hyper-connections; "exact" A_j = J_j, an oracle.
    initial: "h0" starts from z_j = h_S; "batch_fwd" from z_{j+1} = f_{S+j}(h_S), one more evaluation of the suffix.
    tolerance: stop early at this relative residual (see `newton.solve`).

  Returns:
    The trace z_0 .. z_n, residual norms before each step, and the steps run.

  Raises:
    InputError: n outside 1..L, K < 1, or a surrogate this model cannot offer.
  """
  _check_layers(model, layers)
  require_choice("initial", initial, INITIAL)
  start = model.depth - layers
  blocks = lambda z: layer_parallel(model, z, side, start=start, attention=attention)[0]
  trace = jnp.broadcast_to(h, (layers + 1, *h.shape))
  if initial == "batch_fwd":
    trace = trace.at[1:].set(blocks(trace[:-1]))
  chosen = make_surrogate(model, side, surrogate, layers=layers, damping=damping, key=key)
  return newton.solve(blocks, trace, iterations=iterations, surrogate=chosen, tolerance=tolerance)


def make_surrogate(
  model: Transformer, side: Side, name: str, *, layers: int, damping: float = 0.0, key: jax.Array | None = None
) -> newton.Surrogate:
  """The surrogate A_j of the last `layers` layers by its name in `SURROGATES`."""
  require_choice("surrogate", name, SURROGATES)
  start = model.depth - layers
  if name == "damped":
    return newton.scaled(1.0 - damping)
  if name == "scaled":
    require(model.config.residual_lambdas, "surrogate 'scaled' needs residual lambdas; use 'identity' for this model")
    return newton.scaled(model.blocks.residual_lambda[...][start:])
  if name == "diagonal":
    require(key is not None, "surrogate 'diagonal' draws a random probe; pass key=jax.random.key(seed)")
    return newton.diagonal(key, damping=damping, clip=2.0)
  if name == "streams":
    return newton.streams(stream_transition(side, start))
  return {"identity": newton.identity, "jacobi": newton.jacobi, "exact": newton.exact}[name]


def stream_transition(side: Side, start: int) -> Float[Array, "n 1 1 s s"]:
  """A_j = Hres_mlp,j Hres_attn,j of layers start.. : doubly stochastic, the same for every token."""
  require(side.mixing is not None, "surrogate 'streams' needs static hyper-connections; use 'identity' for this model")
  residual = side.mixing[2][start:]
  return (residual[:, 1] @ residual[:, 0])[:, None, None]


def regulariser(
  model: Transformer,
  h0: Float[Array, "batch time *state"],
  trace: Float[Array, "L batch time *state"],
  side: Side,
  *,
  layers: Sequence[int],
  stride: int,
  surrogate: str = "identity",
  detach_target: bool = False,
  idn_last_layer_only: bool = False,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
) -> Float[Array, ""]:
  """R, how far one Newton step from the h0 trace is from the sequential states (added to the loss while pretraining).

  For every n in `layers`, with h_S and the targets from the ordinary forward:

    F_j = f_{S+j}(h_S);   c_0 = F_0,  c_j = F_j + A_j (c_{j-1} - h_S);
    term(j) = mean_{b,t} ||c_j - h_{S+j+1}|| / max(||h_{S+j+1}||, 1e-6);
    R = sum of term(j) over n in `layers` and j in `penalised(n, stride)`.

  Args:
    h0, trace: embeddings and all layers' outputs, as `model.trace` returns them.
    stride: penalise every stride-th position and the last; 0 the last only.
    surrogate: "identity" or "streams".
    detach_target: no gradient into the targets.
    idn_last_layer_only: reproduce a quirk of the authors' code at stride 0: c is f_{L-1}(h_S) without the prefix sum.
    key: if given, one n is drawn and its terms multiplied by len(layers): an unbiased, cheaper estimate.

  Raises:
    InputError: n outside 1..L, or another surrogate.
  """
  require_choice("regulariser surrogate", surrogate, ("identity", "streams"))
  require(
    not idn_last_layer_only or (surrogate, stride) == ("identity", 0), "idn_last_layer_only needs identity, stride 0"
  )

  def of(n):
    _check_layers(model, n)
    start = model.depth - n
    h = trace[start - 1] if start else h0
    if idn_last_layer_only:
      c, _ = layer_parallel(model, h[None], side, start=model.depth - 1, attention=attention)
      return _relative_error(c, trace[-1:], detach_target)
    outputs, _ = layer_parallel(model, jnp.broadcast_to(h, (n, *h.shape)), side, start=start, attention=attention)
    increments = outputs - h
    if surrogate == "identity":
      c = h + linear_recurrence(1.0, increments)
    else:
      c = h + matrix_recurrence(stream_transition(side, start), increments)
    chosen = jnp.array(penalised(n, stride))
    return _relative_error(c[chosen], trace[start:][chosen], detach_target)

  if key is None:
    return sum(of(n) for n in layers)
  draw = jax.random.randint(key, (), 0, len(layers))
  return len(layers) * jax.lax.switch(draw, [lambda n=n: of(n) for n in layers])


def penalised(n: int, stride: int) -> list[int]:
  """Positions j of a suffix of n layers that the regulariser counts."""
  return [j for j in range(n) if j == n - 1 or (stride and j >= 1 and (j + 1) % stride == 0)]


def regulariser_weight(step: Int[Array, ""], *, weight: float, steps: int, warmup: float = 0.2) -> Float[Array, ""]:
  """weight * min(1, step / (warmup * steps)): the regulariser comes in linearly over the first part of the run."""
  return weight * jnp.minimum(1.0, step / max(warmup * steps, 1.0))


def trace_error(model: Transformer, tokens: Int[Array, "batch time"], **options) -> Float[Array, "n"]:
  """mean over tokens of ||z_{j+1} - h_{S+j+1}|| / ||h_{S+j+1}|| for j = 0..n-1; the options are those of `solve`."""
  h0, trace, side = model.trace(tokens)
  start = model.depth - options["layers"]
  h = trace[start - 1] if start else h0
  z = solve(model, h, side, **options).trace[1:]
  return jax.vmap(lambda a, b: _relative_error(a[None], b[None], False))(z, trace[start:])


def jacobian_norms(
  model: Transformer, tokens: Int[Array, "batch time"], key: jax.Array, *, iterations: int = 10, eps: float = 0.1
) -> Float[Array, "L"]:
  """||J_l v|| of each block at the sequential states, v by power iteration per token, mean over tokens.

  Finite differences with unit vectors v: J v = (f(h + eps v) - f(h)) / eps; eps is large so that it survives bfloat16.
  """
  h0, trace, side = model.trace(tokens)
  states = jnp.concatenate([h0[None], trace[:-1]])
  blocks = lambda z: wide(layer_parallel(model, z, side)[0])
  unit = lambda v: v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
  base = blocks(states)

  def step(v, _):
    product = (blocks((states + eps * v).astype(states.dtype)) - base) / eps
    return unit(product), jnp.linalg.norm(product, axis=-1)

  v = unit(jax.random.normal(key, states.shape))
  _, norms = jax.lax.scan(step, v, length=iterations)
  return norms[-1].reshape(model.depth, -1).mean(axis=1)


def _relative_error(estimate, target, detach):
  """sum over the leading axis of the mean over positions of ||estimate - target|| / ||target||, in float32."""
  target = wide(jax.lax.stop_gradient(target) if detach else target)
  difference = _norm(wide(estimate) - target)
  ratio = difference / jnp.maximum(_norm(target), 1e-6)
  return ratio.reshape(ratio.shape[0], -1).mean(axis=1).sum()


def _norm(x):
  """Euclidean norm over the last axis, with gradient 0 where x = 0."""
  square = jnp.sum(x * x, axis=-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _check_layers(model, layers: int) -> None:
  require(
    isinstance(model, Transformer), f"SNLP needs a Transformer with stacked blocks, not {type(model).__name__}; see hub"
  )
  require(1 <= layers <= model.depth, f"layers (n_par) is {layers}; it must lie in 1..{model.depth}, the model's depth")
