"""The decoders that are compared on a network with its adapters."""

from jaxlab.attention.chunkllm import decoder
from jaxlab.cache.eviction import sepllm, streaming_llm
from jaxlab.data.tokenizer import ids_of
from jaxlab.models import paged
from jaxlab.models.generate import Decoder

DENSE = "dense"
FIXED, EVERY, TRUE, CHANCE, WINDOW = "fixed chunks", "every token", "true attention", "by chance", "sliding window"
RAW, SEPARATORS = "undistilled", "separators"
VOTE, EARLY, LATE = "all layers by vote", "ends at 0.2", "ends at 0.8"  # probabilities of a token that ends a chunk
ABLATIONS = (FIXED, EVERY, TRUE, CHANCE, RAW, VOTE, EARLY, LATE)
_MARKS = ",.;:?!\n"


def compared(config, mean: float, names: tuple[str, ...]) -> dict[str, Decoder]:
  """Decoders by these names, "ChunkLLM 0.4" of that keep; the others are at config.keep.

  Args:
    mean: tokens of a chunk, which fixed ones have as well.
  """
  how, main = config.method.to_dict(), dict(keep=config.keep)
  length = max(how["min_chunk"], round(mean))
  special = {
    FIXED: main | dict(threshold=1.0, min_chunk=length, max_chunk=length),
    EVERY: main | dict(every_token=True),
    TRUE: main | dict(choose="oracle"),
    CHANCE: main | dict(choose="random"),
    RAW: main | dict(choose="raw"),
    VOTE: main | dict(cross_layer="vote"),
    EARLY: main | dict(threshold=0.2),
    LATE: main | dict(threshold=0.8),
  }
  one = lambda name: special.get(name) or dict(keep=float(name.split()[1]))
  return {name: paged.decoder(chunk=256, page=64) if name == DENSE else decoder(**how | one(name)) for name in names}


def holding(config, subject, share: float) -> dict[str, Decoder]:
  """Caches that hold the share of a prompt's tokens: the first and last ones, and before those separators (SepLLM)."""
  ids, how = ids_of(subject.tokenizer, _MARKS), dict(keep=min(1.0, share), sink=config.method.sink)
  methods = {WINDOW: streaming_llm(**how), SEPARATORS: sepllm(ids, local=config.method.local, **how)}
  return {name: paged.decoder(method, chunk=256, page=64) for name, method in methods.items()}


def named(keep: float) -> str:
  return f"ChunkLLM {keep:g}"
