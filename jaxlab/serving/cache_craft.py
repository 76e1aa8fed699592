"""Cache-Craft: a prompt of retrieved chunks, of which those that were seen before are computed only in part (arXiv
2502.15734).

  store = ChunkStore([bos], chunks=100, variants=5)
  served = serve(network, store, [passage, another, a_third], question)          # token ids
  logits, state = served.logits, served.state(network)                           # `inference.step` goes on from here

A chunk's keys and values depend on what stood before it. How much they do was measured when they were computed: of a
chunk that is met behind other ones, the share CFO of the tokens that attended most to what stood before is computed
again, and the rest is read from the cache at its new place. What is stored of a request serves later ones.

What is reused is decided by a function, which the caller may replace: `craft` is the paper's, `everything` computes it
all, `same_prefix` is prefix caching, `as_cached` computes nothing again. One program serves them all.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import inference
from jaxlab.models.generate import require_ids
from jaxlab.models.inference import Network
from jaxlab.serving import partial_prefill
from jaxlab.serving.cache_craft_scores import focused, top_tokens
from jaxlab.serving.cache_craft_store import ChunkStore, Record, Variant, layers_of

NONE = np.zeros(0, np.int64)


class Wanted(NamedTuple):
  """A chunk of a prompt, as a `Choose` sees it.

  Attributes:
    name: by which the store knows it; prefix: names of the chunks before it; index: their number.
    variants: what the store has of it, the oldest first.
    exact: all before it is as a whole prefill gives it.
  """

  name: bytes
  tokens: Int[np.ndarray, "tokens"]
  prefix: tuple[bytes, ...]
  index: int
  variants: tuple[Variant, ...]
  exact: bool


class Choice(NamedTuple):
  """The variant to use, None to compute the chunk, and which of its tokens are computed again.

  share: what the variant's use counts for (CFO).
  """

  variant: Variant | None
  again: Int[np.ndarray, "chosen"] = NONE
  share: float = 1.0


Choose = Callable[[Wanted], Choice]


def craft(alpha: float = 1.0, *, penalise_new: bool = False, repairs: int = 3) -> Choose:
  """The variant of the smallest CFO, and the share CFO of its tokens that attended most to what stood before.

  Args:
    alpha: factor on CFO: the smallest with which quality is what is wanted.
    penalise_new: as `prefix_overlap`.
    repairs: a variant that was computed in part so often is not used again but where it fits as it is.
  """
  require(alpha >= 0, f"alpha is {alpha}; it must not be negative")

  def choose(wanted: Wanted) -> Choice:
    found = [(v.record.share(wanted.prefix, alpha=alpha, penalise_new=penalise_new), v) for v in wanted.variants]
    found = [(share, v) for share, v in found if share < 1 and (share == 0 or v.record.repairs < repairs)]
    if not found:
      return Choice(None)
    share, best = min(found, key=lambda pair: (pair[0], pair[1].number))
    return Choice(best, top_tokens(best.record.score, share), share)

  return choose


def everything(wanted: Wanted) -> Choice:
  """Computes all: full prefill."""
  return Choice(None)


def same_prefix(wanted: Wanted) -> Choice:
  """Prefix caching: reuses a chunk behind the same chunks in the same order, all of them as computed."""
  fits = lambda v: v.record.prefix == wanted.prefix and v.record.exact
  found = next((v for v in wanted.variants if wanted.exact and fits(v)), None)
  return Choice(found, share=0.0 if found else 1.0)


def as_cached(wanted: Wanted) -> Choice:
  """The variant that `craft` would take, and none of its tokens computed again."""
  choice = craft()(wanted)
  return choice._replace(again=NONE) if choice.variant else choice


class Plan(NamedTuple):
  """A prompt in the order of its positions, and what of it is computed.

  Attributes:
    tokens: int32[n]; groups: int32[n], 0 of the system prompt, 1 .. k of the chunks, k + 1 of the question.
    starts: where the chunks begin, and the question.
    computed: bool[n]. names: of the chunks; choices: one a chunk; exact: whether each is as a whole prefill gives it.
  """

  tokens: Int[np.ndarray, "n"]
  groups: Int[np.ndarray, "n"]
  starts: tuple[int, ...]
  computed: Bool[np.ndarray, "n"]
  names: tuple[bytes, ...]
  choices: tuple[Choice, ...]
  exact: tuple[bool, ...]


def plan(store: ChunkStore, chunks: Sequence[Sequence[int]], question: Sequence[int], choose: Choose) -> Plan:
  """What is computed of a prompt [system | chunks | question]; the store is not changed.

  Raises:
    InputError: an empty question, whose last token the answer is read from, or an empty chunk.
  """
  require(len(question) > 0, "the question is empty; the answer is read from its last token")
  require(all(len(chunk) > 0 for chunk in chunks), "a chunk is empty; leave it out")
  parts = [np.asarray(part, np.int32) for part in (store.system, *chunks, question)]
  starts = np.cumsum([0, *map(len, parts)])[1:-1]
  groups = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int32)
  computed = groups == len(parts) - 1
  computed |= (groups == 0) & (store.system_parts is None)
  names, choices, exact = tuple(map(store.name, parts[1:-1])), [], []
  for i, (name, part) in enumerate(zip(names, parts[1:-1], strict=True)):
    choice = choose(Wanted(name, part, names[:i], i, store.of(name), all(exact)))
    again = np.arange(len(part)) if choice.variant is None else choice.again
    computed[starts[i] + again] = True
    kept = choice.variant is None or (choice.variant.record.exact and choice.variant.record.prefix == names[:i])
    choices.append(choice)
    exact.append(all(exact) and (kept or len(again) == len(part)))
  return Plan(np.concatenate(parts), groups, tuple(starts.tolist()), computed, names, tuple(choices), tuple(exact))


@dataclasses.dataclass(frozen=True)
class Served:
  """A prompt's first logits and what they took.

  Attributes:
    logits: float32[read, vocab], of the last tokens of the question.
    plan: what was computed. cached: keys and values of every stage, of all positions.
    token_layers: computed tokens times the layers they went through; `of` all tokens times all layers.
    dropped: chunks whose tokens were not computed to the end.
  """

  logits: Array
  plan: Plan
  cached: tuple[partial_prefill.Cached, ...]
  token_layers: int
  of: int
  dropped: tuple[int, ...] = ()

  def state(self, network: Network) -> inference.State:
    """That of `inference.step`, after the whole prompt."""
    return partial_prefill.decoding_state(network, self.cached, len(self.plan.tokens))


def serve(
  network: Network,
  store: ChunkStore,
  chunks: Sequence[Sequence[int]],
  question: Sequence[int],
  *,
  choose: Choose = craft(),
  early: bool = False,
  read: int = 1,
  room: int = 0,
  keep: bool = True,
  least: int = 64,
) -> Served:
  """Prefills [store.system | chunks | question], each of them token ids.

  Chunks are tokenised one by one: the tokens of a joined text would not be those of its parts.

  Args:
    choose: what is reused.
    early: at the store's first stage, tokens of chunks that the question does not attend to (`focused`; settled or not
      from half of the depth on) stop being computed; their deeper layers stay as they were cached.
    read: how many of the question's last tokens give logits.
    room: tokens that are to be generated after it.
    keep: new variants go into the store, and uses count.
    least: rows of the smallest pass; others are of `partial_prefill.room(rows, least)`, and compiled once each.

  Raises:
    InputError: an empty chunk or question, ids the model lacks, a model whose keys cannot be moved, `early` without
      stages.
  """
  partial_prefill.require_movable(network)
  require(not early or store.stages, "early needs a store with stages: the first is where tokens may stop")
  made = plan(store, chunks, question, choose)
  require(1 <= read <= len(question), f"read is {read}; it must lie in 1 .. {len(question)}, the question's tokens")
  require_ids(made.tokens, network.model.config.vocab_size)
  depth, n = len(network.blocks), len(made.tokens)
  capacity = partial_prefill.room(n + room)
  groups = np.full((1, capacity), -1, np.int32)
  groups[0, :n] = made.groups
  count = partial_prefill.room(made.groups[-1] + 1, 8)
  places = np.flatnonzero(made.computed)  # of the rows in the pass
  whole = _padded(places, least)
  tokens = np.where(whole < 0, 0, made.tokens[whole])
  rows = partial_prefill.start_rows(network, tokens[None], whole[None])
  cached, dropped, told = [], (), []
  for stage, (start, stop) in enumerate(layers_of(store.stages, depth)):
    here = laid(network, store, made, stage, capacity, stop - start)
    rows, here, seen = partial_prefill.advance_rows(network, rows, here, groups, start=start, stop=stop, count=count)
    cached.append(here)
    told.append((places, seen))  # not read yet: the next stage loads while this one is computed
    if early and stage == 0:
      dropped, stay = _unfocused(made, places, np.asarray(seen.mass, np.float32)[:, 0], final=2 * stop >= depth)
      if dropped:
        places = places[stay]
        rows = partial_prefill.take_rows(rows, _padded(np.flatnonzero(stay), least)[None])
  last = np.arange(len(places) - read, len(places))
  logits = partial_prefill.end_rows(network, rows, last[None])[0]
  if keep:
    _store(store, made, tuple(cached), told, depth)
  token_layers = sum(len(places) * len(seen.mass) for places, seen in told)
  return Served(logits, made, tuple(cached), token_layers, n * depth, dropped)


def _padded(places: np.ndarray, least: int) -> np.ndarray:
  """With -1 after them up to one of few sizes."""
  more = partial_prefill.room(len(places), least) - len(places)
  return np.pad(places.astype(np.int32), (0, more), constant_values=-1)


def _unfocused(made: Plan, places: np.ndarray, mass: np.ndarray, *, final: bool) -> tuple[tuple[int, ...], np.ndarray]:
  """(reused chunks that the question does not attend to, which of the rows stay)."""
  group, k = made.groups[places], len(made.names)
  looks = mass[:, np.flatnonzero(group == k + 1), 1 : k + 1].sum(axis=1)
  far = ~focused(looks, final=final) & np.array([choice.variant is not None for choice in made.choices], bool)
  dropped = tuple(np.flatnonzero(far).tolist())
  return dropped, ~np.isin(group - 1, dropped)


def laid(
  network: Network, store: ChunkStore, made: Plan, stage: int, capacity: int, layers: int
) -> partial_prefill.Cached:
  """What is cached of a stage's layers, each chunk at its place."""
  c, dtype = network.model.config, network.model.dtype
  cached = partial_prefill.empty(c, batch=1, capacity=capacity, layers=layers, dtype=dtype)
  if store.system_parts is not None:
    cached = _lay(cached, store.system_parts[stage], 0)
  for start, choice in zip(made.starts, made.choices, strict=False):
    if choice.variant is not None:
      cached = _lay(cached, tuple(store.load(choice.variant, stage)), start)
  return cached


@functools.partial(jax.jit, donate_argnums=0)
def _lay(cached: partial_prefill.Cached, part, start):
  put = lambda a, new: jax.lax.dynamic_update_slice(a, new[:, None].astype(a.dtype), (0, 0, start, 0, 0))
  return partial_prefill.Cached(*map(put, cached, part))


@functools.partial(jax.jit, static_argnames="size")
def _cut(cached: partial_prefill.Cached, start, *, size: int):
  return tuple(jax.lax.dynamic_slice_in_dim(a[:, 0], start, size, axis=1) for a in cached)


def _store(store: ChunkStore, made: Plan, cached, told, depth: int) -> None:
  """Counts the uses of a request and puts in what is new of it.

  Args:
    told: (places of the rows, `Seen`) of every stage.
  """
  store.tick()
  if store.system_parts is None:
    store.system_parts = [_cut(part, 0, size=len(store.system)) for part in cached]
  attention, received = _statistics(made, told, depth)
  sizes = np.diff(made.starts).tolist()
  for i, (chunk, choice) in enumerate(zip(made.names, made.choices, strict=True)):
    place, prefix = slice(made.starts[i], made.starts[i + 1]), made.names[:i]
    old, again = None if choice.variant is None else choice.variant.record, made.computed[place]
    if old is not None:
      store.touch(choice.variant, choice.share)
      if old.prefix == prefix and not again.any():
        continue  # nothing is new
    weights = _completed(attention[place][:, [i + 1, *range(1, i + 1)]], again, old, prefix)
    got = received[place] + (0 if old is None else old.received)
    repairs = 0 if old is None or again.all() else old.repairs + 1
    new = Record(chunk, prefix, tuple(sizes[:i]), weights, got, depth, made.exact[i], repairs)
    parts = [_cut(part, place.start, size=sizes[i]) for part in cached]
    store.put(new, parts, 1.0 if old is None else choice.share)


def _statistics(made: Plan, told, depth: int) -> tuple[np.ndarray, np.ndarray]:
  """(float32[n, groups]: attention of computed tokens, float32[n]: what tokens received), summed over layers."""
  n, groups = len(made.tokens), made.groups[-1] + 1
  attention, went = np.zeros((n, groups), np.float32), np.zeros(n, np.float32)
  received = np.zeros(n, np.float32)
  for places, seen in told:
    attention[places] += np.asarray(seen.mass, np.float32)[:, 0, : len(places), :groups].sum(axis=0)
    went[places] += len(seen.mass)
    received += np.asarray(seen.received, np.float32)[0, :n]
  # Rows that stopped early, as if they had gone on.
  return attention * (depth / np.maximum(went, 1))[:, None], received


def _completed(
  weights: Float[np.ndarray, "tokens groups"], again: Bool[np.ndarray, "tokens"], old: Record | None, prefix
) -> Float[np.ndarray, "tokens groups"]:
  """Attention of all tokens of a chunk: as it was now of those that were computed, of the rest as it was known, of the
  chunks that are there again."""
  if old is None:
    return weights
  column = {chunk: 1 + i for i, chunk in enumerate(old.prefix)}
  known = np.pad(old.attention, ((0, 0), (0, 1)))[:, [0, *(column.get(chunk, -1) for chunk in prefix)]]
  return np.where(again[:, None], weights, known)
