r"""BiBench: eight ways of training networks of signs, as operators that any network takes (Qin et al. 2023, arXiv
2301.11233), beside the references they are judged by.

  y = out( conv( act(x), weight(w) ) ),      w latent weights in float32, every sign with a surrogate gradient

An `Operator` is a record of pure functions; `conv` and `dense` take one by its name:

  params = init("recu", key, (3, 3, 16, 32), pixels=(8, 8))          # {"kernel", and what the operator learns}
  y = conv("recu", params, x, at=schedule(epoch, epochs), train=True)

Channels are the last axis of inputs and outputs, so that "an output channel" of a kernel is its last axis and c below;
mu_c = mean |w| over all others, without a gradient. sign(0) is +1: hardware has no 0. Images are padded with zeros.

  name      act                                  weight                                     out
  bnn       sign, clip                           sign, clip
  xnor      mean |x| of a sample * sign, clip    mu_c * sign, clip (dense: w - mean_c w)
  dorefa    sign, clip                           mu_c * sign, clip
  bireal    sign, ApproxSign                     mu_c * sign, clip
  xnor++    sign, clip                           sign, clip                                 a_c b_h g_w y, learned
  reactnet  sign(x + t_c), ApproxSign            mu_c * sign, clip
  recu      sign(x / std), ApproxSign            sign(clip(w1, -Q, Q)), identity            a_c y, learned
  fda       sign, Fourier, + alpha eta_a(x)      mu_c * (sign, Fourier, + alpha eta_w(w))

`fp32` changes nothing, `bwn` has the weights of dorefa alone, `int8` rounds both to 8 bits.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require, require_choice, require_counts

ALGORITHMS = ("bnn", "xnor", "dorefa", "bireal", "xnor++", "reactnet", "recu", "fda")
REFERENCES = ("fp32", "bwn", "int8")
OMEGA = 0.1  # of FDA
_EPS = 1e-5
_TAU_SCALE = (0.99 - 0.85) / (math.e - 1)


class At(NamedTuple):
  """Where in training: tau of ReCU, alpha and terms (n, counted from 0) of FDA; numbers or traced scalars."""

  tau: Array | float
  alpha: Array | float
  terms: Array | float


FINAL = At(tau=0.99, alpha=0.0, terms=18.0)


def schedule(epoch, epochs) -> At:
  """Of epoch e of E, from 0 on: tau = A exp(e/E) + B from .85 to .99, alpha = .05 (1 + cos(pi (e+1)/E)) down to 0,
  n = 9 + floor(9 e/E)."""
  done = epoch / epochs
  tau = _TAU_SCALE * jnp.exp(done) + 0.85 - _TAU_SCALE
  alpha = 0.05 * (1 + jnp.cos(jnp.pi * (epoch + 1) / epochs))
  return At(tau, alpha, 9 + jnp.floor(9 * done))


def hard_sign(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """+1 from 0 on, -1 below."""
  return jnp.where(u >= 0, 1, -1).astype(u.dtype)


def _surrogate(derivative: Callable):
  """A sign with `derivative` of (u, *rest) for its gradient; the rest has none."""

  @jax.custom_vjp
  def sign(u, *rest):
    return hard_sign(u)

  sign.defvjp(
    lambda u, *rest: (hard_sign(u), (u, *rest)),
    lambda kept, g: (g * derivative(*kept), *(jnp.zeros_like(one) for one in kept[1:])),
  )
  return sign


def fourier_slope(u: Float[Array, "*shape"], terms) -> Float[Array, "*shape"]:
  """(4 om / pi) sum_{i=0..n} cos((2i+1) om u) for |u| <= 1, else 0: the derivative of a square wave's first terms.

  The sum is sin(2 (n+1) om u) / (2 sin(om u)), which takes no longer for more terms.
  """
  angle = OMEGA * u
  near = jnp.abs(angle) < 1e-4
  safe = jnp.where(near, 1.0, angle)
  total = jnp.where(near, terms + 1, jnp.sin(2 * (terms + 1) * safe) / (2 * jnp.sin(safe)))
  return jnp.where(jnp.abs(u) <= 1, 4 * OMEGA / jnp.pi * total, 0.0).astype(u.dtype)


sign_ste = _surrogate(lambda u: (jnp.abs(u) <= 1).astype(u.dtype))
"""sign(u); gradient 1[|u| <= 1], of clip(u, -1, 1)."""
sign_approx = _surrogate(lambda u: jnp.maximum(0, 2 - 2 * jnp.abs(u)))
"""sign(u); gradient max(0, 2 - 2|u|), of -1 (u < -1), 2u + u^2 (u < 0), 2u - u^2 (u < 1), 1."""
sign_fda = _surrogate(fourier_slope)
"""sign_fda(u, terms): sign(u); gradient `fourier_slope`."""
sign_identity = _surrogate(jnp.ones_like)
"""sign(u); gradient 1."""


class Operator(NamedTuple):
  """One algorithm.

  Scales stand beside signs and are multiplied in behind the product: it is of whole numbers, and a sum of 0 is 0.

  Attributes:
    weight: (w, extra, at) -> (what is multiplied with, its scale, a number an output, or 1); w is (height, width,
      inputs, outputs) or (inputs, outputs).
    act: (x, extra, at, train, sample) -> (what is multiplied, its scale, a number a sample, or 1); `sample` are the
      axes of one sample.
    extra: (key, shape of w, pixels out or None) -> {name: what is learned beside w}.
    out: (y, extra) -> y.
    scales: what is stored of it beside signs, once trained: any of "output" (a number a channel), "input", "pixels".
    scaled: numbers an operation a sample is spent on beside the signs: of "input" and "output".
  """

  weight: Callable
  act: Callable
  extra: Callable = lambda key, shape, pixels: {}
  out: Callable = lambda y, extra: y
  scales: tuple[str, ...] = ()
  scaled: tuple[str, ...] = ()


def channel_scale(w: Float[Array, "*inputs outputs"]) -> Float[Array, "outputs"]:
  """mu_c, without a gradient."""
  return jax.lax.stop_gradient(jnp.abs(w).mean(axis=tuple(range(w.ndim - 1))))


def _signs(w, extra, at):
  return sign_ste(w), 1.0


def _scaled_signs(w, extra, at):
  return sign_ste(w), channel_scale(w)


def _centred_signs(w, extra, at):
  """XNOR's: those of a dense map are centred first."""
  return _scaled_signs(w - w.mean(axis=0) if w.ndim == 2 else w, extra, at)


def _sample_scaled(x, extra, at, train, sample):
  return sign_ste(x), jax.lax.stop_gradient(jnp.abs(x).mean(axis=sample, keepdims=True))


def _learned_scales(key, shape, pixels):
  ones = {"scale": jnp.ones(shape[-1])}
  return ones | ({"rows": jnp.ones(pixels[0]), "columns": jnp.ones(pixels[1])} if pixels else {})


def _pixelwise(y, extra):
  y = y * extra["scale"]
  return y * extra["rows"][:, None, None] * extra["columns"][:, None] if "rows" in extra else y


def redistributed(w: Float[Array, "*inputs outputs"], tau) -> Float[Array, "*inputs outputs"]:
  """ReCU's latents: w1 = 2 sqrt2 (w - mean_c) / sqrt(var_c + 1e-5), clipped to +-Q, Q = -mean|w1| ln(2 - 2 tau).

  Variances are unbiased; Q is one number for the whole layer, without a gradient.
  """
  w1 = w - w.mean(axis=tuple(range(w.ndim - 1)), keepdims=True)
  w1 = w1 * 2 * math.sqrt(2) / jnp.sqrt(_variance(w1, tuple(range(w.ndim - 1))) + _EPS)
  q = clipped_at(w1, tau)
  return jnp.clip(w1, -q, q)


def clipped_at(w1, tau) -> Float[Array, ""]:
  """Q of `redistributed`."""
  return jax.lax.stop_gradient(-jnp.abs(w1).mean() * jnp.log(2 - 2 * tau))


def _variance(x, axes):
  count = math.prod(x.shape[axis] for axis in axes)
  return x.var(axis=axes, keepdims=True) * (count / max(count - 1, 1))


def _of_unit_variance(x, extra, at, train, sample):
  """A positive factor changes no sign: in evaluation it is left out."""
  return sign_approx(x / jnp.sqrt(_variance(x, sample) + _EPS) if train else x), 1.0


def noise(u: Float[Array, "*batch size"], down, up) -> Float[Array, "*batch size"]:
  """FDA's eta(u) = W2 relu(W1 u) + .1 sin u, over the last axis."""
  return jax.nn.relu(u @ down) @ up + 0.1 * jnp.sin(u)


def _noise_nets(key, shape, pixels):
  """eta_a over channels, eta_w over a whole filter. Made at the start, so that they are trained."""
  made = {}
  for name, size in (("act", shape[-2]), ("weight", math.prod(shape[:-1]))):
    inner = max(size // 64 if size >= 64 else size // 4, 1)
    for part, (rows, columns) in dict(down=(size, inner), up=(inner, size)).items():
      key, own = jax.random.split(key)
      bound = 1 / math.sqrt(rows)
      made[f"{name}_{part}"] = jax.random.uniform(own, (rows, columns), minval=-bound, maxval=bound)
  return made


def _fourier_weight(w, extra, at):
  return _noisy(w.reshape(-1, w.shape[-1]).T, extra, at, "weight").T.reshape(w.shape), channel_scale(w)


def _fourier_act(x, extra, at, train, sample):
  return _noisy(x, extra, at, "act"), 1.0


def _noisy(u, extra, at, which):
  signs = sign_fda(u, jnp.asarray(at.terms, jnp.float32))
  ended = isinstance(at.alpha, float) and at.alpha == 0  # no program has to carry what adds nothing
  return signs if ended else signs + at.alpha * noise(u, extra[f"{which}_down"], extra[f"{which}_up"])


def rounded(x: Float[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*shape"]:
  """To whole multiples of max |x| / 127 over `axes`, the gradient as if it were not."""
  step = jax.lax.stop_gradient(jnp.abs(x).max(axis=axes, keepdims=True) / 127)
  step = jnp.where(step > 0, step, 1.0)
  return x + jax.lax.stop_gradient(jnp.round(x / step) * step - x)


_plain = lambda x, extra, at, train, sample: (x, 1.0)
_clipped = lambda x, extra, at, train, sample: (sign_ste(x), 1.0)
_approximate = lambda x, extra, at, train, sample: (sign_approx(x), 1.0)
_scale_y = lambda y, extra: y * extra["scale"]

OPERATORS: dict[str, Operator] = {
  "bnn": Operator(_signs, _clipped),
  "xnor": Operator(_centred_signs, _sample_scaled, scales=("output",), scaled=("input", "output")),
  "dorefa": Operator(_scaled_signs, _clipped, scales=("output",), scaled=("output",)),
  "bireal": Operator(_scaled_signs, _approximate, scales=("output",), scaled=("output",)),
  "xnor++": Operator(
    _signs,
    _clipped,
    _learned_scales,
    _pixelwise,
    scales=("output", "pixels"),
    scaled=("output", "output", "output"),
  ),
  "reactnet": Operator(
    _scaled_signs,
    lambda x, extra, at, train, sample: (sign_approx(x + extra["threshold"]), 1.0),
    lambda key, shape, pixels: {"threshold": jnp.zeros(shape[-2])},
    scales=("input", "output"),
    scaled=("input", "output"),
  ),
  "recu": Operator(
    lambda w, extra, at: (sign_identity(redistributed(w, at.tau)), 1.0),
    _of_unit_variance,
    lambda key, shape, pixels: {"scale": jax.random.uniform(key, (shape[-1],))},
    _scale_y,
    scales=("output",),
    scaled=("output",),
  ),
  "fda": Operator(_fourier_weight, _fourier_act, _noise_nets, scales=("output",), scaled=("output",)),
  "fp32": Operator(lambda w, extra, at: (w, 1.0), _plain),
  "bwn": Operator(_scaled_signs, _plain, scales=("output",), scaled=("output",)),
  "int8": Operator(
    lambda w, extra, at: (rounded(w, tuple(range(w.ndim - 1))), 1.0),
    lambda x, extra, at, train, sample: (rounded(x, sample), 1.0),
    scales=("output",),
    scaled=("input", "output"),
  ),
}


def operator(name: str) -> Operator:
  """Raises InputError unless there is one of that name."""
  require_choice("operator", name, OPERATORS)
  return OPERATORS[name]


def init(name: str, key: jax.Array, shape: tuple[int, ...], *, pixels: tuple[int, int] | None = None, bias=False):
  """{"kernel": latent weights, normal of variance 2 / inputs, "bias" where asked for, and the operator's own}.

  Args:
    shape: (height, width, inputs, outputs) of a convolution, (inputs, outputs) of a dense map.
    pixels: (height, width) that a convolution puts out: XNOR++ learns a number for each row and each column.

  Raises:
    InputError: an unknown operator, a shape of neither kind, pixels missing.
  """
  made = operator(name)
  require(
    len(shape) in (2, 4), f"a kernel of shape {shape}; it has 2 axes (dense) or 4 (height, width, inputs, outputs)"
  )
  require_counts(**{f"axis {i} of a kernel": size for i, size in enumerate(shape)})
  needs = len(shape) == 4 and name == "xnor++"
  require(not needs or pixels is not None, "xnor++ scales every pixel of a convolution; give pixels=(height, width)")
  own, other = jax.random.split(key)
  params = {"kernel": jax.random.normal(own, shape) * math.sqrt(2 / math.prod(shape[:-1]))}
  params |= {"bias": jnp.zeros(shape[-1])} if bias else {}
  return params | made.extra(other, shape, pixels if len(shape) == 4 else None)


def dense(
  name: str, params: Mapping[str, Array], x: Float[Array, "*batch inputs"], *, at: At = FINAL, train: bool = False
) -> Float[Array, "*batch outputs"]:
  """act(x) weight(w) by an operator's name, a row of x a sample."""
  return _product(name, params, x, lambda x, w: x @ w, 2, (-1,), at, train)


def conv(
  name: str,
  params: Mapping[str, Array],
  x: Float[Array, "batch height width inputs"],
  *,
  stride: int = 1,
  at: At = FINAL,
  train: bool = False,
) -> Float[Array, "batch rows columns outputs"]:
  """A convolution of act(x) by weight(w), an image a sample, padded by (size - 1) / 2 zeros: an odd size keeps it."""
  return _product(name, params, x, lambda x, w: convolve(x, w, stride), 4, (-3, -2, -1), at, train)


def _product(name, params, x, product, axes, sample, at, train):
  one = operator(name)
  w = params["kernel"]
  fits = w.ndim == axes and x.ndim >= len(sample) and x.shape[-1] == w.shape[-2]
  require(fits, f"an input of shape {x.shape} does not fit a kernel of shape {w.shape}; channels are the last axis")
  (x, x_scale), (w, w_scale) = one.act(x, params, at, train, sample), one.weight(w, params, at)
  y = one.out(product(x, w) * x_scale * w_scale, params)
  return y + params["bias"] if "bias" in params else y


def padding(size: int) -> tuple[int, int]:
  """Zeros before and behind, of a kernel of that size."""
  return (size - 1) // 2, size // 2


def convolve(x, w, stride: int = 1):
  """The plain convolution; of one pixel a product, which is faster and takes leading axes of its own by vmap."""
  if w.shape[:2] == (1, 1):
    return x[:, ::stride, ::stride] @ w[0, 0]
  pads = [padding(size) for size in w.shape[:2]]
  return jax.lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def rprelu(
  u: Float[Array, "*batch channels"], slope: Float[Array, "channels"], before: Float[Array, "channels"], behind
) -> Float[Array, "*batch channels"]:
  """ReActNet's activation PReLU(u + b1) + b2."""
  v = u + before
  return jnp.where(v >= 0, v, slope * v) + behind


def hard_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """clip(x, -1, 1)."""
  return jnp.clip(x, -1, 1)
