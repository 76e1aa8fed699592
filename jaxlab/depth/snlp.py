"""SNLP: layer-parallel inference by structured Newton corrections (Han et al. 2026, arXiv 2605.17842).

A network of L layers is a chain h_l = f_l(h_{l-1}). The first S = L - n layers run one after the other; the n of the
suffix are solved together. With z_0 = h_S fixed and z_{j+1} the estimate of layer S + j's output, one Newton step is

  F_j = f_{S+j}(z_j) for all j at once,   r_j = F_j - z_{j+1},   e_j = r_j + A_j e_{j-1},   z_{j+1} <- z_{j+1} + e_j,

with a cheap surrogate A_j for the Jacobian of f_{S+j}: identity (IDN), the streams' mixing matrices (HCN), ... After k
steps the first k outputs are exact, so n steps are the network itself. A regulariser trains the network so that one or
two steps are enough. Works on any stacked `Transformer`, a loaded Llama or Qwen3 too:

  logits = snlp.forward(model, tokens, layers=24, iterations=2)

Where the paper's symbols are: G, r, e, the Newton step: `core.newton.solve`; A_j: `make_surrogate`; S, n (n_par), K,
the initial trace: `solve`; R, the training term: `regulariser`, w(step): `regulariser_weight`; CxFM, wide layers:
`snlp_suffix`; cached decoding: `snlp_inference`; self-speculation: `snlp_speculative`; the preheated start:
`snlp_preheat`; layers over devices: `snlp_sharded`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core import newton
from jaxlab.core.checks import require, require_choice
from jaxlab.core.recurrence import linear_recurrence, matrix_recurrence, transfer, transfer_tensor
from jaxlab.depth.snlp_suffix import Suffix, evaluate, plain, require_transformer
from jaxlab.depth.snlp_suffix import parts as make_parts
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.block import Side, attend_layers, evaluate_blocks, layer_values
from jaxlab.models.layers import wide
from jaxlab.models.transformer import layer_parallel, sequential
from jaxlab.training.losses import mean_loss, token_losses

SURROGATES = ("identity", "jacobi", "damped", "scaled", "diagonal", "streams", "exact")
INITIAL = ("h0", "batch_fwd")
_GROUP = 4  # blocks the regulariser evaluates at once where memory counts


def forward(
  model: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  layers: int | Suffix,
  iterations: int,
  surrogate: str = "identity",
  initial: str | Float[Array, "units batch time *state"] = "h0",
  damping: float = 0.0,
  groups: int = 1,
  tail: int = 0,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
) -> Float[Array, "batch time vocab"]:
  """Logits of the layer-parallel network; `hidden` and `solve` say what the arguments are."""
  how = dict(surrogate=surrogate, initial=initial, damping=damping, groups=groups, tail=tail, key=key)
  last = hidden(model, tokens, layers=layers, iterations=iterations, attention=attention, **how)
  return model.logits(*last)


def hidden(
  model: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  layers: int | Suffix,
  iterations: int,
  surrogate: str = "identity",
  initial: str | Float[Array, "units batch time *state"] = "h0",
  damping: float = 0.0,
  groups: int = 1,
  tail: int = 0,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
  remat: bool = False,
):
  """(final state, backout state or None) of the layer-parallel network: what `model.logits` reads.

  A backout layer inside the suffix is read from the approximate trace: its own estimate, or that of the wide layer
  which contains it.

  Args:
    layers: n, or a suffix that `snlp_suffix.fuse` made of the model.
    tail: layers at the end that run in sequence behind those that are solved: the last ones of a pretrained network
      read more out of the state than they add, and solved with the rest they spoil it.
    groups: C; split the suffix into C consecutive groups, solve the first, hand its last state to the second as its
      exact input, and so on (block Gauss-Seidel). C K evaluations in a row instead of K.
    iterations, surrogate, initial, damping, key, remat: as `solve`.

  Raises:
    InputError: as `solve`; groups or a tail of a fused suffix, or groups that do not divide the layers.
  """
  require_transformer(model)
  x, side, _ = model.embed(tokens)
  how = dict(surrogate=surrogate, initial=initial, damping=damping, groups=groups, tail=tail, key=key, remat=remat)
  return hidden_from(model, x, None, side, start=0, layers=layers, iterations=iterations, attention=attention, **how)


def hidden_from(
  model: Transformer,
  x: Float[Array, "batch time *state"],
  backout: Float[Array, "batch time *state"] | None,
  side: Side,
  *,
  start: int,
  layers: int | Suffix,
  iterations: int,
  surrogate: str = "identity",
  initial: str | Float[Array, "units batch time *state"] = "h0",
  damping: float = 0.0,
  groups: int = 1,
  tail: int = 0,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
  remat: bool = False,
):
  """`hidden` from the exact state x before layer `start`, and the backout state if that layer lies before it.

  Raises:
    InputError: as `hidden`; a suffix that begins before `start`.
  """
  require(groups >= 1, f"groups is {groups}; the suffix is solved in at least one")
  if isinstance(layers, Suffix):
    require(groups == 1 and tail == 0, "groups and a tail are of plain layers; a fused suffix is solved in one")
    parts = (layers,)
  else:
    parts = make_parts(model, layers, groups=groups, tail=tail)[:groups]
  first, stop = parts[0].start, parts[-1].stop
  require(start <= first, f"layers (n_par) begin at layer {first}; the state given is that before layer {start}")
  run = functools.partial(sequential, model, side=side, attention=attention, remat="full" if remat else "none")
  middle = model.depth // 2
  x, found, _, _ = run(x, start=start, stop=first)
  backout = found if start <= middle < first else backout
  how = dict(iterations=iterations, surrogate=surrogate, initial=initial, damping=damping, key=key, remat=remat)
  for part in parts:
    trace = solve(model, x, side, layers=part, attention=attention, **how).trace
    x = trace[-1]
    if model.config.backout and part.start <= middle < part.stop:
      backout = trace[part.unit_of(middle) + 1]
  if stop < model.depth:
    x, found, _, _ = run(x, start=stop)
    backout = found if middle >= stop else backout
  return x, backout


def solve(
  model: Transformer,
  h: Float[Array, "batch time *state"],
  side: Side,
  *,
  layers: int | Suffix,
  iterations: int,
  surrogate: str = "identity",
  initial: str | Float[Array, "units batch time *state"] = "h0",
  damping: float = 0.0,
  key: jax.Array | None = None,
  attention: AttentionFn = dot_product_attention,
  tolerance: float | None = None,
  remat: bool = False,
) -> newton.Solution:
  """Solves the suffix from its exact input h = h_S.

  Args:
    layers: n, layers in the suffix, or the suffix itself.
    iterations: K, Newton steps.
    surrogate: "identity" A = I; "jacobi" A = 0; "damped" A = (1 - damping) I; "scaled" A_j = lambda_j I of a model with
      residual lambdas; "diagonal" A_j = diag(J_j) by one Hutchinson probe (needs `key`); "streams" the products
      Hres_mlp Hres_attn of a model with hyper-connections (HCN), dynamic ones at the current iterate; "exact"
      A_j = J_j, an oracle.
    initial: "h0" starts from z_j = h_S; "batch_fwd" from z_{j+1} = f_{S+j}(h_S), one more evaluation of the suffix; an
      array is the start itself, z_1 .. z_n (the last token's trace: "warm"; `snlp_preheat`'s prediction: "preheat").
    tolerance, remat: as `newton.solve`.

  Returns:
    The trace z_0 .. z_n, residual norms before each step, and the steps run.

  Raises:
    InputError: n outside 1..L, K < 1, or a surrogate this model cannot offer.
  """
  suffix = _suffix(model, layers)
  evaluated = lambda z: evaluate(model, suffix, z, side, attention=attention)
  chosen = make_surrogate(model, suffix, side, surrogate, evaluated, damping=damping, key=key)
  blocks = lambda z: evaluated(z)[0]
  trace = initial_trace(blocks, h, initial, suffix.units)
  return newton.solve(blocks, trace, iterations=iterations, surrogate=chosen, tolerance=tolerance, remat=remat)


def initial_trace(blocks, h, initial, units: int) -> Float[Array, "units_plus_1 batch time *state"]:
  """z_0 = h and the start of z_1 .. z_units that `initial` names or is."""
  repeated = jnp.broadcast_to(h, (units, *h.shape))
  if isinstance(initial, str):
    require_choice("initial", initial, INITIAL)
    rest = blocks(repeated) if initial == "batch_fwd" else repeated
  else:
    require(initial.shape == repeated.shape, f"the initial trace has shape {initial.shape}; expected {repeated.shape}")
    rest = initial.astype(h.dtype)
  return jnp.concatenate([h[None], rest])


def make_surrogate(
  model: Transformer, suffix: Suffix, side: Side, name: str, evaluated, *, damping: float = 0.0, key=None
) -> newton.Surrogate:
  """The surrogate A_j of a suffix by its name in `SURROGATES`; `evaluated(z)` is `snlp_suffix.evaluate` at z."""
  require_choice("surrogate", name, SURROGATES)
  if name == "damped":
    return newton.scaled(1.0 - damping)
  if name == "scaled":
    require(model.config.residual_lambdas, "surrogate 'scaled' needs residual lambdas; use 'identity' for this model")
    return newton.scaled(suffix.blocks.residual_lambda[...])
  if name == "diagonal":
    require(key is not None, "surrogate 'diagonal' draws a random probe; pass key=jax.random.key(seed)")
    return newton.diagonal(key, damping=damping, clip=2.0)
  if name == "streams":
    hyper = model.config.hyper
    require(hyper is not None, "surrogate 'streams' needs hyper-connections; use 'identity' for this model")
    if not hyper.dynamic:
      return newton.transferred(transfer_tensor(stream_transition(side, suffix)))

    def dynamic(blocks, inputs):
      outputs, _, (attention, mlp) = evaluated(inputs)
      return outputs, lambda r: matrix_recurrence(mlp[2] @ attention[2], r)

    return dynamic
  return {"identity": newton.identity, "jacobi": newton.jacobi, "exact": newton.exact}[name]


def stream_transition(side: Side, suffix: Suffix) -> Float[Array, "units s s"]:
  """A_j = Hres_mlp,j Hres_attn,j of a model with static hyper-connections: doubly stochastic, the same for every token.

  A wide layer mixes once, with the means of its layers' matrices.
  """
  residual = side.mixing.residual[suffix.start : suffix.stop]
  residual = residual.reshape(suffix.units, suffix.chunk, *residual.shape[1:]).mean(axis=1)
  return residual[:, 1] @ residual[:, 0]


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
  detach_input: bool = False,
  idn_last_layer_only: bool = False,
  key: jax.Array | None = None,
  remat: bool = False,
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
    detach_target: no gradient into the targets. Alone it does harm where training is short: h_S then moves towards
      a target that, being computed from h_S, moves on with it.
    detach_input: no gradient into h_S.
    idn_last_layer_only: reproduce a quirk of the authors' code at stride 0: c is f_{L-1}(h_S) without the prefix sum.
    key: if given, one n is drawn and its terms multiplied by len(layers): an unbiased, cheaper estimate.
    remat: evaluate the blocks again in the backward pass, a few at a time, instead of keeping what they computed.

  Raises:
    InputError: n outside 1..L, or another surrogate.
  """
  require_choice("regulariser surrogate", surrogate, ("identity", "streams"))
  require(
    surrogate == "identity" or model.config.hyper is not None,
    "surrogate 'streams' needs hyper-connections; use 'identity'",
  )
  require(
    not idn_last_layer_only or (surrogate, stride) == ("identity", 0), "idn_last_layer_only needs identity, stride 0"
  )

  def of(n):
    suffix = plain(model, n)
    start = suffix.start
    h = trace[start - 1] if start else h0
    h = jax.lax.stop_gradient(h) if detach_input else h
    if idn_last_layer_only:
      c = layer_parallel(model, h[None], side, start=model.depth - 1, attention=attention)
      return _relative_error(c, trace[-1:], detach_target)
    if remat:
      outputs, mixing = _outputs_by_groups(model, suffix, h, side, attention)
    else:
      repeated = jnp.broadcast_to(h, (n, *h.shape))
      outputs, _, mixing = evaluate(model, suffix, repeated, side, attention=attention)
    increments = outputs - h
    chosen = jnp.array(penalised(n, stride))
    if surrogate == "identity":
      error = linear_recurrence(1.0, increments)[chosen]
    elif model.config.hyper.dynamic:
      attention_maps, mlp_maps = mixing
      error = matrix_recurrence(mlp_maps.residual @ attention_maps.residual, increments)[chosen]
    else:
      error = transfer(transfer_tensor(stream_transition(side, suffix))[chosen], increments)
    return _relative_error(h + error, trace[start:][chosen], detach_target)

  if key is None:
    return sum(of(n) for n in layers)
  draw = jax.random.randint(key, (), 0, len(layers))
  return len(layers) * jax.lax.switch(draw, [lambda n=n: of(n) for n in layers])


def _outputs_by_groups(model: Transformer, suffix: Suffix, h, side: Side, attention: AttentionFn):
  """(outputs, mixing) of a plain suffix' blocks, all on h: groups of them in a loop that keeps nothing else.

  A loop, because what is only marked for recomputation is recomputed whenever the compiler likes: for all groups of all
  suffixes at once.
  """
  c, n, size = model.config, suffix.layers, _GROUP
  windows = c.windows[suffix.start : suffix.stop]
  if n % size or windows != windows[:size] * (n // size):
    size = n
  attend = functools.partial(attend_layers, windows=windows[:size], attention=attention, start=side.start)
  mixing = jax.tree.map(lambda m: m[suffix.start : suffix.stop], side.mixing)
  layers = suffix.blocks, layer_values(c, side, suffix.start, suffix.stop), mixing

  @jax.checkpoint
  def group(_, parts):
    blocks, values, mixing = parts
    states = jnp.broadcast_to(h, (size, *h.shape))
    outputs, _, mixes = evaluate_blocks(blocks, states, side, values=values, mixing=mixing, attend=attend)
    return None, (outputs, mixes)

  grouped = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), layers)
  _, found = jax.lax.scan(group, None, grouped)
  return jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), found)


def penalised(n: int, stride: int) -> list[int]:
  """Positions j of a suffix of n layers that the regulariser counts."""
  return [j for j in range(n) if j == n - 1 or (stride and j >= 1 and (j + 1) % stride == 0)]


def regulariser_weight(step: Int[Array, ""], *, weight: float, steps: int, warmup: float = 0.2) -> Float[Array, ""]:
  """weight * min(1, step / (warmup * steps)): the regulariser comes in linearly over the first part of the run."""
  return weight * jnp.minimum(1.0, step / max(warmup * steps, 1.0))


def finetuning_loss(
  model: Transformer,
  batch: dict,
  *,
  layers: int | Suffix,
  iterations: int,
  surrogate: str = "identity",
  initial: str = "h0",
  groups: int = 1,
) -> tuple[Array, dict[str, Array]]:
  """(cross-entropy, {}) of the layer-parallel network itself, gradients through all K iterations.

  Fine-tuning on this loss trains the network that will be run. Targets of -1 do not count: give only the assistant's
  tokens others. The arguments are those of `hidden`; every iteration is evaluated again for the gradient.
  """
  how = dict(surrogate=surrogate, initial=initial, groups=groups, remat=True)
  states = hidden(model, batch["inputs"], layers=layers, iterations=iterations, **how)
  losses = token_losses(model, states, batch["targets"])
  return mean_loss(losses, batch["targets"]), {}


def trace_error(
  model: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  layers: int,
  iterations: int,
  surrogate: str = "identity",
  initial: str = "h0",
  damping: float = 0.0,
  key: jax.Array | None = None,
) -> Float[Array, "n"]:
  """mean over tokens of ||z_{j+1} - h_{S+j+1}|| / ||h_{S+j+1}|| for j = 0..n-1; the arguments are those of `solve`."""
  h0, trace, side = model.trace(tokens)
  start = plain(model, layers).start
  h = trace[start - 1] if start else h0
  how = dict(surrogate=surrogate, initial=initial, damping=damping, key=key)
  z = solve(model, h, side, layers=layers, iterations=iterations, **how).trace[1:]
  return jax.vmap(lambda a, b: _relative_error(a[None], b[None], False))(z, trace[start:])


def jacobian_norms(
  model: Transformer, tokens: Int[Array, "batch time"], key: jax.Array, *, iterations: int = 10, eps: float = 0.1
) -> Float[Array, "L"]:
  """||J_l v|| of each block at the sequential states, v by power iteration per token, mean over tokens.

  Finite differences with unit vectors v: J v = (f(h + eps v) - f(h)) / eps; eps is large so that it survives bfloat16.
  """
  h0, trace, side = model.trace(tokens)
  states = jnp.concatenate([h0[None], trace[:-1]])
  blocks = lambda z: wide(layer_parallel(model, z, side))
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


def _suffix(model, layers: int | Suffix) -> Suffix:
  return layers if isinstance(layers, Suffix) else plain(model, layers)
