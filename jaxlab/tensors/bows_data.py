"""Data of BOWS: text as sparse binary windows, synthetic features on circles and spheres, and their controls.

A row (a paragraph) is the set of its words; a window is the union of `group` rows in a row, a binary vector over the
vocabulary. Rows are packed to bits, so that a window is a bitwise OR:

  rows = encode_rows(texts, vocabulary(texts, size=2000, seed=0))
  bits = or_rows(pack_rows(rows, 2000), starts, group=4)
  x = unpack(bits, 2000)
"""

import collections
import re
from collections.abc import Iterable, Sequence
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import require, require_choice


def _names(text: str) -> tuple[str, ...]:
  return tuple(text.split())


STRUCTURES = ("circular", "figure8", "sphere", "iid")
MONTHS = _names("January February March April May June July August September October November December")
ROMAN = _names("I II III IV V VI VII VIII IX X")
WEEKDAYS = _names("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PLANETS = _names("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")

# Rows shorter than this are the empty set, as in the authors' code.
_SHORTEST_ROW = 50
_NUMBERS = frozenset(map(str, range(101)))
_WORD = re.compile(r"[^\W\d_]+|\d+")
# English function words, in lower case and compared with the token as it is: "The" stays, as in the authors' code.
_STOP_WORDS = frozenset(
  _names(
    """a about above after again against all am an and any are as at be because been before being below between both but
  by can did do does doing don down during each few for from further had has have having he her here hers herself him
  himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or other
  our ours ourselves out over own s same she should so some such t than that the their theirs them themselves then there
  these they this those through to too under until up very was we were what when where which while who whom why will
  with you your yours yourself yourselves"""
  )
)


def paragraphs(document: str) -> list[str]:
  """The document's rows: blocks between blank lines."""
  return [block for block in re.split(r"\n\s*\n", document) if block.strip()]


def tokens(row: str) -> list[str]:
  """Words as they are written, without function words, and the numbers 0..100; none from a row below 50 characters."""
  if len(row) < _SHORTEST_ROW:
    return []
  return [t for t in _WORD.findall(row) if (t in _NUMBERS if t[0].isdigit() else t not in _STOP_WORDS)]


def vocabulary(
  rows: Sequence[str], *, size: int, seed: int, forced: Iterable[str] = (), share: float = 0.2
) -> dict[str, int]:
  """{word: index}: the forced words first, then the most frequent of a random share of the rows (ties by spelling).

  Raises:
    InputError: the rows hold fewer words than `size`.
  """
  chosen = np.random.default_rng(seed).random(len(rows)) < share
  counts = collections.Counter(t for row, use in zip(rows, chosen, strict=True) if use for t in tokens(row))
  ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
  words = list(dict.fromkeys([*forced, *ranked]))[:size]
  require(len(words) == size, f"the text has {len(words)} words for a vocabulary of {size}; lower it or give more text")
  return {word: i for i, word in enumerate(words)}


def encode_rows(rows: Iterable[str], words: dict[str, int]) -> list[list[int]]:
  """The vocabulary indices in each row, ascending, each once."""
  return [sorted({words[t] for t in tokens(row) if t in words}) for row in rows]


def make_windows(
  rows: Sequence[Sequence[int]], *, group: int, stride: int = 1
) -> tuple[Int[np.ndarray, "windows+1"], Int[np.ndarray, "active"]]:
  """Unions of `group` consecutive rows as (offsets, values): window w has values[offsets[w]:offsets[w + 1]].

  Raises:
    InputError: group or stride below 1, or more rows to a window than there are.
  """
  _check_window(len(rows), group, stride)
  sets = [sorted(set().union(*rows[at : at + group])) for at in range(0, len(rows) - group + 1, stride)]
  offsets = np.cumsum([0, *map(len, sets)])
  return offsets, np.array([v for s in sets for v in s], np.int64)


def pack_rows(rows: Sequence[Sequence[int]], words: int) -> UInt8[np.ndarray, "rows bytes"]:
  """One bit per row and word. Raises InputError on an index outside the vocabulary."""
  dense = np.zeros((len(rows), words), bool)
  for i, row in enumerate(rows):
    whole = all(isinstance(v, Integral) and 0 <= v < words for v in row)
    require(whole, f"row {i} has a word index outside 0..{words - 1}; encode it again")
    dense[i, list(row)] = True
  return np.packbits(dense, axis=1)


def or_rows(packed: UInt8[Array, "rows bytes"], starts: Int[Array, "windows"], group: int) -> UInt8[Array, "w bytes"]:
  """The windows rows[s : s + group] as bits; 20 rows gathered and OR-ed move 1/8 of one dense window.

  Raises:
    InputError: rows that are no packed bits, or starts (not traced) of windows that are not within the rows.
  """
  require(packed.dtype == np.uint8, f"rows are {packed.dtype}; pack them with pack_rows")
  if not isinstance(starts, jax.core.Tracer):
    low, high, last = int(np.min(starts, initial=0)), int(np.max(starts, initial=0)), len(packed) - group
    require(group >= 1 and low >= 0 and high <= last, f"windows start at {low}..{high}; of {group} rows, at 0..{last}")
  windows = packed[starts]
  for i in range(1, group):
    windows = windows | packed[starts + i]
  return windows


def check_bits(bits: UInt8[Array, "*batch bytes"], words: int) -> UInt8[Array, "*batch bytes"]:
  """The bits as a device array.

  Raises:
    InputError: no rows of `words` bits, packed as by `pack_rows`; or bits set (where they are not traced) that are no
      word, those of a larger vocabulary.
  """
  width = -(-words // 8)
  bits = jnp.asarray(bits)
  require(
    bits.dtype == jnp.uint8 and bits.ndim >= 1 and bits.shape[-1] == width,
    f"bits are {bits.dtype}{list(bits.shape)}; {words} words are uint8 of [..., {width}]: pack them with pack_rows or "
    "numpy.packbits(x, axis=-1)",
  )
  spare = 8 * width - words
  if spare and not isinstance(bits, jax.core.Tracer):
    beyond = bool(jnp.any(bits[..., -1] & (2**spare - 1)))
    require(not beyond, f"bits beyond {words} words are set; they were packed for another vocabulary: give its size")
  return bits


def unpack(bits: UInt8[Array, "*batch bytes"], words: int) -> Float[Array, "*batch words"]:
  """Rows of 0 and 1. Raises InputError on bits of another width."""
  return jnp.unpackbits(check_bits(bits, words), axis=-1, count=words).astype(jnp.float32)


def block_split(
  rows: int, *, group: int, block: int, every: int = 5
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "held_out"]]:
  """Starts of training and held-out windows that share no row: each `every`-th block of rows is held out.

  No window crosses the border of a block and held-out windows keep one window's length from it. (Stride-1 windows
  drawn at random would overlap training windows in all but one row.)

  Raises:
    InputError: blocks too short for the gap, or too few of them.
  """
  require(group >= 1 and block >= 4 * group, f"blocks of {block} rows are too short for windows of {group}; use >= 4x")
  starts = np.arange(rows - group + 1)
  inside = starts % block <= block - group
  held = (starts // block) % every == every - 1
  clear = (starts % block >= group) & (starts % block <= block - 2 * group)
  train, held_out = starts[inside & ~held], starts[held & clear]
  require(
    len(train) > 0 and len(held_out) > 0,
    f"{rows} rows are too few for blocks of {block}, every {every}th held out; give more text or smaller blocks",
  )
  return train, held_out


def shuffle_columns(bits: UInt8[np.ndarray, "n bytes"], words: int, seed: int) -> UInt8[np.ndarray, "n bytes"]:
  """Every word's column permuted on its own: the same marginals, no correlation.

  Raises:
    InputError: as `check_bits`.
  """
  dense = np.unpackbits(np.asarray(check_bits(bits, words)), axis=1, count=words)
  return np.packbits(np.random.default_rng(seed).permuted(dense, axis=0), axis=1)


def synthetic(
  structure: str,
  *,
  samples: int = 10_000,
  features: int = 12,
  seed: int = 42,
  sharpness: float = 10.0,
  log_odds: float = 0.0,
  noise: float = 0.0,
) -> UInt8[np.ndarray, "samples features"]:
  """Binary features of a latent point z: x_f ~ Bernoulli(sigmoid(sharpness (F z)_f + log_odds (+ noise))).

  circular: sample i at angle 2 pi (i mod features) / features, F the same angles. figure8: z = (sin t, sin 2t).
  sphere: z uniform on S^2, F a Fibonacci lattice. iid: the mean rate of circular, no structure.
  """
  require_choice("structure", structure, STRUCTURES)
  random = np.random.default_rng(seed)
  angle = 2 * np.pi * np.arange(features) / features
  at = angle[np.arange(samples) % features]
  if structure == "figure8":
    z, rows = np.stack([np.sin(at), np.sin(2 * at)], 1), np.stack([np.sin(angle), np.sin(2 * angle)], 1)
  elif structure == "sphere":
    z = random.normal(size=(samples, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    height = 1 - 2 * (np.arange(features) + 0.5) / features
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(features)
    radius = np.sqrt(1 - height**2)
    rows = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], 1)
  else:
    z, rows = np.stack([np.cos(at), np.sin(at)], 1), np.stack([np.cos(angle), np.sin(angle)], 1)
  logits = sharpness * z @ rows.T + log_odds + noise * random.normal(size=(samples, features))
  rates = 1 / (1 + np.exp(-logits))
  if structure == "iid":
    rates = np.full_like(rates, rates.mean())
  return (random.random(rates.shape) < rates).astype(np.uint8)


def _check_window(rows: int, group: int, stride: int) -> None:
  require(group >= 1 and stride >= 1, f"group is {group} and stride {stride}; both must be at least 1")
  require(group <= rows, f"windows of {group} rows from {rows} rows; lower group or give more text")
