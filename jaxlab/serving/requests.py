"""What is asked for, and how far it has come."""

import dataclasses
import math
from collections.abc import Sequence

from jaxlab.core.checks import require
from jaxlab.models.compaction import Compaction

_NEVER = 2**62  # tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of a request are drawn; they depend on nothing else, not on who is served beside it.

  Attributes:
    temperature: 0 is the argmax; top_k, top_p, min_p: as in `models.generate.sample`, None for all.
    seed: token number i is drawn by fold_in(key(seed), i), as `generate(key=jax.random.key(seed))` draws it.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  seed: int = 0

  def __post_init__(self):
    for name, value in (("temperature", self.temperature), ("top_p", self.top_p), ("min_p", self.min_p)):
      known = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
      require(known, f"{name} is {value!r:.80}; it must be a number")
    require(0 <= self.temperature <= 100, f"temperature is {self.temperature}; it must lie in 0 .. 100")
    for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
      require(value is None or 0 < value <= 1, f"{name} is {value}; it must lie in 0 < {name} <= 1")
    require(
      self.top_k is None or (type(self.top_k) is int and self.top_k >= 1),
      f"top_k is {self.top_k!r:.80}; it must be a whole number from 1 on",
    )
    whole = type(self.seed) is int and -(2**31) <= self.seed < 2**32
    require(whole, f"seed is {self.seed!r:.80}; it must be a whole number of 32 bits")


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and what is wanted of it.

  Attributes:
    id: different from those of all others that are served.
    prompt: token ids, at least one; tokens: how many new ones at most, at least 1.
    stop: ids that end it; the one it met is its last token.
    score: the log-probability of every prompt token is wanted too, and the likeliest in its place.
    arrival: seconds on the engine's clock.
  """

  id: str
  prompt: Sequence[int]
  tokens: int
  sampling: Sampling = Sampling()
  stop: frozenset[int] = frozenset()
  score: bool = False
  arrival: float = 0.0

  def __post_init__(self):
    require(len(self.prompt) > 0, "the prompt is empty; give at least one token")
    require(self.tokens >= 1, f"{self.tokens} new tokens are wanted; ask for at least 1")


@dataclasses.dataclass(eq=False)
class Served:
  """A request that is served.

  Attributes:
    tokens: prompt and what was made; order: of those that came.
    computed: how many tokens have their keys and values in the pages.
    pages: in the order of their entries; published: how many were, from the first on.
    reserved: tokens that it was given pages for when it was admitted.
    compactions: of its cache, all there can be; compacted: how many have been; gone: entries that they have taken away.
    finish: how it ended, as in `Event`, or "abort".
    times: when the request was first scheduled, then when each token was read.
  """

  request: Request
  tokens: list[int]
  order: int
  computed: int = 0
  pages: list[int] = dataclasses.field(default_factory=list)
  published: int = 0
  reserved: int = 0
  compactions: tuple[Compaction, ...] = ()
  compacted: int = 0
  gone: int = 0
  finish: str | None = None
  scheduled: float = math.nan
  times: list[float] = dataclasses.field(default_factory=list)
  scores: list[tuple[float, int, float]] = dataclasses.field(default_factory=list)

  @property
  def made(self) -> int:
    """Tokens so far."""
    return len(self.tokens) - len(self.request.prompt)

  @property
  def pending(self) -> int:
    """Tokens whose keys and values are still to be worked out: one of a sequence that decodes."""
    return len(self.tokens) - self.computed

  @property
  def limit(self) -> int:
    """Tokens that may be computed before the cache has to become smaller."""
    return self.compactions[self.compacted].at if self.compacted < len(self.compactions) else _NEVER

  @property
  def readable(self) -> int:
    """Pending tokens that may be read at once."""
    return min(len(self.tokens), self.limit) - self.computed

  def most(self, tokens: int, *, done: int = 0) -> int:
    """Entries that there are at most, from the next `done` compactions on until so many tokens are computed."""
    most, gone = 0, self.gone
    for i, c in enumerate(self.compactions[self.compacted :]):
      if c.at >= tokens:
        break
      most, gone = max(most, c.at - gone if i >= done else 0), gone + c.count - c.kept
    return max(most, tokens - gone)

  def reset(self) -> list[int]:
    """The pages, which it gives up: all is to be computed again."""
    pages, self.pages, self.scores = self.pages, [], []
    self.computed = self.published = self.compacted = self.gone = 0
    return pages


@dataclasses.dataclass(frozen=True)
class Event:
  """A new token of a request, or its end.

  Attributes:
    token, logprob: the model's own log-probability, before temperature and limits; best: the likeliest token and
      its. None with an end that brings no token.
    finish: "stop" (it met one of its stop ids), "length", "error: ..." or None while it goes on.
    scores: with the first token of a request that wants them: (log-probability, likeliest id, that one's) of every
      prompt token from the second on.
  """

  id: str
  token: int | None
  logprob: float | None
  best: tuple[int, float] | None
  finish: str | None = None
  scores: tuple = ()
