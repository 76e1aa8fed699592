"""Cached chunks of text, in several variants each, on the device, in the host's memory and on disk (Cache-Craft).

A variant is a chunk's keys (before rotation) and values as they came out behind certain other chunks, with what its
tokens attended to there. What is on the device is used as it is; what is not is loaded stage by stage, a stage being
some of the layers, so that the first can be computed while later ones are on their way.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from jaxlab.core.checks import require, require_counts
from jaxlab.core.files import write_files
from jaxlab.serving.cache_craft_scores import recompute_share

DEVICE, HOST, DISK = "device", "pinned_host", "disk"
_BELOW = {DEVICE: HOST, HOST: DISK, DISK: None}
_DECAY = 0.99  # of a variant's use, with every request
_LEAST_SHARE = 0.05  # no use counts for more than its inverse
_WORTH_KEEPING = 0.3  # share recomputed from which a new variant may replace another


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of a variant besides its keys and values.

  Attributes:
    chunk: its name; prefix: names of the chunks before it (the system prompt is not one), sizes: their tokens.
    attention: float32[tokens, 1 + prefix], summed over layers: to its own chunk, then to every chunk before.
    received: float32[tokens], attention that the tokens got from all that came, summed over layers.
    layers: of the model.
    exact: all of it was computed behind an exact prefix. repairs: how often parts were computed anew since it last was
      computed whole.
  """

  chunk: bytes
  prefix: tuple[bytes, ...]
  sizes: tuple[int, ...]
  attention: Float[np.ndarray, "tokens groups"]
  received: Float[np.ndarray, "tokens"]
  layers: int
  exact: bool = True
  repairs: int = 0

  @property
  def tokens(self) -> int:
    return len(self.attention)

  @property
  def score(self) -> Float[np.ndarray, "tokens"]:
    """u, of every token: its attention to the chunks before."""
    return self.attention[:, 1:].sum(axis=1)

  def share(self, prefix: Sequence[bytes], **how) -> float:
    """CFO behind another prefix (`recompute_share`)."""
    return recompute_share(self.attention, self.prefix, self.sizes, prefix, layers=self.layers, **how)


@dataclasses.dataclass(eq=False)
class Variant:
  """A record and where its keys and values lie.

  Attributes:
    parts: (keys, values) of every stage, (layers, tokens, kv_heads, head_dim) each; files where it is on disk.
    use: how much it was used, as of request number `at`; number: of its making.
  """

  record: Record
  parts: list
  tier: str
  bytes: int
  use: float
  at: int
  number: int


class ChunkStore:
  """Variants of at most `chunks` chunks, at most `variants` of each, within the bytes of three tiers.

  store = ChunkStore([bos], chunks=100, variants=5, device_bytes=2**30, host_bytes=2**33)

  Args:
    system: the tokens that begin every prompt, at least one: the first tokens of a prompt draw attention whatever they
      are, and a chunk that was cached as such would be of no use elsewhere. Their keys and values stay on the device
      beside the store's bytes.
    salt: what keys and values depend on beside the tokens: the model.
    stages: layers at which `cache_craft.serve` divides its pass, ascending; of a chunk on the host, those before the
      first are loaded before anything is computed (`preload_depth` says how many that should be).
    folder: of the disk's tier; needed with disk_bytes.

  Variants of least worth go down a tier where one is full, and out at the end: worth is the use of a variant (the
  inverse of the share that had to be computed again, fading by a hundredth with every request) times tokens / bytes.
  """

  def __init__(
    self,
    system: Sequence[int],
    *,
    chunks: int = 100,
    variants: int = 5,
    device_bytes: int = 2**30,
    host_bytes: int = 0,
    disk_bytes: int = 0,
    stages: Sequence[int] = (),
    salt: str = "",
    folder: Path | None = None,
  ):
    require_counts(chunks=chunks, variants=variants)
    require(len(system) > 0, "the system prompt is empty; give at least the token that begins a document")
    require(disk_bytes == 0 or folder is not None, "disk_bytes needs folder=..., where the files go")
    ascending = all(a < b for a, b in itertools.pairwise([0, *stages]))
    require(ascending, f"stages are {tuple(stages)}; they must be layers from 1 on, ascending")
    self.system = np.asarray(system, np.int32)
    self.chunks, self.variants, self.stages, self.folder = chunks, variants, tuple(stages), folder
    self.budget = {DEVICE: device_bytes, HOST: host_bytes, DISK: disk_bytes}
    self.system_parts: list | None = None
    self._by_chunk: dict[bytes, list[Variant]] = {}
    self._now, self._numbers = 0, itertools.count()
    self._root = hashlib.blake2b(salt.encode() + self.system.tobytes(), digest_size=16).digest()

  def name(self, tokens: Sequence[int]) -> bytes:
    """Of a chunk: a hash of its tokens, the system prompt and the salt."""
    return hashlib.blake2b(self._root + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()

  def of(self, chunk: bytes) -> tuple[Variant, ...]:
    """The variants of a chunk, the oldest first."""
    return tuple(self._by_chunk.get(chunk, ()))

  def __len__(self) -> int:
    return sum(map(len, self._by_chunk.values()))

  def used(self, tier: str) -> int:
    """Bytes of a tier that are taken."""
    return sum(v.bytes for v in self._all() if v.tier == tier)

  def tick(self) -> None:
    """A new request."""
    self._now += 1

  def load(self, variant: Variant, stage: int) -> tuple[jax.Array, jax.Array]:
    """The keys and values of a stage on the device; it does not wait for them."""
    part = variant.parts[stage]
    if variant.tier == DISK:
      part = [np.memmap(file, kind, "r", shape=shape) for file, kind, shape in part]
    return part if variant.tier == DEVICE else jax.device_put(part, _sharding(DEVICE))

  def touch(self, variant: Variant, share: float) -> None:
    """Counts a use of which `share` had to be computed again; the variant goes to the device if it is worth it."""
    variant.use, variant.at = self._use(variant) + 1 / max(share, _LEAST_SHARE), self._now
    if variant.tier != DEVICE and variant in self._by_chunk.get(variant.record.chunk, ()):
      room = self.budget[DEVICE] - self.used(DEVICE)
      for other in sorted((v for v in self._all() if v.tier == DEVICE), key=self._order):
        if room >= variant.bytes or self._order(other) > self._order(variant):
          break
        room += other.bytes
      if room >= variant.bytes:
        self._move(variant, DEVICE)
        self._settle()

  def put(self, record: Record, parts: Sequence[tuple[jax.Array, jax.Array]], share: float = 1.0) -> bool:
    """Stores a variant of which `share` was computed for it; whether it was kept.

    Where its chunk has all the variants it may have, the one of least worth leaves, if the share was above 0.3.
    """
    mine = self._by_chunk.setdefault(record.chunk, [])
    same = next((v for v in mine if v.record.prefix == record.prefix), None)
    if same is not None and (record.exact, -record.repairs) > (same.record.exact, -same.record.repairs):
      self._drop(same)  # a better one behind the same chunks
    elif same is not None:
      return False
    if len(mine) >= self.variants:
      if share <= _WORTH_KEEPING:
        return False
      self._drop(min(mine, key=self._order))
    size = sum(a.nbytes for part in parts for a in part) + record.attention.nbytes + record.received.nbytes
    new = Variant(record, list(parts), DEVICE, size, 1.0, self._now, next(self._numbers))
    mine = self._by_chunk.setdefault(record.chunk, [])
    mine.append(new)
    while len(self._by_chunk) > self.chunks:
      worth = lambda chunk: (sum(self._order(v)[0] for v in self._by_chunk[chunk]), self._by_chunk[chunk][0].number)
      least = min((chunk for chunk in self._by_chunk if chunk != record.chunk), key=worth)
      for variant in self.of(least):
        self._drop(variant)
    self._settle()
    return new in mine

  def _all(self):
    return (v for mine in self._by_chunk.values() for v in mine)

  def _use(self, variant: Variant) -> float:
    return variant.use * _DECAY ** (self._now - variant.at)

  def _order(self, variant: Variant) -> tuple[float, int]:
    """Worth; of equal ones the older is worth less."""
    return self._use(variant) * variant.record.tokens / variant.bytes, variant.number

  def _settle(self) -> None:
    for tier, below in _BELOW.items():
      while self.used(tier) > self.budget[tier]:
        least = min((v for v in self._all() if v.tier == tier), key=self._order)
        while below is not None and least.bytes > self.budget[below]:
          below = _BELOW[below]
        self._drop(least) if below is None else self._move(least, below)

  def _move(self, variant: Variant, tier: str) -> None:
    if tier == DISK:
      folder, files = Path(self.folder), []
      for stage, part in enumerate(variant.parts):
        named = {f"{variant.number}.{stage}.{kind}": a for kind, a in zip(("keys", "values"), part, strict=True)}
        write_files(folder, {n: lambda out, a=a: out.write(np.asarray(a).tobytes()) for n, a in named.items()})
        files.append([(folder / name, a.dtype, a.shape) for name, a in named.items()])
      variant.parts = files
    else:
      parts = [self.load(variant, i) if variant.tier == DISK else part for i, part in enumerate(variant.parts)]
      self._unlink(variant)
      variant.parts = [tuple(jax.device_put(part, _sharding(tier))) for part in parts]
    variant.tier = tier

  def _drop(self, variant: Variant) -> None:
    self._unlink(variant)
    mine = self._by_chunk[variant.record.chunk]
    mine.remove(variant)
    if not mine:
      del self._by_chunk[variant.record.chunk]

  def _unlink(self, variant: Variant) -> None:
    if variant.tier == DISK:
      for part in variant.parts:
        for file, *_ in part:
          file.unlink(missing_ok=True)


def _sharding(kind: str):
  return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def layers_of(stages: Sequence[int], depth: int) -> list[tuple[int, int]]:
  """(first, last + 1) of every stage of a model of `depth` layers."""
  require(all(layer < depth for layer in stages), f"stages {tuple(stages)} need more than {depth} layers")
  return [*itertools.pairwise([0, *stages, depth])]
