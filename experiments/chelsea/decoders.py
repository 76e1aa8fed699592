"""Decoders that are compared: Chelsea, caches that evict as many bytes, and other ways of merging."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.cache import eviction
from jaxlab.cache.chelsea import chelsea
from jaxlab.cache.chelsea_merging import compress, kept, schedule
from jaxlab.cache.entries import Entries
from jaxlab.models import paged
from jaxlab.models.generate import Decoder

DENSE = "dense"
_ITERATIONS = 10  # of k-means


def of_chelsea(config, keep: float, **options) -> Decoder:
  how = config.method.to_dict() | options
  return paged.decoder(paged.DENSE, decode=chelsea(keep=keep, **how), chunk=256, page=64)


def of_rival(config, name: str, keep: float, **sizes) -> Decoder:
  """A cache that evicts, with the bytes of Chelsea's (`rival_keep`)."""
  share = rival_keep(config.method, keep, **sizes)
  return paged.decoder(eviction.METHODS[name](keep=share), chunk=256, page=64)


def rival_keep(m, keep: float, *, time: int, bytes_of_entry: int) -> float:
  """Share of a prompt of `time` tokens that takes as many bytes as Chelsea's entries: centroids have a count too."""
  return min(1.0, entries(m, keep, time) * (1 + 4 / bytes_of_entry) / time)


def entries(m, keep: float, time: int) -> int:
  """Entries of a head that Chelsea with the method's config m holds after a prompt of `time` tokens."""
  merged = max(0, (time - m.sink - m.recent) // m.chunk * m.chunk)
  return time - merged + kept(merged, keep, m.chunk)


def entry_bytes(subject) -> int:
  """Of one key and value."""
  return 2 * subject.network.model.config.head_dim * jnp.dtype(subject.network.model.dtype).itemsize


def mergings(config, keep: float) -> dict[str, Decoder]:
  """Chelsea and what it is compared with as a way of merging, all of which leave as many entries in a layer they merge.

  Then Chelsea at the other shares, and at other chunks, which leave another rest unmerged.
  """
  by = lambda merging, **options: of_chelsea(config, keep, merging=merging, **options)
  made = {
    "Chelsea": of_chelsea(config, keep),
    "any half proposes": by(functools.partial(compress, partition="random")),
    "the first half proposes": by(functools.partial(compress, partition="halves")),
    "twice the rounds": of_chelsea(config, **twice_the_rounds(config, keep)),
    "neighbours": by(functools.partial(compress, likeness="neighbours")),
    "by chance": by(functools.partial(compress, likeness="chance")),
    "no chunks": by(without_chunks),
    "into the nearest kept": by(into_nearest),
    "k-means": by(k_means),
    "rescaled keys": by(functools.partial(compress, rescale=True)),
    "no counts": of_chelsea(config, keep, size_bias=False),
    "first layers whole": of_chelsea(config, keep, skip_layers=(0, 1)),
    "merged while read": paged.decoder(
      chelsea(keep=keep, during_prefill=True, **config.method.to_dict()), chunk=256, page=64
    ),
  }
  made = {name: made[name] for name in config.mergings.compared}
  made |= {f"Chelsea {share:g}": of_chelsea(config, share) for share in config.keeps if share != keep}
  return made | {f"chunks of {size}": of_chelsea(config, keep, chunk=size) for size in config.mergings.chunks}


def twice_the_rounds(config, keep: float) -> dict:
  """{keep, rounds} that leave no more entries of a prompt: what fills no chunk passes through every round."""
  m, time = config.method, config.mergings.read.prompt
  rounds = 2 * len(schedule(m.chunk, keep, m.chunk))
  merged = time - m.sink - m.recent - (time - m.sink - m.recent) % m.chunk
  fits = lambda share: kept(merged, share, m.chunk, rounds) <= kept(merged, keep, m.chunk)
  return {"keep": next(share for share in np.linspace(keep, keep / 4, 200).tolist() if fits(share)), "rounds": rounds}


def without_chunks(entries: Entries, *, keep: float, chunk: int, rounds: int | None = None, count=None) -> Entries:
  """Bipartite soft matching of all entries at once (ToMe, Bolya et al. 2023, arXiv 2210.09461)."""
  return compress(entries, keep=keep, chunk=len(entries.size), rounds=rounds, count=count)


def into_nearest(entries: Entries, *, keep: float, chunk: int, rounds: int | None = None, count=None) -> Entries:
  """The entries least like the mean stay, the others are merged into the one of them that is most like each.

  After D2O (Wan et al. 2024, arXiv 2406.13035), its scores of attention replaced by those of KeyDiff, which, as all of
  these do, knows no query.
  """
  places, clusters = _clusters(len(entries.size), keep, chunk, rounds, count)
  unit, full = _unit(entries.keys), entries.size > 0
  mean = _unit(jnp.where(full[:, None], unit, 0).sum(axis=0))
  _, at = jax.lax.top_k(jnp.where(full, -(unit @ mean), -jnp.inf), places)
  number = jnp.arange(places)
  at = jnp.sort(jnp.where(number < clusters, at, len(full)))  # those past the end are none
  alike = jnp.where((number < clusters) & full[at], unit @ unit[at].T, -jnp.inf)
  cluster = jnp.argmax(alike, axis=1).at[at].set(number)
  return _means(entries, cluster, places)


def k_means(entries: Entries, *, keep: float, chunk: int, rounds: int | None = None, count=None) -> Entries:
  """Lloyd's iterations from entries at equal distances: clusters of any reach, too slow to make while decoding."""
  places, clusters = _clusters(len(entries.size), keep, chunk, rounds, count)
  full, number = entries.size > 0, jnp.arange(places)
  keys = jnp.where(full[:, None], entries.keys, 0).astype(jnp.float32)
  start = number * (len(full) if count is None else count) // jnp.maximum(clusters, 1)

  def nearest(centre, size):
    away = jnp.square(centre).sum(axis=1) - 2 * keys @ centre.T
    return jnp.argmin(jnp.where(size > 0, away, jnp.inf), axis=1)

  def once(_, carry):
    centre, size = carry
    found = _means(entries._replace(keys=keys), nearest(centre, size), places)
    return jnp.where(found.size[:, None] > 0, found.keys, centre), found.size

  begin = keys[start], jnp.where(number < clusters, entries.size[start], 0)
  centre, size = jax.lax.fori_loop(0, _ITERATIONS, once, begin)
  return _means(entries, nearest(centre, size), places)


def _clusters(n: int, keep: float, chunk: int, rounds: int | None, count):
  """(places for them, how many) of n entries or, where it is given, of the first `count`."""
  if count is None:
    return (kept(n, keep, chunk, rounds),) * 2
  left = np.array([kept(i, keep, chunk, rounds) for i in range(n + 1)])
  return int(left.max()), jnp.asarray(left)[count]


def _means(entries: Entries, cluster, count: int) -> Entries:
  total = functools.partial(jax.ops.segment_sum, segment_ids=cluster, num_segments=count)
  size, full = total(entries.size), (entries.size > 0)[:, None]

  def mean(a):
    summed = total(jnp.where(full, a, 0).astype(jnp.float32) * entries.size[:, None])
    return (summed / jnp.maximum(size, 1)[:, None]).astype(a.dtype)

  return Entries(mean(entries.keys), mean(entries.values), size)


def _unit(a):
  a = a.astype(jnp.float32)
  return a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)


def formula(case: dict, keep: float) -> float:
  """How many times as fast a step is that reads a layer's weights and the share `keep` of its keys and values."""
  x = case["cache_bytes"] / case["weight_bytes"]
  return (1 + x) / (1 + keep * x) if math.isfinite(x) else 1 / keep
