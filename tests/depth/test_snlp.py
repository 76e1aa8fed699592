import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from experiments.many_gpus import collectives
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.depth import snlp, snlp_suffix
from jaxlab.models.config import HyperConnections, nanochat
from jaxlab.models.transformer import layer_parallel, sequential
from tests.common import CLOSE, configs, plain_attention, random_model, random_tokens

CONFIGS = configs()
TOKENS = random_tokens(2, 16)
OFFERED = {
  "nanochat": ("identity", "jacobi", "damped", "scaled", "diagonal", "exact"),
  "mhc": ("identity", "streams", "exact"),
  "mhc_dynamic": ("identity", "streams"),
  "llama": ("identity", "jacobi", "exact"),
  "qwen3_moe": ("identity",),
}
CASES = [(model, surrogate) for model, surrogates in OFFERED.items() for surrogate in surrogates]


def traced(model, **options):
  """`model.trace`, compiled: operation by operation it is a hundred compilations."""
  return jax.jit(lambda m: m.trace(TOKENS, **options))(model)


def regulariser(model, *trace, **options):
  return jax.jit(lambda *given: snlp.regulariser(*given, **options))(model, *trace)


def run(model, **options):
  return jax.jit(lambda m: snlp.forward(m, TOKENS, key=jax.random.key(5), damping=0.3, **options))(model)


@pytest.mark.parametrize("name, surrogate", CASES)
def test_n_iterations_reproduce_the_sequential_network(name, surrogate, dtype):
  """After k iterations the first k layers are exact for any surrogate and start.

  Every start in float64, where the tolerance is tightest, by one program; float32 names one of them.
  """
  config = dataclasses.replace(CONFIGS[name], depth=4)
  model, expected = random_model(config, dtype=dtype), sequential_network(config, dtype)
  options = dict(layers=4, iterations=4, surrogate=surrogate, attention=plain_attention)
  started = from_every_start if dtype == "float64" else lambda m, **o: [run(m, initial="batch_fwd", **o)]
  for actual in started(model, **options):
    np.testing.assert_allclose(actual, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_devices_that_split_the_batch_exchange_nothing():
  """Attention of all layers at once takes each device's own rows, under both kinds of window."""
  model, tokens = random_model(dataclasses.replace(CONFIGS["nanochat"], depth=4)), random_tokens(8, 160)
  assert set(model.config.windows) == {128, None}
  mesh = meshes.make_mesh()
  solve = lambda m, t: snlp.hidden(m, t, layers=4, iterations=1)[0]

  def placed(m, t):
    with meshes.using(mesh):
      return solve(m, t)

  args = jax.device_put(model, meshes.shardings(model, mesh)), jax.device_put(tokens, meshes.batch_sharding(mesh))
  compiled = jax.jit(placed).lower(*args).compile()
  assert not collectives.collectives(compiled.as_text())
  np.testing.assert_allclose(compiled(*args), jax.jit(solve)(model, tokens), rtol=1e-4, atol=1e-4)


def from_every_start(model, *, layers, attention, **options):
  def every(m):
    x, side, _ = m.embed(TOKENS)
    blocks = lambda z: layer_parallel(m, z, side, attention=attention)
    starts = jnp.stack([snlp.initial_trace(blocks, x, initial, layers)[1:] for initial in snlp.INITIAL])
    options_of = lambda initial: options | dict(initial=initial, layers=layers, attention=attention)
    key = jax.random.key(5)
    return jax.lax.map(lambda z: snlp.forward(m, TOKENS, key=key, damping=0.3, **options_of(z)), starts)

  return jax.jit(every)(model)


@functools.cache
def sequential_network(config, dtype):
  return jax.jit(lambda m: m(TOKENS, attention=plain_attention))(random_model(config, dtype=dtype))


@pytest.mark.parametrize("surrogate", ["identity", "jacobi", "scaled"])
def test_the_first_k_states_of_the_suffix_are_exact(surrogate):
  model = random_model(CONFIGS["nanochat"])
  h0, trace, side = traced(model)
  solve = lambda m, k: snlp.solve(m, trace[0], side, layers=5, iterations=k, surrogate=surrogate).trace
  solved = jax.jit(lambda m: {k: solve(m, k) for k in (1, 2, 3)})(model)
  for k, z in solved.items():
    np.testing.assert_allclose(z[1 : k + 1], trace[1 : k + 1], rtol=1e-4, atol=1e-4)
    assert not np.allclose(z[-1], trace[-1], rtol=1e-2, atol=1e-2)
  assert h0.shape == trace[0].shape


def test_one_step_from_h0_adds_the_branches_of_one_input(dtype):
  """z_n = h_S + sum_i (f_{S+i}(h_S) - h_S)."""
  model, attention = random_model(CONFIGS["nanochat"], dtype=dtype), plain_attention

  @jax.jit
  def both(model):
    _, trace, side = model.trace(TOKENS, attention=attention)
    h = trace[1]
    layer = lambda i: sequential(model, h, side, start=i, stop=i + 1, attention=attention)[0]
    z = snlp.solve(model, h, side, layers=4, iterations=1, attention=attention).trace
    return z[1:] - h, jnp.cumsum(jnp.stack([layer(i) - h for i in range(2, 6)]), 0)

  np.testing.assert_allclose(*both(model), rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_the_mixing_matrices_solve_an_mhc_network_without_branches_in_one_step(dtype):
  """f(X) = A X + b on streams: HCN exact at K = 1, IDN not."""
  model = random_model(CONFIGS["mhc"], dtype=dtype)
  zero = lambda linear: linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
  zero(model.blocks.o), zero(model.blocks.mlp.down)
  expected = jax.jit(lambda m: m(TOKENS))(model)
  np.testing.assert_allclose(
    run(model, layers=6, iterations=1, surrogate="streams"), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype]
  )

  @jax.jit
  def from_spread_streams(m):
    _, trace, side = m.trace(TOKENS)
    spread = trace[1] + jax.random.normal(jax.random.key(0), trace[1].shape, dtype)
    one = lambda surrogate: snlp.solve(m, spread, side, layers=4, iterations=1, surrogate=surrogate).trace[-1]
    return sequential(m, spread, side, start=2)[0], one("streams"), one("identity")

  chain, streams, identity = from_spread_streams(model)
  np.testing.assert_allclose(streams, chain, rtol=CLOSE[dtype], atol=CLOSE[dtype])
  assert float(jnp.abs(identity - chain).max()) > 0.1


def test_stream_transitions_never_expand():
  model = random_model(CONFIGS["mhc"])
  side = traced(model)[2]
  a = np.asarray(snlp.stream_transition(side, snlp_suffix.plain(model, 4)))
  assert a.shape == (4, 4, 4)
  np.testing.assert_allclose(a.sum(-2), 1, atol=1e-6)


@pytest.mark.parametrize("stride, count", [(3, 17), (6, 9), (0, 3)])
def test_the_regulariser_counts_the_published_terms(stride, count):
  """8x the weight of v2 in v1: 17 terms at stride 3, 9 at stride 6 for n in {8, 16, 24}."""
  assert sum(len(snlp.penalised(n, stride)) for n in (8, 16, 24)) == count


@pytest.mark.parametrize("name, surrogate", [("nanochat", "identity"), ("mhc", "streams"), ("mhc_dynamic", "streams")])
def test_the_regulariser_is_the_error_of_one_newton_step(name, surrogate):
  """Whether or not gradients reach the target."""
  options = dict(layers=(3, 6), stride=2, surrogate=surrogate)

  @jax.jit
  def both(m):
    trace = m.trace(TOKENS)
    errors = {n: snlp.trace_error(m, TOKENS, layers=n, iterations=1, surrogate=surrogate) for n in (3, 6)}
    return [snlp.regulariser(m, *trace, detach_target=detach, **options) for detach in (False, True)], errors

  values, errors = both(random_model(CONFIGS[name]))
  expected = sum(float(of[j]) for n, of in errors.items() for j in snlp.penalised(n, 2))
  np.testing.assert_allclose(values, [expected] * 2, rtol=1e-4)


def test_the_regulariser_vanishes_when_branches_ignore_their_input(dtype):
  """Layers that add a constant: one step is exact. Here: no branch at all."""
  model = random_model(CONFIGS["llama"], dtype=dtype)
  for linear in (model.blocks.o, model.blocks.mlp.down):
    linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
  assert float(regulariser(model, *traced(model), layers=(4,), stride=1)) == 0.0


def test_gradient_reaches_target_and_input_unless_they_are_detached():
  model = random_model(CONFIGS["llama"])
  h0, trace, side = traced(model)

  def largest_gradient(at, **how):
    value = lambda state: snlp.regulariser(model, h0, trace.at[at].set(state), side, layers=(3,), stride=0, **how)
    return float(jnp.abs(jax.jit(jax.grad(value))(trace[at])).max())

  for at, switch in ((-1, "detach_target"), (2, "detach_input")):  # h_L and h_S
    assert largest_gradient(at) > 0
    assert largest_gradient(at, **{switch: True}) == 0
  with jax.enable_x64(True):
    model = random_model(CONFIGS["llama"], dtype="float64")
    h0, trace, side = traced(model, attention=plain_attention)
    options = dict(layers=(2, 5), stride=2, attention=plain_attention)
    whole = lambda t, remat=False: snlp.regulariser(model, h0, t, side, remat=remat, **options)
    check_grads(jax.jit(whole), (trace,), order=1, modes=["rev"], atol=1e-4, rtol=1e-4)
    kept, again = (jax.jit(jax.grad(functools.partial(whole, remat=remat)))(trace) for remat in (False, True))
    np.testing.assert_allclose(again, kept, rtol=1e-9, atol=1e-12)


def by_groups_or_not(hyper, surrogate, differentiate):
  """(regulariser, its gradient) without and with remat, compiled, and what they are given: a suffix of two groups and
  one of no whole number of them; windows and value embeddings in every group."""
  model = random_model(nanochat(depth=8, aspect_ratio=4, head_dim=16, vocab_size=64, context=512, hyper=hyper))
  options = dict(layers=(8, 3), stride=4, surrogate=surrogate)
  trace = jax.jit(lambda m: m.trace(random_tokens(8, 16)))(model)

  def compiled(remat):
    value = lambda m, h0, states, side: snlp.regulariser(m, h0, states, side, remat=remat, **options)
    return jax.jit(jax.value_and_grad(value) if differentiate else value).lower(model, *trace).compile()

  return compiled(False), compiled(True), (model, *trace)


@pytest.mark.parametrize("hyper, surrogate", [(None, "identity"), (HyperConnections(), "streams")])
def test_blocks_taken_by_groups_give_the_same_gradient_in_less_memory(hyper, surrogate):
  kept, again, given = by_groups_or_not(hyper, surrogate, differentiate=True)
  for a, b in zip(jax.tree.leaves(again(*given)), jax.tree.leaves(kept(*given)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
  assert again.memory_analysis().temp_size_in_bytes < 0.8 * kept.memory_analysis().temp_size_in_bytes


def test_blocks_taken_by_groups_keep_their_dynamic_mixing():
  kept, again, given = by_groups_or_not(HyperConnections(dynamic=True), "streams", differentiate=False)
  np.testing.assert_allclose(again(*given), kept(*given), rtol=1e-5)


def test_the_last_layer_quirk_leaves_the_prefix_sum_out():
  model = random_model(CONFIGS["llama"])
  h0, trace, side = traced(model)
  options = dict(layers=(4,), stride=0)
  quirk = regulariser(model, h0, trace, side, idn_last_layer_only=True, **options)
  alone = jax.jit(lambda m: sequential(m, trace[1], side, start=5)[0])(model)
  error = jnp.linalg.norm(alone - trace[-1], axis=-1) / jnp.linalg.norm(trace[-1], axis=-1)
  np.testing.assert_allclose(quirk, error.mean(), rtol=1e-4)
  assert abs(float(quirk - regulariser(model, h0, trace, side, **options))) > 1e-3


def test_drawing_one_suffix_a_step_is_unbiased():
  model = random_model(CONFIGS["llama"])
  h0, trace, side = traced(model)
  options = dict(layers=(2, 4, 6), stride=2)
  draw = jax.jit(lambda key: snlp.regulariser(model, h0, trace, side, key=key, **options))
  seen = {round(float(draw(jax.random.key(i))), 4) for i in range(20)}
  each = [3 * float(regulariser(model, h0, trace, side, layers=(n,), stride=2)) for n in (2, 4, 6)]
  np.testing.assert_allclose(sorted(seen), sorted(each), rtol=1e-3)


def test_the_weight_comes_in_linearly():
  weights = [float(snlp.regulariser_weight(jnp.int32(s), weight=0.5, steps=100)) for s in (0, 10, 20, 80)]
  np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.5])


def test_power_iteration_finds_the_norm_of_a_linear_block():
  """Without branches the blocks are lambda_l z (+ mu x0): the norm is lambda_l."""
  model = random_model(CONFIGS["nanochat"])
  for linear in (model.blocks.o, model.blocks.mlp.down):
    linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
  norms = jax.jit(lambda m: snlp.jacobian_norms(m, TOKENS, jax.random.key(0)))(model)
  np.testing.assert_allclose(norms, jnp.abs(model.blocks.residual_lambda[...]), rtol=1e-3)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(layers=7, iterations=1), "is 7; it must lie in 1..6"),
    (dict(layers=3, iterations=0), "iterations is 0"),
    (dict(layers=3, iterations=1, surrogate="magic"), "surrogate is 'magic'"),
    (dict(layers=3, iterations=1, initial="cold"), "initial is 'cold'"),
    (dict(layers=3, iterations=1, surrogate="streams"), "needs hyper-connections"),
    (dict(layers=3, iterations=1, surrogate="scaled"), "needs residual lambdas"),
  ],
)
def test_impossible_requests_are_named(options, message):
  with pytest.raises(InputError, match=message):
    snlp.forward(random_model(CONFIGS["llama"]), TOKENS, **options)


def test_a_given_start_must_have_the_shape_of_the_trace():
  model = random_model(CONFIGS["llama"])
  _, trace, side = traced(model)
  with pytest.raises(InputError, match="initial trace has shape"):
    snlp.solve(model, trace[1], side, layers=4, iterations=1, initial=trace[3:])


def test_fine_tuning_goes_through_all_iterations():
  """Remat changes no gradient, the loss counts the given targets alone, and a few steps lower it."""
  model = random_model(CONFIGS["llama"])
  batch = {"inputs": TOKENS, "targets": jnp.roll(TOKENS, -1, axis=1).at[:, :8].set(-1)}
  options = dict(layers=4, iterations=2)

  def written_out(m):
    p = jax.nn.log_softmax(snlp.forward(m, TOKENS, **options))[:, 8:]
    return -jnp.mean(jnp.take_along_axis(p, batch["targets"][:, 8:, None], -1))

  loss = lambda m: snlp.finetuning_loss(m, batch, **options)[0]
  (value, gradient), (expected, plain) = (jax.jit(jax.value_and_grad(f))(model) for f in (loss, written_out))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  chex.assert_trees_all_close(gradient, plain, rtol=2e-3, atol=1e-6)
  stepped = jax.tree.map(lambda p, g: p - 0.02 * g, model, gradient)
  assert float(jax.jit(loss)(stepped)) < float(value)
