"""The theorems on random instances: over finite fields, over the reals in any units, and for matroids."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import Claim
from jaxlab.tensors import fields, linkage, linkage_graphs

PRIME = 32749  # stands for the rationals: small integers have their ranks there but for accidents


def random_spaces(p: int, instances: int, size: int, seed: int):
  """Pairs over 3 * size columns, of random density, rank and number of columns that are used (the others are zero).

  Of two draws the larger number of columns is used: many rows over few columns are everything, and nothing is shared.
  """
  rng = np.random.default_rng(seed)
  use = lambda: np.arange(size) < rng.integers(1, size + 1, (2, instances)).max(0)[:, None]
  s, shared, q = use(), use(), use()

  def draw(columns):
    dense = rng.random((instances, size, 2 * size)) < rng.uniform(0.2, 1.0, (instances, 1, 1))
    rows = (np.arange(size) < rng.integers(0, size + 1, instances)[:, None])[:, :, None]
    return jnp.asarray(rng.integers(0, p, dense.shape) * dense * rows * columns[:, None], fields.dtype_of(p))

  return draw(np.concatenate([s, shared], 1)), draw(np.concatenate([shared, q], 1))


def check_identities(p: int, config) -> dict:
  """Failures of every identity, and the mean size of the overlap before and after."""
  size, instances = config.identities.size, config.identities.instances
  a, b = random_spaces(p, instances, size, config.seed)
  result = jax.jit(jax.vmap(lambda a, b: identities(a, b, size, p)))(a, b)
  before = float(np.mean(np.any(np.asarray(a[:, :, size:]) != 0, 1).sum(-1)))
  failures = {name: int(np.sum(~np.asarray(ok))) for name, ok in result.items() if name != "size"}
  return {
    "instances": instances,
    "failures": failures,
    "before": before,
    "after": float(np.mean(result["size"])),
    "sizes": np.bincount(result["size"]).tolist(),
  }


def identities(a, b, size: int, p: int) -> dict:
  """F1 dimension, F2 duality, minimisation: same link, |P'| = lambda, full restrictions and zero contractions (F5)."""
  n, rank = size, lambda m: linkage.rank(m, p)
  on_s, on_p = jnp.arange(2 * n) < n, jnp.arange(2 * n) >= n
  same = lambda x, y: jnp.all(x == y)
  whole = linkage.link(a, b, n, n, n, p)
  from_a, from_b = linkage.contract(a, on_p, p)[:, n:], linkage.contract(b, on_s, p)[:, :n]
  restricted, contracted = linkage.intersect(a[:, n:], b[:, :n], p), linkage.intersect(from_a, from_b, p)
  outside = rank(linkage.contract(a, on_s, p)) + rank(linkage.contract(b, on_p, p))
  dual_b = linkage.perp(b, p)
  dual_b = jnp.where(on_s, fields.negate(dual_b, p), dual_b)
  small_a, small_b, kept, count = linkage.minimise_overlap(a, b, n, n, n, p)
  p_nonzero = jnp.any(small_a[:, n:] != 0, 0) | jnp.any(small_b[:, :n] != 0, 0)
  p_a, p_b = small_a[:, n:], small_b[:, :n]
  c_a, c_b = linkage.contract(small_a, on_p, p), linkage.contract(small_b, on_s, p)
  return {
    "dimension": rank(whole) == outside + rank(restricted) - rank(contracted),
    "duality": same(linkage.perp(whole, p), linkage.link(linkage.perp(a, p), dual_b, n, n, n, p)),
    "same link": same(linkage.link(small_a, small_b, n, n, n, p), whole),
    "minimum": count == linkage.connectivity(whole, on_s, p),
    "subset": ~jnp.any(jnp.where(kept, jnp.all(a[:, n:] == 0, 0) & jnp.all(b[:, :n] == 0, 0), p_nonzero)),
    "irreducible": (rank(p_a) == count) & (rank(p_b) == count) & (rank(c_a) == 0) & (rank(c_b) == 0),
    "size": count,
  }


def check_matroids(config) -> dict:
  """The matroid link against the column matroid of the vector link, with random scales on P and without any.

  Counts subsets whose rank differs from the scaled link's, pairs whose connectivity exceeds |P|, and pairs where the
  unscaled link has a lower or a higher rank somewhere.
  """
  n, pairs, p = config.matroids.size, config.matroids.pairs, fields.LARGE
  rng = np.random.default_rng(config.seed)

  def ranks(a, b, key):
    scaled, plain = linkage_graphs.generic_link(a, b, n, n, n, key, p), linkage.link(a, b, n, n, n, p)
    table = linkage_graphs.link_rank_table(a, b, n, n, n, p)
    return table, *jax.vmap(lambda m: linkage_graphs.rank_table(m, p))(jnp.stack([scaled, plain]))

  with jax.enable_x64(True):
    a, b = (jnp.asarray(rng.integers(0, 2, (pairs, n, 2 * n)), jnp.int64) for _ in range(2))
    keys = jax.random.split(jax.random.key(config.seed), pairs)
    exact, scaled, plain = map(np.asarray, jax.jit(jax.vmap(ranks))(a, b, keys))
  on_s = 2**n - 1
  connectivity = exact[:, on_s] + exact[:, -1 - on_s] - exact[:, -1]
  return {
    "pairs": pairs,
    "mismatches": int(np.sum(exact != scaled)),
    "bound_violations": int(np.sum(connectivity > n)),
    "unscaled_lower": int(np.any(plain < exact, 1).sum()),
    "unscaled_higher": int(np.any(plain > exact, 1).sum()),
    "unscaled_differs": int(np.any(plain != exact, 1).sum()),
  }


def check_reals(config) -> dict:
  """Instances whose rank, connectivity or least overlap over the reals differ from those over a large prime.

  The integers of the instances, every column in a unit of its own between 1e-9 and 1e9, every row too.
  """
  n, r = config.identities.size, config.reals
  rng, count = np.random.default_rng(config.seed), config.reals.instances
  on_s = jnp.arange(2 * n) < n

  def numbers(a, b, p):
    whole = linkage.link(a, b, n, n, n, p)
    least = linkage.minimise_overlap(a, b, n, n, n, p)[3]
    found = jnp.stack([linkage.rank(whole, p), linkage.connectivity(whole, on_s, p), least])
    masks = (None, on_s, ~on_s)
    return found, [] if p else jnp.array([fields.gap(a), fields.gap(b), *(fields.gap(whole, mask) for mask in masks)])

  with jax.enable_x64(True):
    a, b = random_spaces(3, count, n, config.seed)
    expected = np.asarray(jax.jit(jax.vmap(lambda a, b: numbers(a, b, PRIME)[0]))(a, b))
    s, p, q = (10.0 ** rng.integers(-9, 10, (count, 1, n)) for _ in range(3))
    rows = lambda: 10.0 ** rng.integers(-3, 4, (count, n, 1))
    scaled = jnp.concatenate([s, p], 2) * a * rows(), jnp.concatenate([p, q], 2) * b * rows()
    mapped = jax.jit(lambda *pair: jax.lax.map(lambda x: numbers(*x, 0), pair, batch_size=r.batch))
    found, gaps = map(np.asarray, mapped(*scaled))
  return {
    "instances": count,
    "different": int(np.any(found != expected, 1).sum()),
    "singular_values": [float(gaps[..., 0].min()), float(gaps[..., 1].max())],
  }


def claims(found: dict, reals: dict | None, matroids: dict) -> list[Claim]:
  total = sum(r["instances"] for r in found.values())
  names = list(next(iter(found.values()))["failures"])
  failures = {name: sum(r["failures"][name] for r in found.values()) for name in names}
  made = [
    Claim(
      f"Failures of {len(names)} theorems about links and least overlaps on random spaces over finite fields", "",
      "lower", ours=float(sum(failures.values())), threshold=0.0, paper=0.0, baseline="theorems",
      note=f"{total} instances over {', '.join(f'GF({p})' for p in found)}; "
      + ", ".join(f"{name} {count}" for name, count in failures.items()),
    )
  ]  # fmt: skip
  if reals:
    kept, dropped = reals["singular_values"]
    made.append(
      Claim(
        "Random spaces over the reals, columns in units of 1e-9 to 1e9, with another rank or least overlap than exact",
        "", "lower", ours=float(reals["different"]), threshold=0.0, baseline=f"GF({PRIME})",
        note=f"{reals['instances']} instances; shares of the largest singular value taken as nonzero from {kept:.2g}, "
        f"as zero up to {dropped:.1g}, of both spaces, their link and its two sides; the limit is {fields.TOLERANCE:g}",
      )
    )  # fmt: skip
  pairs = matroids["pairs"]
  made += [
    Claim(
      "Subsets of elements where the link of two matroids and the link of their spaces, scaled at random, differ", "",
      "lower", ours=float(matroids["mismatches"]), threshold=0.0,
      baseline=f"{matroids['unscaled_differs']} of {pairs} pairs differ without scaling",
    ),
    Claim(
      "Pairs of matroids whose link is more connected than they share elements", "", "lower",
      ours=float(matroids["bound_violations"]), threshold=0.0, baseline="theorem", note=f"{pairs} pairs",
    ),
  ]  # fmt: skip
  return made
