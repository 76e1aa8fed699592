"""BOWS: bag-of-words superposition, how correlations shape feature geometry (Prieto et al. 2026, arXiv 2603.09972).

d binary features x share m < d dimensions of an autoencoder with a linear latent,

  h = W x,   x^ = phi(W^T h + b),   phi = ReLU or identity,

so that word v reads, in the context S of the active words,

  p_v(S) = b_v + ||w_v||^2 [v in S] + sum_{u in S, u != v} w_v . w_u:      bias + self + interference.

Interference is constructive when it is positive for the words that are present. With phi = identity the optimum is
PCA: W^T W projects on the top m eigenvectors of Cov(x), b = (I - W^T W) mean(x). Untied models have their own decoder,
and G = decoder W takes the place of the Gram matrix W^T W. Usage:

  params = init_params(jax.random.key(0), features=2000, latent=100)
  params, losses = train(params, bits, features=2000, steps=800, batch=512, rate=5e-4, weight_decay=1.0)
  print(evaluate(params, bits, 2000)["interference_present"])
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import require, require_choice
from jaxlab.core.precision import exactly
from jaxlab.tensors.bows_data import check_bits, unpack

OUTPUTS = ("relu", "linear")
LOSSES = ("mse", "mse_sigmoid", "bce")
LATENTS = ("linear", "relu")

Params = dict[str, Array]


def init_params(key: jax.Array, *, features: int, latent: int, tied: bool = True, bound: float | None = None) -> Params:
  """{"W": (m, d), "b": (d,)} and, untied, "decoder": (d, m), all uniform within +-bound; b = 0.

  The default bound sqrt(2 / d) is kaiming-uniform with a = sqrt 2 on the (m, d) encoder; 1 / sqrt(d) is torch's
  default for a linear layer (the synthetic models).

  Raises:
    InputError: latent or features below 1.
  """
  require(latent >= 1 and features >= 1, f"latent is {latent} and features {features}; both must be at least 1")
  bound = (2 / features) ** 0.5 if bound is None else bound
  encoder, decoder = jax.random.split(key)
  params = {
    "W": jax.random.uniform(encoder, (latent, features), minval=-bound, maxval=bound),
    "b": jnp.zeros(features),
  }
  if not tied:
    params["decoder"] = jax.random.uniform(decoder, (features, latent), minval=-bound, maxval=bound)
  return params


def preactivation(params: Params, x: Float[Array, "*batch d"], *, latent: str = "linear") -> Float[Array, "*batch d"]:
  """W^T W x + b, or decoder W x + b."""
  h = x @ params["W"].T
  if latent == "relu":
    h = jax.nn.relu(h)
  return h @ (params["decoder"].T if "decoder" in params else params["W"]) + params["b"]


def reconstruct(params: Params, x: Float[Array, "*batch d"], *, output: str = "relu", latent: str = "linear"):
  """x^ = phi(preactivation)."""
  p = preactivation(params, x, latent=latent)
  return jax.nn.relu(p) if output == "relu" else p


def loss_function(
  params: Params, x: Float[Array, "batch d"], *, output: str = "relu", loss: str = "mse", latent: str = "linear"
) -> Float[Array, ""]:
  """Mean over the batch AND the features: a sum would change training, for Adam's eps is not small beside 1e-7.

  "mse" of x^; "mse_sigmoid" of sigmoid(preactivation); "bce" with the preactivation as logits.
  """
  if loss == "mse":
    return jnp.mean((reconstruct(params, x, output=output, latent=latent) - x) ** 2)
  p = preactivation(params, x, latent=latent)
  if loss == "mse_sigmoid":
    return jnp.mean((jax.nn.sigmoid(p) - x) ** 2)
  return jnp.mean(optax.sigmoid_binary_cross_entropy(p, x))


def train(
  params: Params,
  bits: UInt8[Array, "n bytes"],
  *,
  features: int,
  steps: int,
  batch: int,
  rate: float,
  weight_decay: float | Float[Array, ""] = 0.0,
  clip: float | None = None,
  schedule_every: int = 1,
  output: str = "relu",
  loss: str = "mse",
  latent: str = "linear",
  seed: int | Int[Array, ""] = 0,
) -> tuple[Params, Float[Array, "steps"]]:
  """(trained parameters, loss of every step): AdamW over shuffled epochs, in one scan; vmap it over seeds and decays.

  Decay is decoupled and acts on b too: every parameter shrinks by 1 - lr_t weight_decay a step. The rate falls as a
  cosine to 0, changing every `schedule_every` steps. What decay does depends on rate x weight_decay x steps: a shorter
  run with the same decay is less regularised.

  Raises:
    InputError: unknown output, loss or latent; a batch larger than the data; no steps; bits that are not packed rows of
      `features`, or parameters of another number.
  """
  require_choice("output", output, OUTPUTS)
  require_choice("loss", loss, LOSSES)
  require_choice("latent", latent, LATENTS)
  bits = _checked(params, bits, features)
  require(1 <= batch <= len(bits), f"batch is {batch} with {len(bits)} samples; it must lie in 1..{len(bits)}")
  require(steps >= 1, f"steps is {steps}; it must be at least 1")
  per_epoch = len(bits) // batch
  epochs = jnp.arange(-(-steps // per_epoch))
  shuffle = lambda epoch: jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), len(bits))
  order = jax.vmap(shuffle)(epochs)[:, : per_epoch * batch].reshape(-1, batch)[:steps]
  optimizer = adamw(rate, steps, weight_decay, schedule_every)
  if clip is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
  objective = functools.partial(loss_function, output=output, loss=loss, latent=latent)

  def step(carry, index):
    params, state = carry
    value, gradient = jax.value_and_grad(objective)(params, unpack(bits[index], features))
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), value

  (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), order)
  return params, losses


def adamw(rate: float, steps: int, weight_decay, schedule_every: int = 1) -> optax.GradientTransformation:
  """torch's AdamW: betas (0.9, 0.999), eps 1e-8 outside the root, decay times the scheduled rate, biases included."""
  periods = max(1, steps // schedule_every)
  schedule = lambda count: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(count // schedule_every, periods) / periods)) / 2
  return optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=None)


class Pca(NamedTuple):
  """The best linear autoencoder of each size is a projector on `vectors[:, :m]`."""

  values: Float[Array, "d"]
  vectors: Float[Array, "d d"]
  mean: Float[Array, "d"]

  def loss(self, latent: int) -> Float[Array, ""]:
    """sum_{i > m} lambda_i / d."""
    return jnp.sum(self.values[latent:]) / len(self.values)

  def params(self, latent: int) -> Params:
    """W = the top eigenvectors, b = (I - W^T W) mean."""
    w = self.vectors[:, :latent].T
    return {"W": w, "b": self.mean - w.T @ (w @ self.mean)}


@exactly
def pca(x: Float[Array, "n d"]) -> Pca:
  """Eigenvalues (falling) and eigenvectors of the covariance of x."""
  mean = x.mean(axis=0)
  values, vectors = jnp.linalg.eigh((x - mean).T @ (x - mean) / len(x))
  return Pca(jnp.maximum(values[::-1], 0), vectors[:, ::-1], mean)


@exactly
def gram(params: Params, index: Int[Array, "k"] | None = None) -> Float[Array, "k k"]:
  """G_vu = how much word u adds to word v's pre-activation: W^T W, or decoder W; a subset of words if given."""
  pick = (lambda a: a) if index is None else (lambda a: a[:, jnp.asarray(index)])
  encoder = pick(params["W"])
  return (pick(params["decoder"].T) if "decoder" in params else encoder).T @ encoder


def decompose(params: Params, x: Float[Array, "*batch d"]) -> dict[str, Float[Array, "*batch d"]]:
  """p_v(S) split into its bias, self and interference parts (linear latent); they add up to `preactivation`."""
  decoder = params["decoder"] if "decoder" in params else params["W"].T
  own = jnp.sum(decoder * params["W"].T, axis=-1) * x
  bias = jnp.broadcast_to(params["b"], x.shape)
  return {"bias": bias, "self": own, "interference": preactivation(params, x) - bias - own}


def towers(params: Params, target: int, groups: dict[str, list[int]]) -> dict[str, float]:
  """Bias, self and the summed contribution of each group of words to the target's pre-activation."""
  row = gram_row(params, target)
  parts = {"bias": params["b"][target], "self": row[target]}
  parts |= {name: row[jnp.array([u for u in words if u != target], int)].sum() for name, words in groups.items()}
  return {name: float(value) for name, value in parts.items()}


def gram_row(params: Params, word: int) -> Float[Array, "d"]:
  """w_word . w_u of all u."""
  return (params["decoder"][word] if "decoder" in params else params["W"][:, word]) @ params["W"]


@functools.partial(jax.jit, static_argnames="output")
@exactly
def accumulate(params: Params, x: Float[Array, "n d"], *, output: str = "relu") -> dict[str, Float[Array, "d"]]:
  """Per-word sums over a batch; add the dictionaries of batches, then `word_statistics`."""
  parts = decompose(params, x)
  p = parts["bias"] + parts["self"] + parts["interference"]
  error = (jax.nn.relu(p) if output == "relu" else p) - x
  total = lambda a: jnp.sum(a, axis=0)
  return {
    "count": jnp.full(x.shape[1], x.shape[0], jnp.float32),
    "active": total(x),
    "squared_error": total(error**2),
    "interference": total(parts["interference"]),
    "interference_active": total(parts["interference"] * x),
    "positive": total(p > 0),
    "positive_active": total((p > 0) * x),
  }


def evaluate(
  params: Params, bits: UInt8[np.ndarray, "n bytes"], features: int, *, output: str = "relu", batch: int = 2048
) -> dict[str, np.ndarray]:
  """`word_statistics` over all windows, a batch at a time.

  Raises:
    InputError: bits that are not packed rows of `features`, or parameters of another number.
  """
  bits = _checked(params, bits, features)
  sums = None
  for at in range(0, len(bits), batch):
    part = accumulate(params, unpack(bits[at : at + batch], features), output=output)
    sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
  return word_statistics(sums)


def _checked(params, bits, features):
  words = params["b"].shape[-1]
  require(words == features, f"features is {features}, the parameters are of {words} words; give one number for both")
  return check_bits(bits, features)


def word_statistics(sums: dict[str, Float[Array, "d"]]) -> dict[str, np.ndarray]:
  """Per-word R2 and interference, and their means, in float64.

  R2_v = 1 - sum (x - x^)^2 / (sum x^2 - (sum x)^2 / n); words that are never or always active are NaN. `present` and
  `absent` are means over all (window, word) pairs where the word is or is not in the window; frequent words weigh more
  in the former, so `interference_within` takes the difference word by word before it averages (by active count).
  """
  s = {name: np.asarray(value, np.float64) for name, value in sums.items()}
  silent = s["count"] - s["active"]
  spread = s["active"] - s["active"] ** 2 / s["count"]
  with np.errstate(divide="ignore", invalid="ignore"):
    r2 = np.where(spread > 0, 1 - s["squared_error"] / spread, np.nan)
    received = np.where(s["active"] > 0, s["interference_active"] / s["active"], np.nan)
    without = np.where(silent > 0, (s["interference"] - s["interference_active"]) / silent, np.nan)
  absent = lambda name: (s[name] - s[f"{name}_active"]).sum() / silent.sum()
  present = lambda name: s[f"{name}_active"].sum() / s["active"].sum()
  return {
    "r2": r2,
    "mean_r2": np.nanmean(r2),
    "frequency_weighted_r2": np.nansum(r2 * s["active"]) / s["active"][np.isfinite(r2)].sum(),
    "received": received,
    "interference_present": present("interference"),
    "interference_absent": absent("interference"),
    "interference_within": np.nansum((received - without) * s["active"]) / s["active"].sum(),
    "positive_present": present("positive"),
    "positive_absent": absent("positive"),
  }


def one_hot_r2(params: Params, *, output: str = "relu") -> Float[Array, "d"]:
  """R2 of every word over the d one-word inputs, in closed form: x^_v(e_u) = phi(G_vu + b_v), denominator 1 - 1/d.

  One word is far from a natural window: a low value alone does not prove that interference is constructive.
  """
  p = gram(params) + params["b"][:, None]
  x_hat = jax.nn.relu(p) if output == "relu" else p
  d = len(params["b"])
  return 1 - jnp.sum((x_hat - jnp.eye(d)) ** 2, axis=1) / (1 - 1 / d)


def offdiagonal(matrix: Float[Array, "k k"]) -> Float[Array, "k*k-k"]:
  return matrix[~np.eye(len(matrix), dtype=bool)]


def offdiagonal_norm(matrix: Float[Array, "k k"]) -> float:
  """||G - diag(G)||_F."""
  return float(jnp.linalg.norm(offdiagonal(matrix)))


def offdiagonal_correlation(a: Float[Array, "k k"], b: Float[Array, "k k"]) -> float:
  """Pearson correlation of the off-diagonal entries: how much of the data's covariance the geometry shows."""
  return float(jnp.corrcoef(offdiagonal(jnp.asarray(a)), offdiagonal(jnp.asarray(b)))[0, 1])


def unit_columns(w: Float[Array, "m k"]) -> Float[Array, "m k"]:
  return w / jnp.maximum(jnp.linalg.norm(w, axis=0, keepdims=True), 1e-12)


def plane(vectors: Float[Array, "k m"], dimensions: int = 2) -> tuple[Float[Array, "k 2"], Float[Array, "2 m"]]:
  """(coordinates, axes) of the vectors' top principal plane; project others with (v - mean(vectors)) @ axes.T."""
  centred = vectors - vectors.mean(axis=0)
  _, _, axes = jnp.linalg.svd(centred, full_matrices=False)
  return centred @ axes[:dimensions].T, axes[:dimensions]


def ring_score(w: Float[Array, "m k"]) -> int:
  """Neighbours in the given cyclic order that are neighbours in angle, in the plane of the unit columns; of k.

  Expected by chance: 2k / (k - 1), 2.2 for twelve months.
  """
  points = np.asarray(plane(unit_columns(w).T)[0])
  return cyclic_neighbours(np.argsort(np.arctan2(points[:, 1], points[:, 0])))


def cyclic_neighbours(order: Int[np.ndarray, "k"]) -> int:
  """Pairs next to each other in the circular `order` whose values differ by 1 mod k."""
  step = np.mod(np.roll(order, -1) - order, len(order))
  return int(np.sum((step == 1) | (step == len(order) - 1)))


def lag_curve(similarity: Float[Array, "k k"]) -> Float[np.ndarray, "k//2"]:
  """Mean of a cyclic k x k similarity at lags 1..k//2."""
  s, k = np.asarray(similarity), len(similarity)
  return np.array([np.mean([s[i, (i + lag) % k] for i in range(k)]) for lag in range(1, k // 2 + 1)])


def indicator_correlation(x: Float[np.ndarray, "n d"], index: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k k"]:
  """Correlation of some words' indicators over the windows with at least one of them."""
  chosen = np.asarray(x)[:, np.asarray(index)]
  return np.corrcoef(chosen[chosen.any(axis=1)].T)


def indicator_plane(x: Float[np.ndarray, "n d"], index: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k 2"]:
  """Every word's one-hot input in the top principal plane of the row-centred indicators."""
  chosen = np.asarray(x)[:, np.asarray(index)]
  chosen = chosen[chosen.any(axis=1)]
  chosen = chosen - chosen.mean(axis=1, keepdims=True)
  _, vectors = np.linalg.eigh(np.cov(chosen.T))
  return vectors[:, ::-1][:, :2]


@functools.partial(jax.jit, static_argnames=("clusters", "steps"))
def spherical_clusters(w: Float[Array, "m d"], key: jax.Array, *, clusters: int, steps: int = 50) -> Int[Array, "d"]:
  """k-means of the words by the cosine of their columns; empty clusters keep their centre."""
  words = unit_columns(w).T
  centres = words[jax.random.choice(key, len(words), (clusters,), replace=False)]

  def step(centres, _):
    member = jax.nn.one_hot(jnp.argmax(words @ centres.T, axis=1), clusters)
    sums = member.T @ words
    length = jnp.linalg.norm(sums, axis=1, keepdims=True)
    return jnp.where(length > 0, sums / jnp.maximum(length, 1e-12), centres), None

  centres, _ = jax.lax.scan(step, centres, length=steps)
  return jnp.argmax(words @ centres.T, axis=1)


def within_and_between(similarity: Float[np.ndarray, "d d"], labels: Int[np.ndarray, "d"]) -> tuple[float, float]:
  """Mean similarity of pairs in one cluster and of pairs in two."""
  s, same = np.asarray(similarity), np.equal.outer(labels, labels)
  pair = ~np.eye(len(s), dtype=bool)
  return float(s[same & pair].mean()), float(s[~same].mean())
