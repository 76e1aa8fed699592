"""The chips that are simulated, networks that are served on them, and what is known of both."""

from typing import NamedTuple

from jaxlab.core.checks import require_choice
from jaxlab.models.config import TransformerConfig, qwen3
from jaxlab.serving.simulator import Chip

SHARES = tuple(i / 10 for i in range(1, 11))
# What the paper says of an L20: FFNs gain most from processors, the other products flatten near 60 %; a prefill is 25 %
# faster on 40 than on 30 % and 10 % on 80 than on 70 %, a decode 10 % and, beyond half, less than 3 % a step.
_FFN = (0.1, 0.2, 0.3, 0.398, 0.49, 0.575, 0.65, 0.73, 0.79, 0.84)
_FLAT = (0.1, 0.2, 0.3, 0.398, 0.48, 0.55, 0.58, 0.60, 0.62, 0.64)
_CHUNK = (0.05, 0.1, 0.15, 0.199, 0.245, 0.285, 0.32, 0.355, 0.38, 0.40)
_ROW = (0.025, 0.05, 0.075, 0.1, 0.12, 0.14, 0.16, 0.18, 0.19, 0.20)
COMPUTE = dict(qkv=_FLAT, chunk_attention=_CHUNK, row_attention=_ROW, out=_FLAT, up=_FFN, down=_FFN, head=_FFN)
MEMORY = {
  "l20": (0.34, 0.62, 0.82, 0.91, 0.94, 0.955, 0.965, 0.975, 0.985, 0.99),
  "hopper": (0.20, 0.39, 0.57, 0.73, 0.85, 0.92, 0.95, 0.97, 0.98, 0.99),
}
NETWORKS = {
  "qwen2.5-3b": qwen3(
    vocab_size=151_936, depth=36, width=2048, q_heads=16, kv_heads=2, head_dim=128, mlp_width=11_008, context=32_768
  ),
  "llama3.1-8b": TransformerConfig(
    vocab_size=128_256, depth=32, width=4096, q_heads=32, kv_heads=8, head_dim=128, mlp_width=14_336, context=32_768
  ),
}


class Facts(NamedTuple):
  """peak: operations a second; bandwidth, link: bytes a second; memory: bytes; limit: seconds a token (P95) of an
  8B network."""

  peak: float
  bandwidth: float
  memory: float
  link: float
  limit: float


FACTS = {
  "l20": Facts(119e12, 0.864e12, 48e9, 25e9, 0.2),
  # Five times the bandwidth, so a fifth of the seconds.
  "hopper": Facts(790e12, 4.3e12, 141e9, 300e9, 0.04),
}


def chip(name: str, measured: dict | None, *, mixed: float = 1.0) -> Chip:
  """By its constants, or ("measured") by what `calibrate` found."""
  require_choice("config.simulate.chips", name, (*FACTS, "measured"))
  if name == "measured":
    return Chip(
      measured["peak"], measured["bandwidth"], measured["shares"], measured["compute"], measured["memory"], mixed
    )
  return Chip(FACTS[name].peak, FACTS[name].bandwidth, SHARES, COMPUTE, MEMORY[name], mixed)


def facts(name: str) -> Facts:
  """Of a measured chip: memory, link and limit of a Hopper."""
  return FACTS["hopper" if name == "measured" else name]


def title(name: str) -> str:
  """In a sentence."""
  return {"l20": "an L20-like chip", "hopper": "a Hopper-like chip", "measured": "the measured chip"}[name]


def weights(network: TransformerConfig) -> int:
  """Bytes, in bfloat16."""
  c = network
  layer = c.width * (2 * c.q_heads + 2 * c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width
  return 2 * (c.depth * layer + 2 * c.vocab_size * c.width)


def limit(name: str, network: TransformerConfig) -> float:
  """Seconds a token: the chip's for 8B weights, and less in proportion to what a decoding step has to read."""
  return facts(name).limit * weights(network) / weights(NETWORKS["llama3.1-8b"])


def cache_pages(name: str, network: TransformerConfig, page: int, tokens_of_a_step: int = 4096) -> int:
  """Pages that nine tenths of the memory have room for, beside the weights and a step's activations."""
  step = 2 * tokens_of_a_step * (network.vocab_size // 8 + 4 * network.mlp_width)
  room = 0.9 * facts(name).memory - weights(network) - step
  return int(room / bytes_of_a_token(network) / page)


def bytes_of_a_token(network: TransformerConfig) -> int:
  """Keys and values of all layers, in bfloat16."""
  return network.depth * 2 * network.kv_heads * network.head_dim * 2
