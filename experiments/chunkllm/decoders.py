"""A network with its adapters, and the decoders that are compared on it."""

import dataclasses
import functools

import jax

from jaxlab.attention.chunkllm import chunkllm
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.models import inference, paged
from jaxlab.models.generate import Decoder

DENSE = "dense"
FIXED, EVERY, TRUE, CHANCE, WINDOW = "fixed chunks", "every token", "true attention", "by chance", "sliding window"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(inference.Network):
  """Adapters are arguments of every program, as the network is, not constants in it."""

  adapters: ChunkAdapters


@functools.cache
def adapted(**options) -> Decoder:
  """ChunkLLM for an `Adapted` network."""
  method = lambda network: chunkllm(network.adapters, **options)

  def prefill(network, prompts, lengths=None, *, capacity):
    how = dict(capacity=capacity, chunk=256, page=64, method=method(network))
    return paged.prefill(network, prompts, lengths, **how)

  def step(network, tokens, state):
    return paged.step(network, tokens, state, method=method(network))

  return Decoder(prefill, step)


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
  }
  one = lambda name: special.get(name) or dict(keep=float(name.split()[1]))
  return {name: paged.decoder(chunk=256, page=64) if name == DENSE else adapted(**how | one(name)) for name in names}


def named(keep: float) -> str:
  return f"ChunkLLM {keep:g}"
