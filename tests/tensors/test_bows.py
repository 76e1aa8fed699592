import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.bows import get_config
from experiments import bows as experiment
from experiments import results
from experiments.bows import cities, months, synthetic, training, value_coding, words
from experiments.console import Console
from jaxlab.core.checks import InputError
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data


@functools.cache
def circular():
  return data.synthetic("circular")[:8000]


@functools.cache
def trained(latent, output="relu", seeds=2, decays=(0.0, 1.0, 6.0)):
  """Parameters by (decay, seed): algorithm B on circular data, 60 epochs."""
  bits = jnp.asarray(np.packbits(circular(), axis=1))
  options = dict(features=12, steps=60 * 31, batch=256, rate=1e-2, clip=1.0, every=31, bound=12**-0.5)
  params, _ = training.train_grid(bits, jnp.array(decays), latent=latent, output=output, seeds=seeds, **options)
  return params


def random_model(tied=True, features=20, latent=6, seed=0):
  params = bows.init_params(jax.random.key(seed), features=features, latent=latent, tied=tied, bound=1.0)
  return params | {"b": jax.random.normal(jax.random.key(seed + 1), (features,))}


def random_windows(rows=40, words=20, rate=0.3, seed=0):
  return (np.random.default_rng(seed).random((rows, words)) < rate).astype(np.float32)


@pytest.mark.parametrize("latent", [2, 6, 8])
def test_the_linear_autoencoder_finds_pca(latent):
  """loss within 5 %, W^T W a projector, b = (I - P) mean."""
  x = jnp.asarray(circular(), jnp.float32)
  params = training.pick(trained(latent, "linear", 1, (0.0,)), 0, 0)
  optimum = bows.pca(x)
  loss = bows.loss_function(params, x, output="linear")
  assert float(optimum.loss(latent)) * (1 - 1e-4) <= float(loss) <= 1.05 * float(optimum.loss(latent))
  p = bows.gram(params)
  assert float(jnp.linalg.norm(p @ p - p)) < 0.1
  np.testing.assert_allclose(params["b"], (jnp.eye(12) - p) @ x.mean(0), atol=0.02)


@pytest.mark.parametrize("latent", [2, 5, 12])
def test_the_pca_parameters_reach_the_pca_loss(latent):
  """sum of the lost eigenvalues over d, by direct evaluation; zero at full size."""
  x = jnp.asarray(circular(), jnp.float32)
  optimum = bows.pca(x)
  loss = bows.loss_function(optimum.params(latent), x, output="linear")
  np.testing.assert_allclose(loss, optimum.loss(latent), rtol=1e-3, atol=1e-6)


def test_weight_decay_brings_the_geometry_to_the_covariance():
  """corr(G, C) rises with decay at m = 8, within 0.1 of .345, .440, .998."""
  covariance = np.cov(circular().T)
  params = trained(8)
  found = [
    np.mean([bows.offdiagonal_correlation(bows.gram(training.pick(params, i, s)), covariance) for s in (0, 1)])
    for i in range(3)
  ]
  assert found[0] < found[1] < found[2]
  np.testing.assert_allclose(found, [0.345, 0.440, 0.998], atol=0.1)


def test_relu_beats_the_linear_bound_in_two_dimensions_on_a_ring():
  """mse .0461 under the PCA optimum .0506 at m = 2; the twelve columns are in circular order."""
  x = jnp.asarray(circular(), jnp.float32)
  params = training.pick(trained(2), 0, 0)
  loss, bound = float(bows.loss_function(params, x)), float(bows.pca(x).loss(2))
  np.testing.assert_allclose([loss, bound], [0.0461, 0.0506], rtol=0.05)
  assert loss < bound
  assert bows.ring_score(params["W"]) == 12


def test_without_correlation_there_is_no_ring():
  """iid and column-shuffled circular data, mean over seeds."""
  x = {"iid": data.synthetic("iid")[:8000], "shuffled": np.random.default_rng(0).permuted(circular(), axis=0)}
  options = dict(features=12, steps=60 * 31, batch=256, rate=1e-2, clip=1.0, every=31, bound=12**-0.5)
  covariance = np.cov(circular().T)
  for name, samples in x.items():
    bits = jnp.asarray(np.packbits(samples, axis=1))
    params, _ = training.train_grid(bits, jnp.array([0.0, 1.0, 6.0]), latent=2, output="relu", seeds=2, **options)
    models = [training.pick(params, 1, seed) for seed in (0, 1)]
    correlation = [bows.offdiagonal_correlation(bows.gram(p), covariance) for p in models]
    assert abs(np.mean(correlation)) < 0.3, name
    assert np.mean([bows.ring_score(p["W"]) for p in models]) < 8, name


@pytest.mark.parametrize("tied", [True, False])
def test_bias_self_and_interference_add_up(tied):
  """p_v(S) == b_v + ||w_v||^2 [v in S] + the sum of Gram entries, to 1e-5."""
  params, x = random_model(tied), random_windows()
  parts = bows.decompose(params, x)
  np.testing.assert_allclose(sum(parts.values()), bows.preactivation(params, x), atol=1e-5)
  g = np.asarray(bows.gram(params))
  if tied:
    np.testing.assert_allclose(g, np.asarray(params["W"]).T @ np.asarray(params["W"]), atol=1e-6)
  for n in (0, 7):
    active = np.flatnonzero(x[n])
    expected = [sum(g[v, u] for u in active if u != v) for v in range(20)]
    np.testing.assert_allclose(parts["interference"][n], expected, atol=1e-5)
    np.testing.assert_allclose(parts["self"][n], np.diag(g) * x[n], atol=1e-5)
  np.testing.assert_allclose(bows.gram(params, np.array([3, 1])), g[np.ix_([3, 1], [3, 1])], atol=1e-6)
  np.testing.assert_allclose(bows.gram_row(params, 4), g[4], atol=1e-6)
  tower = bows.towers(params, 4, {"three": [1, 4, 9]})
  np.testing.assert_allclose(tower["three"], g[4, 1] + g[4, 9], atol=1e-5)


@pytest.mark.parametrize("output", bows.OUTPUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_one_hot_r2_is_the_streamed_r2_of_one_word_inputs(output, tied):
  params = random_model(tied)
  streamed = bows.word_statistics(bows.accumulate(params, jnp.eye(20), output=output))["r2"]
  np.testing.assert_allclose(bows.one_hot_r2(params, output=output), streamed, rtol=1e-4, atol=1e-4)


def test_streamed_statistics_are_the_direct_ones():
  """Two batches against one pass of plain formulas; a word that never occurs is NaN and left out of the mean."""
  params, x = random_model(), random_windows(50)
  x[:, 3] = 0
  bits = np.packbits(x.astype(np.uint8), axis=1)
  s = bows.evaluate(params, bits, 20, batch=32)
  p = np.asarray(bows.preactivation(params, x))
  inter = np.asarray(bows.decompose(params, x)["interference"])
  with np.errstate(divide="ignore", invalid="ignore"):
    r2 = 1 - ((np.maximum(p, 0) - x) ** 2).sum(0) / (x**2).sum(0).__sub__(x.sum(0) ** 2 / 50)
  keep = np.arange(20) != 3
  np.testing.assert_allclose(s["r2"][keep], r2[keep], rtol=1e-4)
  assert np.isnan(s["r2"][3]) and np.isnan(s["received"][3])
  np.testing.assert_allclose(s["mean_r2"], r2[keep].mean(), rtol=1e-4)
  np.testing.assert_allclose(s["interference_present"], inter[x > 0].mean(), rtol=1e-4)
  np.testing.assert_allclose(s["interference_absent"], inter[x == 0].mean(), rtol=1e-4, atol=1e-5)
  each = [inter[x[:, v] > 0, v].mean() - inter[x[:, v] == 0, v].mean() if keep[v] else 0.0 for v in range(20)]
  np.testing.assert_allclose(s["interference_within"], (each * x.sum(0)).sum() / x.sum(), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(s["positive_present"], (p > 0)[x > 0].mean(), rtol=1e-5)
  np.testing.assert_allclose(s["positive_absent"], (p > 0)[x == 0].mean(), rtol=1e-5)
  weighted = (r2[keep] * x.sum(0)[keep]).sum() / x.sum(0)[keep].sum()
  np.testing.assert_allclose(s["frequency_weighted_r2"], weighted, rtol=1e-4)


def test_the_optimizer_is_torch_adamw():
  """eps outside the root, decay times the scheduled rate, b decayed too; against the formula."""
  rate, decay, steps = 0.01, 4.0, 6
  params = {"W": jnp.array([[0.5, -2.0]]), "b": jnp.array([1.0, 3.0])}
  optimizer = bows.adamw(rate, steps, decay)
  state = optimizer.init(params)
  theta = {k: np.array(v, np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in theta.items()}
  v = {k: np.zeros_like(t) for k, t in theta.items()}
  random = np.random.default_rng(0)
  for t in range(steps):
    gradient = {k: random.normal(size=a.shape) * 1e-7 for k, a in theta.items()}
    updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
    params = optax.apply_updates(params, updates)
    lr = rate * (1 + np.cos(np.pi * t / steps)) / 2
    for k, g in gradient.items():
      theta[k] *= 1 - lr * decay
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.999 * v[k] + 0.001 * g**2
      theta[k] -= lr * (m[k] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[k] / (1 - 0.999 ** (t + 1))) + 1e-8)
    for k in theta:
      np.testing.assert_allclose(params[k], theta[k], rtol=1e-5)


def test_training_steps_are_the_optimizers_on_shuffled_epochs():
  """Every sample once an epoch; the first step's loss is the loss of its batch at the initial parameters."""
  x = random_windows(64)
  bits = jnp.asarray(np.packbits(x.astype(np.uint8), axis=1))
  start = random_model()
  options = dict(features=20, batch=64, rate=1e-3, seed=3)
  _, losses = bows.train(start, bits, steps=2, **options)
  np.testing.assert_allclose(losses[0], bows.loss_function(start, x), rtol=1e-5)
  gradient = jax.grad(bows.loss_function)(start, x)
  optimizer = bows.adamw(1e-3, 2, 0.0)
  updates, _ = optimizer.update(gradient, optimizer.init(start), start)
  np.testing.assert_allclose(losses[1], bows.loss_function(optax.apply_updates(start, updates), x), rtol=1e-5)


@pytest.mark.parametrize("loss", bows.LOSSES)
@pytest.mark.parametrize("latent", bows.LATENTS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_finite_differences(loss, latent, tied):
  with jax.enable_x64(True):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), random_model(tied))
    x = jnp.asarray(random_windows(8), jnp.float64)
    value = jax.jit(lambda p: bows.loss_function(p, x, loss=loss, latent=latent))
    direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape)), params)
    shifted = lambda h: value(jax.tree.map(lambda a, d: a + h * d, params, direction))
    slope = sum(
      jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(value)(params), direction)), strict=True)
    )
    np.testing.assert_allclose(slope, (shifted(1e-6) - shifted(-1e-6)) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize(
  "output, loss, latent, tied",
  [
    ("linear", "mse", "linear", False),
    ("relu", "mse", "relu", True),
    ("relu", "bce", "linear", True),
    ("relu", "mse_sigmoid", "linear", False),
  ],
)
def test_every_member_of_the_family_learns(output, loss, latent, tied):
  bits = jnp.asarray(np.packbits(circular()[:512], axis=1))
  start = bows.init_params(jax.random.key(0), features=12, latent=6, tied=tied, bound=12**-0.5)
  options = dict(output=output, loss=loss, latent=latent)
  params, losses = bows.train(start, bits, features=12, steps=150, batch=128, rate=1e-2, **options)
  x = data.unpack(bits, 12)
  assert float(bows.loss_function(params, x, **options)) < 0.75 * float(losses[0])
  assert ("decoder" in params) == (not tied)


@given(
  st.lists(st.lists(st.integers(0, 29), max_size=6), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 4)
)
def test_windows_are_unions_of_rows(rows, group, stride):
  """The bit-OR path and the offsets path against Python sets; every index below d."""
  if group > len(rows):
    with pytest.raises(InputError, match="lower group or give more text"):
      data.make_windows(rows, group=group, stride=stride)
    return
  offsets, values = data.make_windows(rows, group=group, stride=stride)
  starts = np.arange(0, len(rows) - group + 1, stride)
  assert len(offsets) == len(starts) + 1 and (values < 30).all()
  dense = np.asarray(data.unpack(data.or_rows(data.pack_rows(rows, 30), starts, group), 30))
  for w, start in enumerate(starts):
    expected = set().union(*rows[start : start + group])
    assert list(values[offsets[w] : offsets[w + 1]]) == sorted(expected)
    assert set(np.flatnonzero(dense[w])) == expected


def test_tokens_follow_the_published_rules():
  """Case kept, lower-case function words dropped, alphabetic or 0..100, nothing from short rows."""
  row = "The cat in the hat, in May 1999 counted 99 and 101 hats; it's 0 degrees, mixed3word."
  assert data.tokens(row) == ["The", "cat", "hat", "May", "counted", "99", "hats", "0", "degrees", "mixed", "3", "word"]
  assert data.tokens("May is short") == []
  assert data.paragraphs("a\nb\n\n\n c \n\n") == ["a\nb", " c "]


def test_the_vocabulary_starts_with_the_forced_words():
  rows = ["apple banana apple pear walnut hazelnut quince medlar grape"] * 3 + ["apple " * 12]
  words = data.vocabulary(rows, size=3, seed=0, forced=("July",), share=1.0)
  assert list(words)[:2] == ["July", "apple"]
  assert data.encode_rows(["July apple apple is a month not a fruit and not a company"], words) == [[0, 1]]
  with pytest.raises(InputError, match="for a vocabulary of 50; lower it"):
    data.vocabulary(rows, size=50, seed=0)


def test_held_out_windows_share_no_row_with_training_windows():
  train, held = data.block_split(2000, group=4, block=100)
  rows = lambda starts: {int(s) + i for s in starts for i in range(4)}
  assert not rows(train) & rows(held) and len(held) > 100
  assert min(abs(a - b) for a in sorted(rows(train)) for b in sorted(rows(held))[:200]) > 4


def test_shuffled_columns_keep_marginals_and_lose_correlation():
  x = circular()
  shuffled = np.unpackbits(data.shuffle_columns(np.packbits(x, axis=1), 12, 0), axis=1, count=12)
  np.testing.assert_array_equal(shuffled.sum(0), x.sum(0))
  off = ~np.eye(12, dtype=bool)
  assert np.abs(np.corrcoef(shuffled.T)[off]).max() < 0.06 < 0.3 < np.abs(np.corrcoef(x.T)[off]).max()


@pytest.mark.parametrize("structure", data.STRUCTURES)
def test_synthetic_features_follow_their_latent(structure):
  """Mean rate 0.5 on the circle and iid; neighbours on the circle correlate most."""
  x = data.synthetic(structure)
  assert x.shape == (10_000, 12) and set(np.unique(x)) == {0, 1}
  if structure in ("circular", "iid"):
    assert x.mean() == pytest.approx(0.5, abs=0.02)
  lags = bows.lag_curve(np.corrcoef(x.T))
  assert (structure == "circular") == bool((np.diff(lags) < 0).all() and lags[0] > 0.5)


def test_ring_score_and_lag_curve_of_a_perfect_ring():
  angle = 2 * np.pi * np.arange(12) / 12
  ring = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)) @ np.stack([np.cos(angle), np.sin(angle)]))
  assert bows.ring_score(jnp.stack([jnp.cos(angle), jnp.sin(angle)])) == 12 == bows.ring_score(ring)
  np.testing.assert_allclose(bows.lag_curve(np.cos(angle[:, None] - angle)), np.cos(angle[1:7]), atol=1e-12)
  scores = [bows.cyclic_neighbours(np.random.default_rng(i).permutation(12)) for i in range(400)]
  assert np.mean(scores) == pytest.approx(24 / 11, abs=0.25)


def test_months_analyses_see_the_ring_in_the_data():
  """Indicator correlation and the plane of one-hot months, on the circle; windows without any are left out."""
  x = np.concatenate([circular(), np.zeros((500, 12), np.uint8)])
  correlation = bows.indicator_correlation(x, np.arange(12))
  np.testing.assert_allclose(correlation, np.corrcoef(circular()[circular().any(1)].T))
  plane = bows.indicator_plane(x, np.arange(12))
  assert bows.cyclic_neighbours(np.argsort(np.arctan2(plane[:, 1], plane[:, 0]))) == 12


def test_clusters_find_planted_topics():
  centres = np.eye(4, 8)
  w = np.repeat(centres, 10, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(40, 8))
  labels = min(
    (np.asarray(bows.spherical_clusters(jnp.asarray(w.T), jax.random.key(k), clusters=4)) for k in range(8)),
    key=lambda found: -len(np.unique(found)),
  )
  within, between = bows.within_and_between(w @ w.T, labels)
  assert within > 0.8 > 0.2 > between
  assert all(len(np.unique(labels[10 * i : 10 * i + 10])) == 1 for i in range(4))


def test_compass_octants():
  """due north, east, south, west are 0, 2, 4, 6; the way back is the opposite octant nearby."""
  zero = jnp.zeros(4)
  lat, lon = jnp.array([1.0, 0, -1, 0]), jnp.array([0.0, 1, 0, -1])
  np.testing.assert_array_equal(value_coding.octant(value_coding.bearing(zero, zero, lat, lon)), [0, 2, 4, 6])
  random = np.random.default_rng(0)
  a = random.uniform(-40, 40, (2, 500))
  b = a + random.normal(size=(2, 500)) * 0.2
  there, back = value_coding.bearing(*a, *b), value_coding.bearing(*b, *a)
  apart = np.abs(np.asarray(there - back) % 360 - 180)
  assert apart.max() < 1.0
  opposite = (value_coding.octant(there) - value_coding.octant(back)) % 8
  assert (np.asarray(opposite) == 4).mean() > 0.97


def test_ridge_and_ablations_are_projections():
  random = np.random.default_rng(0)
  x, y = random.normal(size=(30, 5)), random.normal(size=(30, 2))
  coefficients, offset = value_coding.ridge(jnp.asarray(x), jnp.asarray(y), alpha=0.5)
  centred = x - x.mean(0)
  gradient = centred.T @ (centred @ np.asarray(coefficients) - (y - y.mean(0))) + 0.5 * np.asarray(coefficients)
  np.testing.assert_allclose(gradient, 0, atol=1e-4)
  np.testing.assert_allclose((x @ np.asarray(coefficients) + offset).mean(0), y.mean(0), atol=1e-5)
  removed = value_coding.ablate(jnp.asarray(x), coefficients, mode="remove")
  np.testing.assert_allclose(removed @ coefficients, 0, atol=1e-5)
  kept = value_coding.ablate(jnp.asarray(x), coefficients, mode="keep")
  np.testing.assert_allclose(kept - np.asarray(removed).mean(0) + removed, x, atol=1e-5)
  again = value_coding.ablate(jnp.asarray(x), coefficients, mode="renormalise")
  np.testing.assert_allclose(jnp.linalg.norm(again, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


def test_a_trained_embedding_holds_the_map_it_needs():
  """Bearings between points of a grid are learned far above chance (1/8); a linear probe finds the coordinates, and
  the network is lost without the plane of the probe."""
  place = np.stack(np.meshgrid(np.linspace(30, 45, 5), np.linspace(-110, -80, 5)), -1).reshape(-1, 2)
  first, second = map(jnp.asarray, np.array([(i, j) for i in range(25) for j in range(25) if i != j]).T)
  labels = value_coding.octant(value_coding.bearing(*place[first].T, *place[second].T))
  start = value_coding.init_params(jax.random.key(0), cities=25)
  params, losses = value_coding.train(start, first, second, labels, steps=600, batch=128, rate=3e-3)
  assert losses[-20:].mean() < 0.2 * losses[:20].mean()
  accuracy = value_coding.accuracy(params, first, second, labels)
  assert accuracy > 0.95
  plane, offset = value_coding.ridge(params["embedding"], jnp.asarray(place), alpha=1e-3)
  np.testing.assert_allclose(params["embedding"] @ plane + offset, place, atol=0.5)
  removed = value_coding.ablate(params["embedding"], plane, mode="remove")
  assert value_coding.accuracy(params | {"embedding": removed}, first, second, labels) < accuracy - 0.1


def test_the_experiment_reports_claims_and_keeps_its_parts(tmp_path):
  """On dates in seasons: neighbouring months share rows, and the ring claims appear."""
  random = np.random.default_rng(0)
  filler = [w * 3 for w in "abcdefghijklmnopqrstuvwxyz"]
  for split, count in (("train", 400), ("validation", 40)):
    rows = []
    for i in range(count):
      named = [data.MONTHS[(i // 3 + int(k)) % 12] for k in random.integers(0, 3, 2)]
      rows.append(" ".join([*named, *random.choice(filler, 15)]))
    (tmp_path / f"{split}.txt").write_text("\n\n".join(rows))
  config = get_config("test")
  config.data.update(name="local_text", path=str(tmp_path), split="train", vocabulary=38, block=60, cycle_group=2)
  config.train.update(latents=(3, 4), steps=10, cycle_latent=4)
  workdir = tmp_path / "run"
  workdir.mkdir()
  report = results.evaluate(experiment, config, workdir, tmp_path / "cache", Console(quiet=True))
  assert sum("months" in claim.name for claim in report.claims) == 1 and len(report.figures) == 4
  assert len(report.claims) == 12
  assert all((workdir / name).read_bytes().startswith(b"\x89PNG") for name in report.figures)
  assert report.metrics["cycle"]["data_lags"][0] > report.metrics["cycle"]["data_lags"][4]
  assert report.metrics["cycle"]["spectral_ring"] >= 10
  row = report.metrics["synthetic"]["structures"]["circular"]["m4"]
  assert {"untied wd1", "BCE wd1", "ReLU latent wd1", "random W"} <= set(row)
  parts = {file.name: file.stat().st_mtime_ns for file in workdir.glob("*.json")}
  names = ("text.3", "text.4", "synthetic", "cycle", "value_coding")
  assert {f"{name}.part.json" for name in names} <= set(parts)
  again = results.evaluate(experiment, config, workdir, tmp_path / "cache", Console(quiet=True))
  assert again.metrics == report.metrics
  assert parts == {file.name: file.stat().st_mtime_ns for file in workdir.glob("*.json")}


def test_without_months_there_is_no_cycle(tmp_path):
  config = get_config("test")
  result = months.measure(config, {"sand": 0}, [[0]] * 9, Console(quiet=True))
  assert "models" not in result and not any(result["rows_with_month"].values())
  assert months.claims(config, result) == []


def test_a_grid_over_data_sets_is_a_grid_of_each():
  """Natural and shuffled windows in one scan give what a scan of each gives."""
  sets = jnp.asarray(np.stack([np.packbits(circular()[i::2][:64], axis=1) for i in (0, 1)]))
  options = dict(features=12, latent=3, steps=5, batch=16, rate=1e-2, seeds=2)
  both, losses = training.train_grid(sets, jnp.array([0.0, 1.0]), jnp.array([0, 1]), **options)
  for at, decay in enumerate((0.0, 1.0)):
    one, loss = training.train_grid(sets[at], jnp.array([decay]), **options)
    np.testing.assert_allclose(losses[at], loss[0], rtol=1e-5)
    for name in one:
      np.testing.assert_allclose(both[name][at], one[name][0], atol=1e-5)


def test_a_shorter_run_decays_as_much_as_the_papers():
  """Rate x decay x steps is that of 40 steps in 10; of every scale that of the paper's 31,700."""
  t = get_config("test").train
  t.update(weight_decays=(0.0, 1.0), paper_steps=40, steps=10, batch=16, seeds=1)
  bits = jnp.asarray(np.packbits(circular()[:64], axis=1))
  options = dict(latent=3, features=12, steps=10, batch=16, rate=t.rate, seeds=1)
  grid, _ = training.train_grid(bits, jnp.array([0.0, 4.0]), **options)
  expected = [words.relative_offdiagonal(training.pick(grid, i, 0)) for i in (0, 1)]
  assert list(words.measure_geometry(t, 3, 12, bits).values()) == pytest.approx(expected, rel=1e-5)
  assert {get_config(scale).train.paper_steps for scale in ("cpu", "gpu", "paper")} == {31_700}


def test_the_random_control_keeps_norms_and_biases():
  """Random W with matched norms; its Gram has the model's diagonal and nothing of its pattern."""
  params = bows.init_params(jax.random.key(0), features=300, latent=20)
  control = synthetic.matched_random(params, 1)
  np.testing.assert_allclose(jnp.diag(bows.gram(control)), jnp.diag(bows.gram(params)), rtol=1e-5)
  assert abs(bows.offdiagonal_correlation(bows.gram(control), bows.gram(params))) < 0.05


def city_config(path):
  config = get_config("test")
  config.cities.update(name="csv", path=str(path))
  return config


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda tmp: bows.init_params(jax.random.key(0), features=4, latent=0), "latent is 0"),
    (
      lambda tmp: bows.train(random_model(), jnp.zeros((4, 3), jnp.uint8), features=20, steps=1, batch=9, rate=1),
      "is 9",
    ),
    (
      lambda tmp: bows.train(
        random_model(), jnp.zeros((4, 3), jnp.uint8), features=20, steps=1, batch=2, rate=1, output="tanh"
      ),
      "output is 'tanh'",
    ),
    (
      lambda tmp: bows.train(random_model(), jnp.zeros((4, 20)), features=20, steps=1, batch=2, rate=1),
      r"bits are float32\[4, 20\]; 20 words are uint8 of \[..., 3\]",
    ),
    (lambda tmp: bows.evaluate(random_model(), np.zeros((4, 20), np.uint8), 20), r"bits are uint8\[4, 20\]"),
    (
      lambda tmp: bows.train(
        random_model(), np.packbits(np.ones((4, 24), int), 1), features=20, steps=1, batch=2, rate=1
      ),
      "bits beyond 20 words are set",
    ),
    (
      lambda tmp: bows.train(random_model(), jnp.zeros((4, 4), jnp.uint8), features=25, steps=1, batch=2, rate=1),
      "features is 25, the parameters are of 20 words",
    ),
    (lambda tmp: bows.evaluate(random_model(), jnp.zeros((4, 3), jnp.uint8), 19), "features is 19, the parameters"),
    (lambda tmp: data.shuffle_columns(np.zeros((4, 20), np.uint8), 20, 0), r"bits are uint8\[4, 20\]; 20 words"),
    (lambda tmp: data.or_rows(jnp.zeros((4, 3), jnp.uint8), np.array([0, 3]), 2), r"at 0\.\.3; of 2 rows, at 0\.\.2"),
    (lambda tmp: data.or_rows(np.zeros((4, 3), np.uint8), np.array([-1]), 2), r"start at -1\.\.0"),
    (lambda tmp: data.or_rows(np.zeros((4, 24), bool), np.array([0]), 2), "rows are bool; pack them"),
    (lambda tmp: data.synthetic("torus"), "structure is 'torus'"),
    (lambda tmp: data.pack_rows([[0], [7]], 5), "row 1 has a word index outside 0..4"),
    (lambda tmp: data.pack_rows([[0], ["a"]], 5), "row 1 has a word index outside 0..4"),
    (lambda tmp: data.make_windows([[0]], group=0), "group is 0"),
    (lambda tmp: data.block_split(1000, group=50, block=100), "too short for windows of 50"),
    (lambda tmp: data.block_split(90, group=2, block=100), "90 rows are too few"),
    (lambda tmp: value_coding.ablate(jnp.eye(3), jnp.eye(3)[:, :2], mode="all"), "ablation is 'all'"),
    (lambda tmp: cities.load(city_config(tmp / "none.csv")), "no file"),
    (
      lambda tmp: (tmp / "c.csv").write_text("1,2\n") and cities.load(city_config(tmp / "c.csv")),
      "2 columns",
    ),
    (
      lambda tmp: (tmp / "c.csv").write_text("1,nan,2\n") and cities.load(city_config(tmp / "c.csv")),
      "no finite number in one",
    ),
    (lambda tmp: (tmp / "c.csv").write_text("a,b,c\n") and cities.load(city_config(tmp / "c.csv")), "c.csv"),
  ],
)
def test_mistakes_are_named(make, message, tmp_path):
  with pytest.raises(InputError, match=message):
    make(tmp_path)
