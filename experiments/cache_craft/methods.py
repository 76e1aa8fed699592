"""What Cache-Craft is compared with: other choices of the tokens that are computed again, and CacheBlend."""

from collections.abc import Callable

import numpy as np

from experiments.cache_craft.requests import Query
from jaxlab.models.inference import Network
from jaxlab.serving.cache_blend import blend_share
from jaxlab.serving.cache_craft import Choice, Choose, Served, Wanted, as_cached, serve
from jaxlab.serving.cache_craft_scores import top_tokens
from jaxlab.serving.cache_craft_store import ChunkStore

FULL, NAIVE, OURS = "full prefill", "as cached", "Cache-Craft"


def newest(wanted: Wanted) -> Choice:
  """Full-cache: a chunk as it was cached last, as if there was one copy of it, and nothing computed again."""
  return Choice(wanted.variants[-1], share=0.0) if wanted.variants else Choice(None)


def by_score(share: float, score: Callable[[Wanted, Choice], np.ndarray]) -> Choose:
  """The variant that Cache-Craft takes, and of every reused chunk that share of the tokens of the largest score."""

  def choose(wanted: Wanted) -> Choice:
    choice = as_cached(wanted)
    if choice.variant is None or choice.variant.record.prefix == wanted.prefix:
      return choice  # behind the same chunks nothing is to be repaired
    return choice._replace(again=top_tokens(score(wanted, choice), share))

  return choose


def at_random(share: float, seed: int) -> Choose:
  """Tokens by chance."""
  rng = np.random.default_rng(seed)
  return by_score(share, lambda wanted, choice: rng.random(len(wanted.tokens)))


def most_attended(share: float) -> Choose:
  """Prefill-H2O: the tokens that got most attention where the variant was made."""
  return by_score(share, lambda wanted, choice: choice.variant.record.received)


def first_tokens(share: float) -> Choose:
  """EPIC: those a chunk begins with, which stood in for the start of the text where it was cached."""
  return by_score(share, lambda wanted, choice: -np.arange(len(wanted.tokens)))


Method = Callable[[Network, ChunkStore, Query, int, int], Served]  # the last are the query's number and `serve`'s least


def by_choice(choose_of: Callable[[int], Choose], *, early: bool = False) -> Method:
  """`serve` with a choice that may depend on the query's number, the store left as it is."""

  def method(network: Network, store: ChunkStore, query: Query, number: int, least: int) -> Served:
    how = dict(choose=choose_of(number), early=early, room=len(query.answer), keep=False, least=least)
    return serve(network, store, query.chunks, query.question, **how)

  return method


def blended(share: float) -> Method:
  """CacheBlend, the share being that of the chunks' tokens."""

  def method(network: Network, store: ChunkStore, query: Query, number: int, least: int) -> Served:
    own, chunks = len(store.system), sum(map(len, query.chunks))
    how = dict(share=share * chunks / (chunks + own), choose=as_cached, room=len(query.answer), least=least)
    return blend_share(network, store, query.chunks, query.question, **how)

  return method


def always(choose: Choose, **how) -> Method:
  """`by_choice` of one for all queries."""
  return by_choice(lambda number: choose, **how)


def ours(alpha: float) -> str:
  """The name of Cache-Craft with that alpha."""
  return f"{OURS} {alpha:g}"


def at_share(*, share: float, of_all: float) -> dict[str, Method]:
  """The rivals that compute as much: `share` of every chunk that was cached behind others, `of_all` of all chunks."""
  return {
    "random": by_choice(lambda number: at_random(share, number)),
    "most attended": always(most_attended(share)),
    "first tokens": always(first_tokens(share)),
    "CacheBlend": blended(of_all),
  }
