"""Requests one after the other by Zipf's law: what is computed of them, by Cache-Craft and by caches of prefixes."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from experiments.cache_craft.answers import NEW, predictions
from experiments.cache_craft.methods import OURS
from experiments.cache_craft.requests import Facts, Query
from experiments.long_context import Subject
from jaxlab.serving.cache_craft import Choose, craft, serve
from jaxlab.serving.cache_craft_store import DEVICE, HOST, ChunkStore

PREFIX, SET, ALL = "same prefix", "chunks put in order for prefixes", "full prefill"


class Prefixes:
  """Which chunks lie cached behind which: the most recent `room` of them."""

  def __init__(self, room: int):
    self._room, self._known = room, OrderedDict()

  def hits(self, names: Sequence[bytes]) -> int:
    """Chunks from the first on that need not be computed; all of them are known after it."""
    paths = [tuple(names[: i + 1]) for i in range(len(names))]
    found = len([*itertools.takewhile(self._known.__contains__, paths)])
    for path in reversed(paths):  # a chunk is of no use without those before it
      self._known[path] = None
      self._known.move_to_end(path)
    while len(self._known) > self._room:
      self._known.popitem(last=False)
    return found

  def ordered(self, names: Sequence[bytes]) -> tuple[bytes, ...]:
    """The chunks in the order with the longest known prefix; the rest as they came."""

    def longest(path):
      after = [longest((*path, name)) for name in names if name not in path and (*path, name) in self._known]
      return max(after, key=len, default=path)

    known = longest(())
    return (*known, *(name for name in names if name not in known))


def trace(config, subject: Subject, alpha: float, console) -> dict:
  """Token-layers and answers after the first requests.

  Returns:
    {"layers": {way: token-layers over those of full prefills}, "prefix_hits": share of chunks that lie in a known
    prefix, "ours": {OURS and NEW: {right: share of answers, hits: share of chunks of which there was a variant, share:
    mean CFO of these, variants: mean number of them, device_bytes, host_bytes, stored}}}. All hold the same number of
    cached chunks; ours also what they repaired, half of it in the host's memory.
  """
  t, rng = config.trace, np.random.default_rng(config.seed + 3)
  base = Facts(config, subject)
  queries = [base.query(rng) for _ in range(t.warm + t.queries)]
  ways = {OURS: craft(alpha), NEW: craft(alpha, penalise_new=True)}
  ours = {name: _online(config, subject, base, queries, choose, console) for name, choose in ways.items()}
  names, prefixes, sets = ChunkStore([subject.tokens.bos]), Prefixes(t.held), Prefixes(t.held)
  computed, of, found = {PREFIX: 0, SET: 0}, 0, 0
  for i, query in enumerate(queries):
    chunks = [names.name(chunk) for chunk in query.chunks]
    hits = {PREFIX: prefixes.hits(chunks), SET: sets.hits(sets.ordered(chunks))}
    if i >= t.warm:
      body, rest = len(chunks) * config.facts.size, len(query.question)
      of += 1 + body + rest
      found += hits[PREFIX]
      for way in hits:  # the first token lies cached in every way
        computed[way] += body + rest - hits[way] * config.facts.size
  layers = {ALL: 1.0} | {way: tokens / of for way, tokens in computed.items()}
  layers |= {name: row.pop("layers") for name, row in ours.items()}
  return {"layers": layers, "prefix_hits": found / (t.queries * config.facts.k), "ours": ours}


def _online(config, subject: Subject, base: Facts, queries: Sequence[Query], choose: Choose, console) -> dict:
  t, c, size = config.trace, subject.network.model.config, config.facts.size
  item = np.dtype(subject.network.model.dtype).itemsize
  each = 2 * c.depth * c.kv_heads * c.head_dim * size * item + 4 * size * (config.facts.k + 2)  # records too
  half = dict(device_bytes=t.held // 2 * each, host_bytes=t.held // 2 * each)
  bos, stages = [subject.tokens.bos], (c.depth // 2,)
  store = ChunkStore(bos, chunks=t.chunks, variants=config.variants, stages=stages, **half)
  rights, shares, variants, token_layers, of, hits, host = [], [], 0, 0, 0, 0, 0
  for i, query in enumerate(console.track("trace", queries)):
    known = sum(len(store.of(store.name(chunk))) for chunk in query.chunks)
    room = config.facts.answer
    how = dict(choose=choose, room=room, least=config.least)
    served = serve(subject.network, store, query.chunks, query.question, **how)
    if i < t.warm:
      continue
    made = predictions(subject, served, query.answer, room)
    rights.append(bool((made.argmax(-1) == query.answer).all()))
    shares += [choice.share for choice in served.plan.choices if choice.variant is not None]
    token_layers, of, variants = token_layers + served.token_layers, of + served.of, variants + known
    hits += sum(choice.variant is not None for choice in served.plan.choices)
    host = max(host, store.used(HOST))
  chunks = t.queries * config.facts.k
  return {
    "layers": token_layers / of,
    "right": float(np.mean(rights)),
    "hits": hits / chunks,
    "share": float(np.mean(shares)) if shares else 1.0,
    "variants": variants / chunks,
    "device_bytes": store.used(DEVICE),
    "host_bytes": host,
    "stored": len(store),
  }
