"""A network by `Layers`: trained, counted, packed; the overall metrics of the paper's table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxlab.core.checks import InputError
from jaxlab.kernels.xnor_matmul import pack_bits
from jaxlab.weights import bibench, bibench_metrics
from jaxlab.weights.bibench import ALGORITHMS, schedule
from jaxlab.weights.bibench_layers import adopted, apply, clipped, init, outline, savings
from jaxlab.weights.bibench_packed import fold, load, pack, pack_kernel, packed_conv, run, save


def network(layers, x):
  x = bibench.hard_tanh(layers.norm("stem.norm", layers.conv("stem", x, 6, binary=False)))
  x = bibench.hard_tanh(layers.norm("body.norm", layers.conv("body", x, 40, stride=2)))
  x = layers.norm("small.norm", layers.conv("small", x, 8, size=1))
  x = layers.dense("map", x.reshape(len(x), -1), 5)
  return layers.dense("head", x, 3, binary=False)


IMAGES = jax.random.normal(jax.random.key(3), (4, 6, 6, 3))


def made(name):
  """Random in everything that starts at one number, as if trained."""
  params, stats = init(network, jax.random.key(0), IMAGES, name)
  rng = np.random.default_rng(1)
  noisy = lambda a: np.float32(a + 0.3 * rng.normal(size=a.shape)) if a.ndim == 1 else a
  params = jax.tree.map(noisy, params)
  return params, jax.jit(lambda params: apply(network, params, stats, IMAGES, name, train=True)[1])(params)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_is_what_was_trained(name, tmp_path):
  """Words of 32 signs, borders of zeros, strides, scales of every kind, FDA behind the end of its noise; in a file as
  many bytes as there are."""
  params, stats = made(name)

  @jax.jit
  def both(params, stats):
    packed = pack(network, params, stats, IMAGES, name)
    return apply(network, params, stats, IMAGES, name), run(network, packed, IMAGES, name), packed

  (expected, same), found, packed = both(params, stats)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  file = tmp_path / "mine" / "packed.safetensors"
  save(packed, file)
  jax.tree.map(np.testing.assert_array_equal, load(file), packed)
  content = file.read_bytes()
  header = 8 + int.from_bytes(content[:8], "little")
  assert len(content) - header == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
  assert same.keys() == stats.keys() and packed[0]["body"]["words"].shape == (9, 40, 1)
  assert "kernel" not in packed[0]["body"] and "kernel" in packed[0]["head"]


@pytest.mark.parametrize("stride, size, channels", [(1, 3, 33), (2, 3, 5), (1, 2, 32), (2, 1, 70)])
def test_packed_convolution_is_the_convolution(stride, size, channels):
  """To the last bit, borders as well."""
  rng = np.random.default_rng(0)
  x, w = (rng.choice(np.float32([-1, 1]), shape) for shape in ((2, 7, 6, channels), (size, size, channels, 4)))
  packed = pack_kernel(jnp.asarray(w), jnp.float32([1, 2, 3, 0.5]))
  np.testing.assert_array_equal(packed.scale_of_signs, [1, 2, 3, 0.5])
  count = jax.jit(lambda x, words: packed_conv(pack_bits(x), words, channels, kernel=(size, size), stride=stride))
  found = count(jnp.asarray(x), packed.words)
  np.testing.assert_array_equal(found, bibench.convolve(jnp.asarray(x), jnp.asarray(w), stride))


def test_a_norm_and_a_sign_are_one_comparison():
  """For gains of either sign, and of 0, at every count there can be."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  gain = draw(50)
  gain[:4] = 0
  norm, stats = dict(gain=gain, offset=draw(50)), dict(mean=9 * draw(50), var=rng.random(50) + 0.1)
  scale, shift = rng.random(50) + 0.01, draw(50)
  counts = np.arange(-40, 41, dtype=np.int32)[:, None] * np.ones((1, 50), np.int32)
  normed = gain * (scale * counts - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + norm["offset"] + shift
  found = fold(norm, stats, scale, shift=shift)
  np.testing.assert_array_equal(found(counts), normed >= 0)
  assert 10 < found.flip.sum() < 40


def hand(layers, x):
  x = layers.conv("stem", x, 4, size=1, binary=False)
  x = layers.norm("norm", layers.conv("body", x, 8))
  return layers.dense("head", x.mean(axis=(1, 2)), 2, binary=False)


def test_savings_of_three_layers_counted_by_hand():
  """4 x 4 pixels: stem 12 weights, body 288, norm 16, head 18; multiplications 192, 4608 and 16."""
  x = jnp.zeros((1, 4, 4, 3))
  left, operations = 12 + 16 + 18, 192 + 16
  found = {name: savings(hand, x, name) for name in ("bnn", "dorefa", "xnor", "xnor++", "reactnet", "recu", "fp32")}
  ratio = lambda extra, more: (
    (334 + 0) / ((334 - left - extra) / 32 + left + extra),
    4816 / ((4816 - operations - more) / 64 + operations + more),
  )
  expected = dict(bnn=ratio(0, 0), dorefa=ratio(8, 128), xnor=ratio(8, 128 + 64), reactnet=ratio(12, 128 + 64))
  for name, pair in (expected | {"xnor++": ratio(16, 3 * 128), "fp32": (1, 1)}).items():
    np.testing.assert_allclose(found[name], pair, rtol=1e-6)
  assert bibench_metrics.saving(10, 0, 32) == 32 and bibench_metrics.saving(10, 0, 64) == 64
  assert bibench_metrics.saving(10, 10, 32) == 1
  assert outline(hand, x, "recu").binary == dict(stem=False, body=True, head=False)


def test_overall_metrics_of_the_papers_table():
  rows = {
    70.82: (94.54, 75.81, 76.97, 77.94, 54.19, 48.96, 49.75, 75.03),
    78.97: (94.73, 77.24, 74.61, 75.37, 93.86, 73.62, 59.63, 76.93),
    79.82: (95.03, 76.61, 76.35, 78.31, 93.74, 70.79, 66.60, 76.64),
    81.63: (95.61, 78.38, 80.07, 81.62, 93.23, 68.13, 69.42, 82.42),
    72.89: (94.52, 75.01, 74.41, 79.41, 85.20, 41.16, 49.33, 68.65),
    81.81: (95.92, 78.64, 81.38, 83.72, 92.41, 68.51, 67.64, 81.86),
    77.96: (96.72, 77.98, 81.65, 85.66, 95.07, 40.65, 50.66, 76.98),
    81.49: (94.66, 78.15, 79.02, 82.35, 94.38, 71.16, 70.61, 77.90),
    63.15: (72.90, 49.75, 64.61),  # architectures
  }
  for expected, ratios in rows.items():
    assert abs(bibench_metrics.overall(ratios) - expected) < 0.02
  assert 100 * bibench_metrics.overall([1, 1, 1]) == pytest.approx(100)
  assert bibench_metrics.accuracy([0.4, 0.6], 0.8) == pytest.approx(0.625)
  assert bibench_metrics.robustness((0.8, 0.6), (0.9, 0.8)) == pytest.approx(0.5)
  assert bibench_metrics.robustness((0.8, 0.8), (0.9, 0.9)) == 1
  assert bibench_metrics.training(2.0, 1.0, [0.1, 0.3], [0.1, 0.2]) == pytest.approx((0.5, 0.5))


def test_statistics_run_in_training_and_rule_in_evaluation():
  watched = lambda layers, x: layers.norm("norm", x)
  x = np.random.default_rng(0).normal(2, 3, (16, 5)).astype(np.float32)
  stats = {"norm": {"mean": np.ones(5, np.float32), "var": np.full(5, 4, np.float32)}}
  params = {"norm": {"gain": np.float32([1, 2, 3, 4, 5]), "offset": np.arange(5, dtype=np.float32)}}
  run = jax.jit(lambda train: apply(watched, params, stats, x, "bnn", train=train), static_argnums=0)
  (trained, after), (judged, same) = run(True), run(False)
  normed = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
  np.testing.assert_allclose(trained, normed * params["norm"]["gain"] + np.arange(5), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(judged, (x - 1) / 2 * params["norm"]["gain"] + np.arange(5), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(after["norm"]["mean"], 0.9 + 0.1 * x.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(same["norm"]["var"], 4)


def test_latents_come_from_a_checkpoint_and_stay_where_gradients_are():
  twin, _ = init(network, jax.random.key(5), IMAGES, "fp32")
  params, _ = init(network, jax.random.key(6), IMAGES, "recu")
  found = adopted(params, twin)
  np.testing.assert_array_equal(found["body"]["kernel"], twin["body"]["kernel"])
  np.testing.assert_array_equal(found["body"]["scale"], params["body"]["scale"])
  twice = jax.tree.map(lambda a: 9 * a, found)
  clip = clipped(twice, outline(network, IMAGES, "recu").binary)
  assert float(jnp.abs(clip["body"]["kernel"]).max()) == 1 and float(jnp.abs(clip["head"]["kernel"]).max()) > 1
  np.testing.assert_array_equal(clip["body"]["scale"], twice["body"]["scale"])
  other = twin | {"head": {"kernel": jnp.ones((5, 9)), "bias": jnp.ones(9)}}
  with pytest.raises(InputError, match="layer head has other shapes in the checkpoint"):
    adopted(params, other)


def test_one_program_for_all_epochs_and_seeds_side_by_side():
  x = jnp.ones((3, 4))
  small = lambda layers, x: layers.dense("map", x, 2)

  @functools.partial(jax.jit, static_argnums=1)
  @functools.partial(jax.vmap, in_axes=(0, None, None))
  def of(key, operator, epoch):
    params, stats = init(small, key, x, operator)
    return apply(small, params, stats, x, operator, at=schedule(epoch, 9), train=True)[0]

  keys = jax.random.split(jax.random.key(0), 2)
  both = [of(keys, "fda", epoch) for epoch in (0, 5)]
  assert of._cache_size() == 1 and both[0].shape == (2, 3, 2) and float(jnp.abs(both[0] - both[1]).max()) > 0
  assert float(jnp.abs(both[0][0] - both[0][1]).max()) > 0


def test_ones_own_network_in_three_lines():
  params, stats = init(network, jax.random.key(0), IMAGES, "reactnet")
  logits, after = jax.jit(lambda: apply(network, params, stats, IMAGES, "reactnet", train=True))()
  assert logits.shape == (4, 3) and after.keys() == stats.keys()


def test_bad_input_is_one_line(tmp_path):
  params, stats = init(network, jax.random.key(0), IMAGES, "bnn")

  def twice(layers, x):
    return layers.conv("body", layers.conv("body", x, 3), 3)

  with pytest.raises(InputError, match="two layers are named body"):
    init(twice, jax.random.key(0), IMAGES, "bnn")
  with pytest.raises(InputError, match="no parameters for layer stem"):
    apply(network, {}, stats, IMAGES, "bnn")
  with pytest.raises(InputError, match="int8 multiplies no signs; pack one of bnn"):
    pack(network, params, stats, IMAGES, "int8")
  file = tmp_path / "other.safetensors"
  safetensors.numpy.save_file({"weight": np.zeros(2)}, file)
  with pytest.raises(InputError, match="has a tensor weight; it is no packed network"):
    load(file)
  file.write_bytes(b"no tensors")
  with pytest.raises(InputError, match="save the packed network again"):
    load(file)
  with pytest.raises(InputError, match="5 of 4 are left"):
    bibench_metrics.saving(4, 5, 32)
  with pytest.raises(InputError, match="give at least one"):
    bibench_metrics.overall([])
  with pytest.raises(InputError, match="the full-precision twin's accuracy is 0"):
    bibench_metrics.accuracy([0.5], 0)
  with pytest.raises(InputError, match="1 and 2 settings"):
    bibench_metrics.training(1.0, 1.0, [0.5], [0.5, 0.6])
