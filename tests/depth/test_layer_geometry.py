import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from configs import layer_geometry as config_file
from experiments import layer_geometry as experiment
from experiments import results
from experiments.console import Console
from experiments.layer_geometry import decomposition, interventions, speed, subjects
from experiments.results import Claim
from jaxlab.core.checks import InputError
from jaxlab.data.tokens import Tokens
from jaxlab.depth import layer_geometry, layer_geometry_classes, snlp
from jaxlab.models import HNet, HNetConfig, Mamba2, Mamba2Config, hub
from jaxlab.models.transformer import sequential
from tests.common import Whole, configs, random_model, random_tokens

geometry, classes = Whole(layer_geometry), Whole(layer_geometry_classes)
CONFIGS = configs() | {"mamba": Mamba2Config(vocab_size=64, depth=3, width=32, head_dim=16, state=8, chunk=4)}
ROOT = Path(__file__).parents[2]
TOKENS = random_tokens(2, 10)
D, N, K = 16, 512, 40
logits = jax.jit(lambda model, tokens: model(tokens))


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def fitted(name, layer, *, reference=None, **options):
  """(T(x), y, x) of a local class on held-out tokens of a known layer, in float64."""
  x_reference, x = draw(N, D) if reference is None else reference, draw(20, D, seed=1)
  index, weight = classes.neighbours(x_reference, x, k=K)
  t = classes.apply_local(name, x_reference, layer(x_reference), x, index, weight, ridge=1e-8, **options)
  return np.asarray(t), np.asarray(layer(x)), np.asarray(x)


def error(name, layer, **options):
  t, y, x = fitted(name, layer, **options)
  return np.linalg.norm(y - t) / np.linalg.norm(y - x)


def rotation(size=D, seed=2):
  return jnp.linalg.qr(draw(size, size, seed=seed))[0]


def test_every_local_class_recovers_a_layer_of_its_own_kind():
  """The ridge goes to zero, the evaluation tokens are new."""
  with jax.enable_x64(True):
    gains, (a, b) = 1 + draw(D, seed=3), (draw(D, 4, seed=4), draw(4, D, seed=5))
    low = lambda x: x + x @ a @ b
    q = rotation()
    assert error("diagonal", lambda x: gains * x) < 1e-4
    assert error("low_rank", low, rank=4) < 1e-4 and error("low_rank", low, rank=16) < 1e-4
    assert error("low_rank", low, rank=2) > 0.3
    assert error("orthogonal", lambda x: x @ q.T) < 1e-4
    assert error("scaled_orthogonal", lambda x: 1.7 * x @ q.T) < 1e-4
    assert error("orthogonal", lambda x: 1.7 * x @ q.T) > 0.1
    assert error("diagonal", low) > 0.3


def test_without_a_strong_fit_every_local_class_is_the_identity():
  """The ridge pulls towards T(x) = x, not towards zero, with fewer neighbours than dimensions too."""
  x_reference, x = draw(60, D), draw(5, D, seed=1)
  y = x_reference @ rotation() * 3
  index, weight = classes.neighbours(x_reference, x, k=4)
  for name in ("diagonal", "low_rank", "orthogonal"):
    near = (x[0], x_reference[index[0]], y[index[0]], weight[0])
    fit = jax.jit(functools.partial(classes.LOCAL[name], ridge=1e9))
    np.testing.assert_allclose(fit(*near), x[0], atol=1e-4)


def test_orthogonal_maps_keep_norms_and_leave_the_complement_alone():
  """k < D: Q is the identity outside the span of the neighbours and their images, and an isometry everywhere."""
  near, target, weight = draw(3, D), draw(3, D, seed=1), jnp.ones(3)
  x = draw(D, seed=2)
  basis = jnp.linalg.qr(jnp.concatenate([near, target]).T)[0]
  outside = x - basis @ (basis.T @ x)
  np.testing.assert_allclose(classes.orthogonal(outside, near, target, weight), outside, rtol=1e-4, atol=1e-5)
  turned = classes.orthogonal(x, near, target, weight)
  np.testing.assert_allclose(jnp.linalg.norm(turned), jnp.linalg.norm(x), rtol=1e-4)
  assert jnp.linalg.norm(turned - x) > 0.1


def test_gram_schmidt_spans_the_columns_and_drops_what_depends_on_others():
  a = draw(D, 5)
  a = jnp.stack([a[:, 0], a[:, 1], 2 * a[:, 0] - a[:, 1], 1e-3 * a[:, 2] + a[:, 0], jnp.zeros(D)], axis=1)
  basis = jax.jit(classes.orthonormal)(a)
  np.testing.assert_allclose(basis.T @ basis, jnp.diag(jnp.array([1.0, 1, 0, 1, 0])), atol=1e-5)
  np.testing.assert_allclose(basis @ (basis.T @ a), a, atol=1e-5)


def test_polar_is_the_orthogonal_factor_of_scipy():
  with jax.enable_x64(True):
    a = draw(12, 12) @ jnp.diag(10.0 ** jnp.linspace(-4, 0, 12)) @ draw(12, 12, seed=1)
    np.testing.assert_allclose(classes.polar(a), scipy.linalg.polar(np.asarray(a))[0], atol=1e-8)


def test_low_rank_is_the_primal_ridge_solution_truncated():
  """Dual form and Gram decomposition against the D x D normal equations and a full SVD, with weights."""
  with jax.enable_x64(True):
    near, target, x = draw(10, D), draw(10, D, seed=1), draw(D, seed=2)
    weight = jnp.linspace(0.2, 1, 10)
    w = np.sqrt(np.asarray(weight))[:, None]
    inputs, increments = w * near, w * (target - near)
    lam = 0.05 * np.sum(np.square(inputs)) / 10
    b = np.linalg.solve(inputs.T @ inputs + lam * np.eye(D), inputs.T @ increments).T
    v = np.linalg.svd(inputs @ b.T)[2][:3].T
    ours = classes.low_rank(x, near, target, weight, rank=3, ridge=0.05)
    np.testing.assert_allclose(ours, x + v @ (v.T @ (b @ x)), rtol=1e-8, atol=1e-10)


def test_context_is_what_no_tokenwise_class_has():
  """y_i = x_i + mean_{j <= i} x_j."""
  x = draw(34, 24, D)
  mean = classes.prefix_mean(x)
  np.testing.assert_allclose(mean[3, 5], x[3, :6].mean(axis=0), rtol=1e-4, atol=1e-6)
  # Late positions: there the token itself hardly counts in the mean.
  cut = lambda a, rows: a[rows, 12:].reshape(-1, D)
  x_r, u_r, x_e, u_e = (cut(a, rows) for rows in (slice(30), slice(30, 34)) for a in (x, mean))
  c_r, c_e = cut(mean, slice(30)), cut(mean, slice(30, 34))
  index, weight = classes.neighbours(x_r, x_e, k=K)
  increments = {
    name: np.asarray(classes.apply_local(name, x_r, x_r + u_r, x_e, index, weight) - x_e)
    for name in ("low_rank", "orthogonal")
  } | {
    "affine": classes.apply_affine(classes.fit_affine(x_r, u_r), x_e),
    "mlp": classes.apply_mlp(
      jax.jit(lambda x, u: classes.fit_mlp(x, u, jax.random.key(0), steps=100, batch=64))(x_r, u_r), x_e
    ),
  }
  for name, t in increments.items():
    assert geometry.fvu(u_e, t) > 0.7, name
  both = lambda *parts: jnp.concatenate(parts, axis=1)
  t = classes.apply_affine(classes.fit_affine(both(x_r, c_r), u_r, ridge=1e-6), both(x_e, c_e))
  assert geometry.fvu(u_e, t) < 1e-4


def silenced(config, part):
  model = random_model(config)
  linear = model.blocks.o if part == "attention" else model.blocks.mlp.down
  linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
  return model


def test_a_block_without_attention_is_tokenwise():
  """An MLP explains it and replacing it does little; attention alone it does not."""
  # A block's MLP that the class, one hidden layer of the model's width, has room for.
  narrow = dataclasses.replace(CONFIGS["llama"], depth=2, mlp_width=8)
  tokens, held = random_tokens(48, 24), random_tokens(4, 24, seed=9)
  fvu, kl = {}, {}
  for part in ("attention", "mlp"):
    model = silenced(narrow, part)
    (x, y), (x_e, y_e) = (geometry.collect(model, t) for t in (tokens, held))
    flat = lambda a: a[0].reshape(-1, a.shape[-1])
    fit = jax.jit(lambda x, u: classes.fit_mlp(x, u, jax.random.key(0), steps=2000, batch=128, rate=3e-3))
    t = classes.apply_mlp(fit(flat(x), flat(y - x)), flat(x_e))
    fvu[part] = float(geometry.fvu(flat(y_e - x_e), t))
    out = geometry.intervene(model, held, (flat(x_e) + t).reshape(y_e[0].shape), layer=0)
    nothing = geometry.intervene(model, held, x_e[0], layer=0)
    kl[part] = float(out["all_tokens"]["kl"].mean() / nothing["all_tokens"]["kl"].mean())
  assert fvu["attention"] < 0.02 and fvu["mlp"] > 0.5
  assert kl["attention"] < 0.05 and kl["mlp"] > 0.3


def test_alignment_of_a_least_squares_fit_is_a_function_of_r2():
  """cos^2(u, t) + cos^2(u, r) = 1 and cos(r, t) = 0 over flattened tokens, N3."""
  with jax.enable_x64(True):
    x, u = draw(N, D), draw(N, D, seed=1) + draw(N, D) * 0.5
    t = x @ jnp.linalg.lstsq(x, u)[0]
    flat = lambda a: a.reshape(1, -1)
    figures = geometry.geometry(flat(u), flat(t), jnp.eye(N * D)[:, :1])
    squares = figures["cos_ut"] ** 2 + figures["cos_ur"] ** 2
    np.testing.assert_allclose(squares, 1, atol=1e-5)
    np.testing.assert_allclose(figures["cos_rt"], 0, atol=1e-7)
    np.testing.assert_allclose(figures["cos_ut"][0], jnp.sqrt(geometry.explained(u, t)), atol=1e-7)


@pytest.mark.parametrize("name", ["nanochat", "mhc"])
def test_the_error_of_one_idn_step_is_the_input_dependence_of_the_updates(name):
  """z_{j+1} = h_S + sum v_i, and z_{j+1} - h_{S+j+1} = sum (v_i - u_i), i <= j."""
  model, n = random_model(CONFIGS[name]), 3
  u, v = jax.jit(lambda m, t: geometry.frozen_updates(m, t, layers=n, skip=2))(model, TOKENS)

  @jax.jit
  def one_step(model, tokens):
    _, trace, side = model.trace(tokens)
    return trace, snlp.solve(model, trace[-n - 1], side, layers=n, iterations=1).trace

  trace, z = one_step(model, TOKENS)
  cut = lambda a: a.reshape(*a.shape[:3], -1)[:, :, 2:]
  np.testing.assert_allclose(cut(z[:1]) + jnp.cumsum(v, axis=0), cut(z[1:]), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(jnp.cumsum(v - u, axis=0), cut(z[1:] - trace[-n:]), atol=1e-4)
  np.testing.assert_allclose(v[0], u[0], atol=1e-5)
  assert float(jnp.abs(v[1:] - u[1:]).max()) > 1e-2


def test_frozen_updates_of_a_state_space_network_are_its_blocks_on_the_suffixs_input():
  model = random_model(CONFIGS["mamba"])
  u, v = geometry.frozen_updates(model, TOKENS, layers=2, skip=0)
  x, y = geometry.collect(model, TOKENS, skip=0)
  np.testing.assert_allclose(u, (y - x)[1:], atol=1e-5)
  np.testing.assert_allclose(v[0], u[0], atol=1e-5)
  last = jax.jit(lambda blocks, x: jax.tree.map(lambda a: a[2], blocks)(x))
  np.testing.assert_allclose(v[1], last(model.blocks, x[1]) - x[1], atol=1e-5)


@functools.partial(jax.jit, static_argnames="layer")
def rewritten(model, new, *, layer):
  """The logits with other outputs of one layer from the fifth position on, by a plain forward."""
  if isinstance(model, Mamba2):
    state = model.embed(TOKENS)
    for i in range(model.depth):
      state = jax.tree.map(lambda a: a[i], model.blocks)(state)  # noqa: B023 (used at once)
      state = state.at[:, 4:].set(new) if i == layer else state
    return model.logits(state)
  x, side, _ = model.embed(TOKENS)
  state, backout, _, _ = sequential(model, x, side, stop=layer + 1)
  changed = state.at[:, 4:].set(new.reshape(state[:, 4:].shape))
  final, later, _, _ = sequential(model, changed, side, start=layer + 1)
  middle = model.depth // 2
  read = later if middle > layer else changed if middle == layer else backout
  return model.logits(final, read if model.config.backout else None)


@pytest.mark.parametrize("name, layers", [("nanochat", (2, 3, 5)), ("mhc", (1,)), ("qwen3", (1,)), ("mamba", (0, 2))])
def test_single_token_interventions_in_one_pass_are_one_forward_each(name, layers):
  """Against replacing one position and running the rest of the network, before, at and after the backout layer."""
  model, position = random_model(CONFIGS[name]), 7
  _, y = geometry.collect(model, TOKENS)
  intervene = jax.jit(layer_geometry.intervene)  # the layer is traced: one program for all
  expected = jax.nn.log_softmax(logits(model, TOKENS))[:, position]
  for layer in layers:
    written = y[layer] + 0.3 * jax.random.normal(jax.random.key(layer), y[layer].shape)
    out = intervene(model, TOKENS, written, layer=layer)
    alone = y[layer].at[:, position - geometry.SKIP].set(written[:, position - geometry.SKIP])
    for mode, new in (("single_token", alone), ("all_tokens", written)):
      actual = jax.nn.log_softmax(rewritten(model, new, layer=layer))[:, position]
      kl = jnp.sum(jnp.exp(expected) * (expected - actual), axis=-1)
      np.testing.assert_allclose(out[mode]["kl"][:, position - 4], kl, rtol=1e-3, atol=1e-6)
    entropy = -jnp.sum(jnp.exp(expected) * expected, axis=-1)
    np.testing.assert_allclose(out["entropy"][:, position - 4], entropy, rtol=1e-4)


def test_writing_back_the_layers_own_output_changes_nothing_and_larger_doses_change_more():
  """T = f gives KL 0; mean KL grows with the share removed."""
  model = random_model(CONFIGS["llama"])
  x, y = geometry.collect(model, TOKENS)
  for layer in (2, 5):
    out = geometry.intervene(model, TOKENS, y[layer], layer=layer)
    for mode in geometry.MODES:
      assert float(out[mode]["kl"].max()) < 1e-5 and float(out[mode]["logits"].max()) < 1e-4
      assert float(out[mode]["flip"].sum()) == 0
  r = y[2] - x[2]
  doses = [geometry.intervene(model, TOKENS, y[2] - a * r, layer=2) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
  for mode in geometry.MODES:
    assert np.all(np.diff([float(out[mode]["kl"].mean()) for out in doses]) > 0)


def test_the_input_of_a_block_with_residual_lambdas_is_the_rescaled_one():
  """Without branches u = 0, though the stream is rescaled and mixed with x0."""
  model = silenced(CONFIGS["nanochat"], "attention")
  model.blocks.mlp.down.weight.set_value(jnp.zeros_like(model.blocks.mlp.down.weight.get_value()))
  x, y = geometry.collect(model, TOKENS)
  np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert not np.allclose(x[1], y[0], atol=1e-2)
  assert x.shape == (6, 2, 10 - geometry.SKIP, 48) and x.dtype == jnp.float32


def test_traces_of_bfloat16_models_are_computed_in_float32():
  model = random_model(CONFIGS["llama"], dtype="bfloat16")
  # Not compiled here, where XLA may keep more digits than bfloat16 by itself.
  _, y = layer_geometry.collect(model, TOKENS)
  assert y.dtype == jnp.float32 and not np.array_equal(y, y.astype(jnp.bfloat16).astype(jnp.float32))


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.integers(0, 1000))
def test_spearman_is_scipys_with_ties(values, seed):
  other = np.random.default_rng(seed).integers(0, 4, len(values))
  np.testing.assert_allclose(geometry.ranks(jnp.array(values)), scipy.stats.rankdata(values))
  if len(set(values)) > 1 and len(set(other)) > 1:
    expected = scipy.stats.spearmanr(values, other).statistic
    np.testing.assert_allclose(geometry.spearman(jnp.array(values), jnp.array(other)), expected, atol=1e-5)


def test_partial_spearman_removes_a_common_cause():
  cause, first, second = draw(2000), draw(2000, seed=1), draw(2000, seed=2)
  a, b = cause + 0.3 * first, cause + 0.3 * second
  assert geometry.spearman(a, b) > 0.8 and abs(geometry.partial_spearman(a, b, [cause])) < 0.1
  direct = geometry.partial_spearman(first, first + 0.1 * second, [cause])
  assert direct > 0.9


def test_the_dominant_subspace_is_orthonormal_and_holds_most_energy():
  """E(t) >= E(random) = q / D, and no other q directions hold more."""
  t = draw(N, D) * jnp.linspace(0.2, 3, D) @ rotation()
  basis = geometry.dominant_subspace(t, dimensions=4)
  np.testing.assert_allclose(basis.T @ basis, jnp.eye(4), atol=1e-5)
  np.testing.assert_allclose(jnp.abs(basis.T @ np.linalg.svd(t)[2][:4].T), jnp.eye(4), atol=1e-3)
  held = jnp.sum((t @ basis) ** 2) / jnp.sum(t**2)
  random = geometry.isotropic(jax.random.key(0), jnp.zeros((4000, D)) + 1)
  figures = geometry.geometry(random, random, basis)
  np.testing.assert_allclose(figures["in_u"].mean(), 4 / D, atol=0.02)
  assert held > 4 / D
  singular = np.linalg.svd(t)[1] ** 2
  assert int(geometry.effective_dimensions(t)) == 1 + int(np.sum(np.cumsum(singular) < 0.95 * singular.sum()))


@given(st.integers(0, 10_000))
def test_cosines_and_energies_are_bounded(seed):
  u, t = draw(9, D, seed=seed), draw(9, D, seed=seed + 1)
  u, t = u.at[0].set(0), t.at[1].set(0)
  figures = geometry.geometry(u, t, geometry.dominant_subspace(t, dimensions=3))
  for name, values in figures.items():
    assert np.all(np.isfinite(values)), name
    if name.startswith("in_"):
      assert np.all(values >= 0) and np.all(values <= 1 + 1e-5)
  np.testing.assert_allclose(np.cos(np.radians(figures["angle_ur"])), figures["cos_ur"], atol=1e-3)
  assert float(figures["cos_ut"][0]) == 0 and float(figures["cos_ut"][1]) == 0
  whole = geometry.geometry(u, t, jnp.eye(D))
  np.testing.assert_allclose(whole["in_r"], 1, rtol=1e-4)
  np.testing.assert_allclose(geometry.fvu(u, u), 0, atol=1e-6)


def test_a_common_mean_inflates_cosines_and_is_taken_out():
  mean = 20 * jnp.ones(D)
  u, t = mean + draw(50, D), mean + draw(50, D, seed=1)
  basis = geometry.dominant_subspace(t, dimensions=1)
  assert geometry.geometry(u, t, basis)["cos_ut"].mean() > 0.95
  assert abs(geometry.geometry(u, t, basis, mean=mean)["cos_ut"].mean()) < 0.1


def test_noise_has_the_norm_of_r_and_is_orthogonal_to_t():
  r, t = draw(30, D), draw(30, D, seed=1)
  noise = geometry.orthogonal_noise(jax.random.key(0), r, t)
  np.testing.assert_allclose(jnp.linalg.norm(noise, axis=1), jnp.linalg.norm(r, axis=1), rtol=1e-5)
  np.testing.assert_allclose(jnp.sum(noise * t, axis=1), 0, atol=1e-4)


def test_neighbours_are_those_of_brute_force_and_never_the_token_itself():
  reference, queries = draw(300, D), draw(20, D, seed=1)
  unit = lambda a: np.asarray(a) / np.sqrt(np.mean(np.square(a), axis=1, keepdims=True))
  distance = np.linalg.norm(unit(queries)[:, None] - unit(reference), axis=2)
  index, weight = classes.neighbours(reference, queries, k=7)
  np.testing.assert_array_equal(index, np.argsort(distance, axis=1)[:, :7])
  nearest = np.sort(distance, axis=1)[:, :7]
  expected = np.exp(-(nearest**2) / (2 * np.median(nearest, axis=1, keepdims=True) ** 2))
  np.testing.assert_allclose(weight, expected, rtol=1e-3)
  own = jnp.arange(20)
  assert np.all(np.asarray(classes.neighbours(reference, reference[:20], k=1)[0][:, 0]) == own)
  assert not np.any(np.asarray(classes.neighbours(reference, reference[:20], k=7, own=own)[0]) == own[:, None])


def test_no_document_is_in_both_parts_and_rows_are_its_text():
  lengths = np.random.default_rng(0).integers(10, 300, 40)
  tokens = Tokens(np.arange(lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]), bos=10**6)
  config = config_file.get_config("test")
  for seed in range(3):
    rows = subjects.split_rows(tokens, config, seed)
    (reference, used), (evaluation, held) = rows["reference"], rows["evaluation"]
    assert not set(used) & set(held)
    assert reference.shape == (8, 24) and evaluation.shape == (4, 24) and np.all(reference[:, 0] == 10**6)
    for row, document in zip(evaluation, held, strict=True):
      assert np.all(np.diff(row[1:]) == 1) and np.isin(row[1:], tokens.document(document)).all()
  with pytest.raises(InputError, match="only 0 documents have 999 tokens"):
    config.data.row = 1000
    subjects.split_rows(tokens, config, 0)


def test_documents_are_resampled_whole():
  documents = np.repeat([0, 1, 2], 50)
  values = documents.astype(float)
  low, high = layer_geometry.document_bootstrap(lambda i: values[i].mean(), documents, resamples=300)
  assert low < 0.4 and high > 1.6  # tokens drawn one by one would stay within 0.9 .. 1.1
  assert layer_geometry.document_bootstrap(lambda i: float(len(i)), documents) == (150.0, 150.0)


def test_ridge_lookup_and_mlp_do_what_they_say():
  with jax.enable_x64(True):
    x, w, b = draw(200, 5), draw(5, 3, seed=1), draw(3, seed=2)
    weights, bias = classes.fit_affine(x, x @ w + b, ridge=1e-10)
    np.testing.assert_allclose(weights, w, atol=1e-6)
    np.testing.assert_allclose(bias, b, atol=1e-6)
    gradient = lambda v: jnp.sum((x @ v + b - (x @ v + b).mean(0) - (x - x.mean(0)) @ w) ** 2)
    ridge = classes.fit_affine(x, x @ w, ridge=0.1)[0]
    lam = 0.1 * jnp.sum((x - x.mean(axis=0)) ** 2) / 5
    slope = jax.grad(lambda v: gradient(v) + lam * jnp.sum(v**2))(ridge)
    np.testing.assert_allclose(slope, 0, atol=1e-8)
  table = classes.fit_lookup(jnp.array([0, 0, 2]), jnp.array([[1.0], [3.0], [8.0]]), vocab=4)
  np.testing.assert_allclose(table[:, 0], [2, 4, 8, 4])
  x = draw(300, D)
  u = jnp.zeros_like(x).at[:, :4].set(100 * jnp.tanh(classes.unit_rms(x)[:, :4]))
  fit = jax.jit(lambda steps_rate: classes.fit_mlp(x, u, jax.random.key(0), steps=1000, batch=64, rate=3e-3))
  params = fit(0)
  assert geometry.fvu(u, classes.apply_mlp(params, x)) < 0.1
  np.testing.assert_allclose(classes.apply_mlp(params, x), classes.apply_mlp(params, 5 * x), rtol=1e-3, atol=1e-2)


def test_early_stopping_keeps_the_identity_where_nothing_generalises():
  """Increments of pure noise: training only makes the held-out error worse, so T stays the identity."""
  x, u = draw(60, D), draw(60, D, seed=1)
  params = jax.jit(lambda: classes.fit_mlp(x, u, jax.random.key(0), steps=200, batch=54, rate=1e-2))()
  assert float(jnp.mean(classes.apply_mlp(params, x[-6:]) ** 2)) < 0.5 * float(jnp.mean(u**2))


def test_prior_measures():
  with jax.enable_x64(True):
    x = draw(N, D)
    np.testing.assert_allclose(geometry.linearity(x, 3 * x @ draw(D, D, seed=1) + 7), 1, atol=1e-8)
    assert geometry.linearity(x, draw(N, D, seed=2)) < 0.1
    centred, y = x - x.mean(axis=0), draw(N, D, seed=2) + x
    target = (y - y.mean(axis=0)) / jnp.linalg.norm(y - y.mean(axis=0))
    residual = target - centred @ jnp.linalg.lstsq(centred, target)[0]
    np.testing.assert_allclose(geometry.linearity(x, y), 1 - jnp.sum(residual**2), atol=1e-8)
    np.testing.assert_allclose(geometry.block_influence(x, 2 * x), 0, atol=1e-10)
    np.testing.assert_allclose(geometry.block_influence(x, -x), 2, atol=1e-10)


@pytest.mark.parametrize("name", ["nanochat", "mhc"])
def test_the_lens_is_exact_where_the_rest_of_the_network_is_affine(name):
  """Blocks without branches: what the head reads is a linear function of any layer's input."""
  model = random_model(CONFIGS[name])
  for linear in (model.blocks.o, model.blocks.mlp.down):
    linear.weight.set_value(jnp.zeros_like(linear.weight.get_value()))
  pairs = geometry.collect(model, random_tokens(24, 24))
  far = geometry.collect(random_model(CONFIGS[name], seed=3), random_tokens(24, 24))
  lens = jax.jit(lambda model, pairs, ridge: geometry.affine_lens(model, pairs, pairs, layer=3, ridge=ridge))
  exact = float(lens(model, pairs, 1e-6).mean())
  assert exact < 1e-3 and float(lens(model, (far[0], pairs[1]), 1e-6).mean()) > 100 * exact


def test_numpy_agrees_with_the_low_rank_class():
  bench = config_file.get_config("test").bench
  assert all(row["difference"] < 1e-3 for row in speed.time_fits(bench).values())


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: geometry.collect(m, TOKENS, skip=10), "rows have 10 tokens of which 10 are skipped"),
    (lambda m: geometry.collect("gpt2", TOKENS), "needs a Transformer or Mamba2 with stacked blocks, not str"),
    (lambda m: geometry.intervene(m, TOKENS, TOKENS, layer=6), "layer is 6; it must lie in 0..5"),
    (lambda m: geometry.intervene(m, TOKENS, jnp.zeros((2, 6, 3)), layer=0), r"layer 0 writes \(2, 6, 32\)"),
    (lambda m: geometry.dominant_subspace(draw(5, D), dimensions=17), "subspace has 17 dimensions; .* 1..16"),
    (lambda m: classes.neighbours(draw(5, D), draw(5, D), k=5, own=jnp.arange(5)), "k is 5 neighbours; .* 1..4"),
    (
      lambda m: classes.apply_local("deep", *[draw(5, D)] * 3, jnp.zeros((5, 2), int), None),
      "tokenwise class is 'deep'",
    ),
    (
      lambda m: classes.apply_local("low_rank", *[draw(5, D)] * 3, jnp.zeros((5, 2), int), None, rank=3),
      "rank is 3; it must lie in 1..2",
    ),
    (lambda m: classes.fit_mlp(draw(5, D), draw(5, D), jax.random.key(0)), "needs 10 tokens and a step; it got 5"),
  ],
)
def test_impossible_requests_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call(random_model(CONFIGS["llama"]))


def test_a_fit_that_overshoots_exceeds_no_null():
  """u + 2 noise: R^2 is negative and cos(u, t) - cos(r, t) 1.3, but t says of u what its direction says and no more."""
  random = np.random.default_rng(0)
  u, noise = random.normal(size=(2, 3000, D))
  basis, documents = jnp.eye(D)[:, :4], np.repeat(np.arange(30), 100)

  def nulls(t):
    cosines = [
      geometry.geometry(jnp.asarray(v), t, basis) for v in (u, t + geometry.isotropic(jax.random.key(0), u - t))
    ]
    return decomposition.compare_nulls(*jax.tree.map(np.asarray, cosines), u, np.asarray(t), documents, resamples=50)

  over = nulls(jnp.asarray(u + 2 * noise))
  assert over["gap"] - over["curve"] > 0.5 and over["curve"] == pytest.approx(5**-0.5, abs=0.02)
  assert over["alignment_over_curve"]["low"] < 0
  # Small updates that follow t and large ones that do not: tokens are more aligned than their R^2.
  size = np.where(np.arange(3000) % 2 == 0, 0.1, 10)[:, None]
  u = size * u
  honest = nulls(jnp.asarray(u + np.where(size < 1, 0.1, 2) * size * noise))
  assert honest["alignment_over_curve"]["low"] > 0.2
  assert honest["alignment_over_curve"]["low"] <= honest["alignment_over_curve"]["high"]


def test_a_map_that_learned_nothing_has_no_correlation_over_layers_and_stops_no_run():
  value = interventions.across({"relative_error": [1.0, 1.0], "single_token": {"kl": [0.1, 0.2]}})
  claim, metrics = (
    Claim("a", "", "higher", ours=1, threshold=0),
    {"models": {"base": {"across_layers": {"mlp": value}}}},
  )
  assert np.isnan(value)
  results.require_finite(results.Report(metrics, [claim], "", {}, experiment.UNDEFINED))


def test_the_experiment_runs_at_test_scale_and_measures_no_part_twice(tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.update(name="local_text", path=str(ROOT / "jaxlab"), split="train")  # soon tokenized
  run = lambda: results.evaluate(experiment, config, tmp_path / "run", tmp_path / "cache", Console(quiet=True))
  report = run()
  exact = next(claim for claim in report.claims if "writing a layer's own output back" in claim.name)
  assert exact.holds and len(report.figures) == 5 and "of 4 layers" in report.finding
  models = report.metrics["models"]
  assert list(models) == ["2 x 32", "Mamba-2 2 x 32", "2 x 32, untrained"]
  for model in models.values():
    assert set(model["classes"]) == set(experiment.CLASSES)
    assert model["classes"]["identity"]["r2"] == [0, 0] and model["classes"]["identity"]["cos_ut"] == [0, 0]
    assert len(model["interventions"]["mlp"]["single_token"]["spearman"]) == 2
    assert len(model["nulls"]["alignment_over_curve"]["low"]) == 2 and len(model["doses"]) == 5
  results.require_finite(report)
  for name in report.figures:
    assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
  monkeypatch.setattr(experiment, "measure_split", None)
  assert [c.ours for c in run().claims] == [c.ours for c in report.claims]
  for field, value, message in (
    ("classes", ("deep", "mlp"), "config.intervene.classes is 'deep'"),
    ("classes", ("low_rank",), "lacks 'mlp'"),
  ):
    with pytest.raises(InputError, match=message):
      config.intervene[field] = value
      run()


def test_the_experiment_measures_the_stacks_of_a_saved_h_net(tmp_path):
  """Of the sizes of the transformer above, whose programs it shares."""
  shape = HNetConfig("m2 [T1] m1", (32, 32), (0, 20), (0, 2), ratios=(3.0,), head_dim=16, state=4, chunk=8)
  hub.save(random_model(shape), tmp_path)
  config = config_file.get_config("test")
  config.model = str(tmp_path)
  config.data.update(name="local_text", path=str(ROOT / "jaxlab"), split="train")
  found = subjects.load(config, tmp_path, tmp_path / "cache", Console(quiet=True))
  assert list(found) == [f"{tmp_path.name}, {stack}" for stack in ("encoder 0", "main 1", "decoder 0")]
  name, load = next(iter(found.items()))
  measured = experiment.measure_split(config, *load(), name, 0, Console(quiet=True))
  assert set(measured["classes"]) == set(experiment.CLASSES) and len(measured["nulls"]["gap"]) == 2
  assert max(measured["doses"]["0"]["single_token"]) < 1e-5 < min(measured["doses"]["1"]["single_token"])
  other = jax.eval_shape(lambda: HNet(dataclasses.replace(shape, vocab_size=64), jax.random.key(0)))
  hub.save(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), other), tmp_path)
  with pytest.raises(InputError, match="a vocabulary of 64, not the 256 bytes"):
    subjects.load(config, tmp_path, tmp_path, Console(quiet=True))
