"""Twelve of CIFAR-10-C's fifteen corruptions as functions of a batch of pixels in 0..1, a program for all severities.

Glass, snow and frost are left out: swaps one after the other, and pictures of ice. Strengths grow from severity 1 to 5
about as those of the published set do; fog is noise of four scales, blurs and moved places are simpler than there.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core.checks import require

SEVERITIES = 5


def gaussian_noise(key, x, s):
  return x + jnp.array([0.04, 0.06, 0.08, 0.09, 0.10])[s] * jax.random.normal(key, x.shape)


def shot_noise(key, x, s):
  rate = jnp.array([500.0, 250, 100, 75, 50])[s]
  return jax.random.poisson(key, x * rate) / rate


def impulse_noise(key, x, s):
  """A share of the values is 0 or 1."""
  share = jnp.array([0.01, 0.02, 0.03, 0.05, 0.07])[s]
  where, which = jax.random.uniform(key, (2, *x.shape))
  return jnp.where(where < share, (which < 0.5).astype(x.dtype), x)


def defocus_blur(key, x, s):
  """A disk of growing radius."""
  radius = jnp.array([0.6, 0.8, 1.0, 1.4, 1.8])[s]
  place = jnp.hypot(*jnp.meshgrid(jnp.arange(-2.0, 3), jnp.arange(-2.0, 3)))
  return _filtered(x, jnp.clip(radius + 0.5 - place, 0, 1))


def motion_blur(key, x, s):
  """A line of growing length at an angle, the same for the batch."""
  length = jnp.array([1.0, 1.5, 2.0, 2.5, 3.0])[s]
  angle = jax.random.uniform(key, (), minval=-math.pi / 4, maxval=math.pi / 4)
  columns, rows = jnp.meshgrid(jnp.arange(-3.0, 4), jnp.arange(-3.0, 4))
  along = columns * jnp.cos(angle) + rows * jnp.sin(angle)
  off = rows * jnp.cos(angle) - columns * jnp.sin(angle)
  return _filtered(x, jnp.clip(1 - jnp.abs(off), 0, 1) * jnp.clip(length + 0.5 - jnp.abs(along), 0, 1))


def zoom_blur(key, x, s):
  """The mean of views that come closer."""
  most = jnp.array([0.05, 0.1, 0.15, 0.2, 0.25])[s]
  views = jax.lax.map(lambda share: _warped(x, lambda at: at / (1 + share * most)), jnp.linspace(0.0, 1, 5))
  return views.mean(axis=0)


def fog(key, x, s):
  strength, brightest = jnp.array([0.2, 0.5, 0.75, 1.0, 1.5])[s], x.max()
  height, width = x.shape[1:3]
  total = jnp.zeros((height, width))
  for i, size in enumerate((2, 4, 8, 16)):
    grid = jax.random.uniform(jax.random.fold_in(key, i), (size, size))
    total += jax.image.resize(grid, (height, width), "linear") / 2**i
  mist = (total - total.min()) / (total.max() - total.min())
  return (x + strength * mist[..., None]) * brightest / (brightest + strength)


def brightness(key, x, s):
  """More of V in HSV: all channels by the factor that their largest gets."""
  most = x.max(axis=-1, keepdims=True)
  more = jnp.clip(most + jnp.array([0.05, 0.1, 0.15, 0.2, 0.3])[s], 0, 1)
  return jnp.where(most > 0, x * more / jnp.maximum(most, 1e-6), more)


def contrast(key, x, s):
  mean = x.mean(axis=(1, 2), keepdims=True)
  return mean + jnp.array([0.75, 0.5, 0.4, 0.3, 0.15])[s] * (x - mean)


def elastic_transform(key, x, s):
  """Places moved by a smooth field."""
  size = jnp.array([0.4, 0.6, 0.8, 1.0, 1.3])[s]
  fields = jax.image.resize(jax.random.normal(key, (5, 5, 2)), (*x.shape[1:3], 2), "cubic")
  return _warped(x, lambda at: at + size * fields)


def pixelate(key, x, s):
  """Fewer pixels, each the mean of what it covers, shown at the old size."""
  side = jnp.array([0.95, 0.9, 0.85, 0.75, 0.65])[s]
  for axis in (1, 2):
    count = x.shape[axis]
    coarse = jnp.round(count * side)
    place = (jnp.arange(count) + 0.5) * coarse / count  # of a fine pixel, in coarse ones
    cell = jnp.floor(place)
    same = (cell[:, None] == cell[None]).astype(x.dtype)
    x = jnp.moveaxis(jnp.tensordot(same / same.sum(axis=1, keepdims=True), x, (1, axis)), 0, axis)
  return x


_LUMINANCE = np.array([  # JPEG's table of quality 50
  [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
  [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
  [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
_YCC = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])


def jpeg_compression(key, x, s):
  """Cosines of 8 x 8 blocks rounded by JPEG's table at a quality, colours by the same."""
  quality = jnp.array([80.0, 65, 58, 50, 40])[s]
  table = jnp.maximum(jnp.round(_LUMINANCE * jnp.where(quality < 50, 50 / quality, 2 - quality / 50)), 1)
  i = np.arange(8)
  cosines = jnp.asarray(np.cos((2 * i + 1) * i[:, None] * math.pi / 16) * np.where(i == 0, 0.125, 0.25)[:, None] ** 0.5)
  n, height, width, _ = x.shape
  blocks = (255 * x @ _YCC.T - jnp.array([128.0, 0, 0])).reshape(n, height // 8, 8, width // 8, 8, 3)
  code = jnp.einsum("ui,naibjc,vj->naubvc", cosines, blocks, cosines)
  code = jnp.round(code / table[:, None, :, None]) * table[:, None, :, None]
  blocks = jnp.einsum("ui,naubvc,vj->naibjc", cosines, code, cosines).reshape(n, height, width, 3)
  return (blocks + jnp.array([128.0, 0, 0])) @ np.linalg.inv(_YCC).T / 255


def _filtered(x, kernel):
  size = len(kernel)
  kernel = jnp.tile((kernel / kernel.sum())[:, :, None, None], (1, 1, 1, 3))
  padded = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)), mode="edge")
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=layout, feature_group_count=3)


def _warped(x, move):
  """x at the places move((height, width, 2) from the middle), between pixels by their distances."""
  sizes = jnp.array(x.shape[1:3])
  middle = (sizes - 1) / 2
  at = jnp.stack(jnp.meshgrid(*map(jnp.arange, x.shape[1:3]), indexing="ij"), axis=-1) - middle
  at = jnp.clip(move(at) + middle, 0, sizes - 1)
  low = jnp.floor(at).astype(int)
  share = at - low
  high = jnp.minimum(low + 1, sizes - 1)
  found = 0.0
  for rows, a in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
    for columns, b in ((low[..., 1], 1 - share[..., 1]), (high[..., 1], share[..., 1])):
      found += x[:, rows, columns] * (a * b)[..., None]
  return found


CORRUPTIONS = dict(
  gaussian_noise=gaussian_noise, shot_noise=shot_noise, impulse_noise=impulse_noise, defocus_blur=defocus_blur,
  motion_blur=motion_blur, zoom_blur=zoom_blur, fog=fog, brightness=brightness, contrast=contrast,
  elastic_transform=elastic_transform, pixelate=pixelate, jpeg_compression=jpeg_compression,
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _corrupted(name: str, key, x, index):
  return jnp.clip(CORRUPTIONS[name](key, x, index), 0, 1)


def corrupted(name: str, key: jax.Array, x, severity: int):
  """A batch (n, height, width, 3) of pixels in 0..1, in 0..1 again; severity 1 to 5; sides in 8s for JPEG."""
  require(1 <= severity <= SEVERITIES, f"severity is {severity}; it is 1 to {SEVERITIES}")
  return _corrupted(name, key, x, severity - 1)
