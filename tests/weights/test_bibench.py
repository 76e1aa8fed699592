"""BiBench's operators: forward values by hand, gradients in closed form, schedules, each learns; bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core.checks import InputError
from jaxlab.weights import bibench
from jaxlab.weights.bibench import ALGORITHMS, FINAL, OPERATORS, schedule

GRID = jnp.asarray([-1.5, -1.0, -0.99, -0.5, 0.0, 0.25, 0.99, 1.0, 1.01, 3.0])


def slope(function, u):
  return jax.grad(lambda u: function(u).sum())(u)


def test_gradients_are_the_closed_forms():
  np.testing.assert_array_equal(slope(bibench.sign_ste, GRID), (np.abs(GRID) <= 1).astype(np.float32))
  np.testing.assert_array_equal(slope(bibench.sign_identity, GRID), np.ones(10))
  soft = lambda u: jnp.where(u < -1, -1, jnp.where(u < 0, 2 * u + u * u, jnp.where(u < 1, 2 * u - u * u, 1)))
  np.testing.assert_allclose(slope(bibench.sign_approx, GRID), slope(soft, GRID), atol=1e-6)
  for n in (9, 14, 18):
    terms = sum(np.cos((2 * i + 1) * 0.1 * np.asarray(GRID, np.float64)) for i in range(n + 1))
    expected = np.where(np.abs(GRID) <= 1, 0.4 / np.pi * terms, 0)
    np.testing.assert_allclose(slope(lambda u, n=n: bibench.sign_fda(u, jnp.float32(n)), GRID), expected, atol=2e-5)
  at_zero = [float(bibench.fourier_slope(jnp.float32(0), n)) for n in (9, 18)]
  np.testing.assert_allclose(at_zero, [1.2732, 2.4192], atol=1e-4)
  for sign in (bibench.sign_ste, bibench.sign_approx, bibench.sign_identity, lambda u: bibench.sign_fda(u, 9.0)):
    np.testing.assert_array_equal(sign(GRID), [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1])


def test_schedules_by_epoch():
  """tau .85 to .99 along an exponential, alpha to 0 along a cosine, n 9 to 17; one program for all of training."""
  run = jax.jit(schedule, static_argnums=1)
  first, last, over = (run(epoch, 60) for epoch in (0, 59, 60))
  np.testing.assert_allclose([first.tau, over.tau], [0.85, 0.99], atol=1e-6)
  np.testing.assert_allclose([first.alpha, last.alpha], [0.05 * (1 + math.cos(math.pi / 60)), 0], atol=1e-7)
  middle = run(30, 60)
  np.testing.assert_allclose(middle.tau, 0.85 + 0.14 * (math.e**0.5 - 1) / (math.e - 1), atol=1e-6)
  np.testing.assert_allclose([run(29, 60).alpha, middle.terms], [0.05, 13], atol=1e-6)
  assert (first.terms, last.terms, over.terms) == (9, 17, 18) and run._cache_size() == 1
  assert FINAL.alpha == 0 and FINAL.tau == 0.99


X = jnp.asarray([[[1.0, -2.0], [0.5, 0.0]], [[-0.25, 3.0], [-1.0, 0.75]]])[None]  # (1, 2, 2, 2)
W = jnp.asarray([[0.5, -0.25], [-2.0, 0.75]])[None, None]  # (1, 1, inputs 2, outputs 2)
SIGNS = np.sign(np.asarray(X)) + (np.asarray(X) == 0)
PLAIN = SIGNS @ np.sign(np.asarray(W[0, 0]))
MU = np.float32([1.25, 0.5])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_forward_by_hand(name):
  params = bibench.init(name, jax.random.key(0), W.shape, pixels=(2, 2)) | {"kernel": W}
  threshold = np.float32([0.3, -1.0])
  given = {
    "xnor++": dict(scale=jnp.float32([2, 3]), rows=jnp.float32([1, 5]), columns=jnp.float32([1, 7])),
    "reactnet": dict(threshold=jnp.asarray(threshold)),
    "recu": dict(scale=jnp.float32([2, 3])),
  }
  found = bibench.conv(name, params | given.get(name, {}), X)
  shifted = np.where(np.asarray(X) + threshold >= 0, 1, -1) @ np.sign(np.asarray(W[0, 0]))
  # ReCU centres each output first: (0.5, -2) and (-0.25, 0.75) stay what they are.
  expected = {
    "bnn": PLAIN,
    "xnor": PLAIN * MU * np.abs(np.asarray(X)).mean(),
    "xnor++": PLAIN * [2, 3] * np.float32([[1, 7], [5, 35]])[..., None],
    "reactnet": shifted * MU,
    "recu": PLAIN * [2, 3],
  }.get(name, PLAIN * MU)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  rows = X.reshape(4, 2)
  own = {key: value for key, value in given.get(name, {}).items() if key not in ("rows", "columns")}
  dense = bibench.dense(name, {"kernel": W[0, 0]} | own, rows)
  if name == "xnor":  # a scale a row, kernels centred by output
    centred = np.float32([[1.25, -0.5], [-1.25, 0.5]])
    expected = np.abs(rows).mean(axis=1, keepdims=True) * (SIGNS.reshape(4, 2) @ centred)
  expected = PLAIN * [2, 3] if name == "xnor++" else expected
  np.testing.assert_allclose(dense, np.reshape(expected, (4, 2)), rtol=1e-6)


@pytest.mark.parametrize("name", ["bnn", "recu", "xnor++"])
def test_interiors_have_the_parity_of_what_is_added_up(name):
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
  params = bibench.init(name, jax.random.key(1), (3, 3, 3, 4), pixels=(5, 5)) | {"scale": jnp.ones(4)}
  found = np.asarray(bibench.conv(name, params, x))
  np.testing.assert_array_equal(found, np.round(found))
  assert (found[:, 1:-1, 1:-1] % 2 == 27 % 2).all() and (found[:, 0, 1:-1] % 2 == 18 % 2).all()


def test_scales_have_no_gradient_and_the_rest_has_its_own():
  """d(mu_c sign(w)) / dw is mu_c inside the clip alone; a sample's scale in XNOR has none.

  Signs of an output are alike: where they add up to 0, so would the gradient of its scale.
  """
  w = jnp.asarray([[0.5, -1.5], [0.2, -0.1]])
  for name in ("dorefa", "bireal", "reactnet"):
    found = slope(lambda w, name=name: math.prod(OPERATORS[name].weight(w, {}, FINAL)), w)
    np.testing.assert_allclose(found, np.float32([[0.35, 0], [0.35, 0.8]]), rtol=1e-6)
  x = jnp.asarray([[0.5, 3.0]])
  np.testing.assert_allclose(
    slope(lambda x: math.prod(OPERATORS["xnor"].act(x, {}, FINAL, True, (-1,))), x), [[1.75, 0]]
  )


def test_recu_clips_fewer_weights_as_tau_grows():
  w = jax.random.laplace(jax.random.key(0), (3, 3, 16, 8))
  wide = bibench.redistributed(w, 0.999999)
  np.testing.assert_allclose(wide.mean(axis=(0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(wide.reshape(-1, 8).std(axis=0, ddof=1), math.sqrt(8), rtol=1e-4)
  mean = float(jnp.abs(wide).mean())
  shares = []
  for tau, factor in ((0.85, 1.204), (0.99, 3.912)):
    np.testing.assert_allclose(bibench.clipped_at(wide, tau), factor * mean, rtol=1e-3)
    found = bibench.redistributed(w, tau)
    shares.append(float((jnp.abs(found) < jnp.abs(wide)).mean()))
    np.testing.assert_array_equal(found >= 0, wide >= 0)  # no sign changes
    # The clip's gradient ends at Q, and Q itself has none.
    np.testing.assert_allclose(slope(lambda u, tau=tau: bibench.clipped_at(u, tau), wide), 0)
  assert 0.2 < shares[0] < 0.35 and shares[1] < 0.03


def test_recu_normalises_in_training_alone_and_nothing_changes():
  x = 5 * jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  params = bibench.init("recu", jax.random.key(1), (3, 3, 3, 4))
  both = [bibench.conv("recu", params, x, train=train) for train in (False, True)]
  np.testing.assert_array_equal(*both)
  moved = lambda train: (slope(lambda x: bibench.conv("recu", params, x, train=train), x) != 0).mean()
  assert moved(True) > 0.95 and moved(False) < 0.25  # beyond the clip nothing moves; the mean and deviation do


def test_fda_adds_a_noise_that_ends_and_is_trained():
  params = bibench.init("fda", jax.random.key(0), (3, 3, 8, 4))
  assert params["act_down"].shape == (8, 2) and params["weight_down"].shape == (72, 1)
  x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
  of = lambda params, epoch: bibench.conv("fda", params, x, at=schedule(epoch, 10))
  slope_of = jax.jit(jax.grad(lambda params, epoch: of(params, epoch).sum()))
  early, late = jax.jit(jax.vmap(of, (None, 0)))(params, jnp.array([0, 9]))
  final = jax.jit(lambda: bibench.conv("fda", params, x))()
  np.testing.assert_allclose(late, final, atol=1e-6)
  assert float(jnp.abs(early - final).max()) > 0.03
  assert all(float(np.abs(one).max()) > 0 for one in jax.device_get(slope_of(params, 0)).values())


def test_fdas_noise_is_what_its_nets_say():
  """signs + alpha (W2 relu(W1 u) + .1 sin u), of activations over channels and of every filter over its inputs."""
  params = bibench.init("fda", jax.random.key(0), (12, 5))
  assert params["act_down"].shape == params["weight_down"].shape == (12, 3)
  x, w = jax.random.normal(jax.random.key(1), (6, 12)), params["kernel"]
  found = bibench.dense("fda", params, x, at=bibench.At(tau=0.85, alpha=0.08, terms=9.0))
  own = {key: np.asarray(value, np.float64) for key, value in params.items()}

  def noisy(u, which):
    added = np.maximum(u @ own[f"{which}_down"], 0) @ own[f"{which}_up"] + 0.1 * np.sin(u)
    return np.where(u >= 0, 1, -1) + 0.08 * added

  filters = noisy(own["kernel"].T, "weight").T * np.abs(own["kernel"]).mean(axis=0)
  np.testing.assert_allclose(found, noisy(np.asarray(x, np.float64), "act") @ filters, rtol=1e-4, atol=1e-5)
  assert float(jnp.abs(found - bibench.dense("dorefa", {"kernel": w}, x)).max()) > 0.03


def test_references():
  x, w = jax.random.normal(jax.random.key(0), (4, 16)), jax.random.normal(jax.random.key(1), (16, 8))
  of = lambda name: bibench.dense(name, {"kernel": w}, x)
  np.testing.assert_array_equal(of("fp32"), x @ w)
  signs = jnp.abs(w).mean(axis=0) * jnp.sign(w)
  np.testing.assert_allclose(of("bwn"), x @ signs, rtol=1e-5, atol=1e-5)
  gap = jnp.abs(of("int8") - x @ w)
  assert 0 < float(gap.max()) < 0.03 * float(jnp.abs(x @ w).max())
  whole = bibench.rounded(w, (0,)) / (jnp.abs(w).max(axis=0) / 127)
  np.testing.assert_allclose(whole, jnp.round(whole), atol=1e-4)
  np.testing.assert_allclose(slope(lambda w: bibench.rounded(w, (0,)), w), 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_learns_64_images_by_heart(name):
  """Random 8 x 8 images with random labels, two binary maps between a first and a last one in full precision."""
  key = jax.random.key(0)
  x, y = jax.random.normal(key, (64, 64)), jax.random.randint(key, (64,), 0, 10)
  sizes = dict(first=("fp32", 64, 96), second=(name, 96, 96), third=(name, 96, 96), last=("fp32", 96, 10))
  params = {
    layer: bibench.init(how, jax.random.fold_in(key, i), (a, b)) for i, (layer, (how, a, b)) in enumerate(sizes.items())
  }

  def logits(params, at, train):
    h = x
    for layer, (how, *_) in sizes.items():
      h = bibench.dense(how, params[layer], h, at=at, train=train)
      if layer != "last":
        h = bibench.hard_tanh((h - h.mean(axis=0)) / (h.std(axis=0) + 1e-3))
    return h

  optimizer = optax.adam(3e-3)

  def step(carry, i):
    params, state = carry
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, schedule(i // 30, 10), True), y).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(300))[0][0])
  right = jnp.argmax(logits(train(params), FINAL, False), axis=1) == y
  assert float(right.mean()) > 0.95


def test_rprelu_shifts_before_and_behind():
  u = jnp.asarray([[-2.0, 0.5], [1.0, -0.5]])
  found = bibench.rprelu(u, jnp.float32([0.25, 0.5]), jnp.float32([1, 0]), jnp.float32([0, 10]))
  np.testing.assert_allclose(found, [[-0.25, 10.5], [2, 9.75]])


def test_bad_input_is_one_line():
  key = jax.random.key(0)
  with pytest.raises(InputError, match="operator is 'xnornet'; it must be one of bnn, xnor"):
    bibench.init("xnornet", key, (3, 4))
  with pytest.raises(InputError, match="a kernel of shape"):
    bibench.init("bnn", key, (3, 4, 5))
  with pytest.raises(InputError, match=r"xnor\+\+ scales every pixel of a convolution; give pixels"):
    bibench.init("xnor++", key, (3, 3, 4, 4))
  with pytest.raises(InputError, match=r"an input of shape \(2, 5\) does not fit a kernel of shape \(4, 3\)"):
    bibench.dense("bnn", bibench.init("bnn", key, (4, 3)), jnp.ones((2, 5)))
  with pytest.raises(InputError, match="does not fit a kernel"):
    bibench.conv("bnn", bibench.init("bnn", key, (4, 3)), jnp.ones((2, 5, 5, 4)))
