"""The shape of an H-Net (`models.hnet`): its layout as text, and what of it costs how much."""

import dataclasses
import itertools
import re

from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.models.config import TransformerConfig
from jaxlab.models.mamba2 import Mamba2Config

Runs = tuple[tuple[str, int], ...]  # kind and number of the layers, in order
_RUNS = r"((?:[mMtT][1-9]\d*)+)"


@dataclasses.dataclass(frozen=True)
class HNetConfig:
  """Shape of an H-Net; tuples have an entry for every stage, the outermost first.

  Attributes:
    layout: layers of every stage, see the module.
    widths: D^0 <= D^1 <= ...
    mlp_widths: hidden size of a stage's SwiGLUs, 0 where there are none.
    heads: of a stage's attention.
    windows: keys before its own that an attention layer sees, None all; left out, 1023 but in the innermost stage.
    ratios: N, positions a chunk is meant to have, for every stage but the innermost.
    gated: attention's output is multiplied by a sigmoid gate (Qiu et al. 2025, arXiv 2505.06708).
    head_dim, state, taps, expansion, chunk: of the Mamba-2 layers.
    routing: "cosine", or "linear" for p = sigmoid(w h + bias).
    smoothing, straight_through: False leaves s = z, or multiplies by c itself.
  """

  layout: str
  widths: tuple[int, ...]
  mlp_widths: tuple[int, ...] = (0, 4096)
  heads: tuple[int, ...] = (16, 16)
  windows: tuple[int | None, ...] | None = None
  ratios: tuple[float, ...] = (6.0,)
  vocab_size: int = 256
  gated: bool = False
  head_dim: int = 64
  state: int = 128
  taps: int = 4
  expansion: int = 2
  chunk: int = 64
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  routing: str = "cosine"
  smoothing: bool = True
  straight_through: bool = True

  def __post_init__(self):
    stages = len(self.stages)
    for name, count in (("widths", stages), ("mlp_widths", stages), ("heads", stages), ("ratios", stages - 1)):
      given = getattr(self, name)
      require(
        len(given) == count,
        f"model.{name} is {given}; layout {self.layout!r} has {stages} stages: give {count} entries",
      )
    require(self.windows is None or len(self.windows) == stages, f"model.windows is {self.windows}; give {stages}")
    require(
      all(a <= b for a, b in itertools.pairwise(self.widths)),
      f"model.widths is {self.widths}; an inner stage is at least as wide as the one around it",
    )
    require(all(n > 1 for n in self.ratios), f"model.ratios is {self.ratios}; chunks have more than 1 position")
    require_choice("model.routing", self.routing, ("cosine", "linear"))
    for stage, runs in enumerate(self.stages):
      kinds = {kind for run in runs for kind, _ in run}
      if kinds & {"t", "T"}:
        require_counts(**{f"model.heads[{stage}]": self.heads[stage]})
        require_divides(f"model.heads[{stage}] x 4", 4 * self.heads[stage], "the stage's width", self.widths[stage])
      if kinds & {"M", "T"}:
        require_counts(**{f"model.mlp_widths[{stage}]": self.mlp_widths[stage]})
      if kinds & {"m", "M"}:
        self.mamba(stage)

  @property
  def stages(self) -> tuple[tuple[Runs, ...], ...]:
    """((encoder, decoder) of every outer stage, ..., (main network,))."""
    text, found = self.layout.replace(" ", ""), []
    while True:
      parts = re.fullmatch(rf"{_RUNS}(?:\[(.*)\]{_RUNS})?", text)
      require(parts, f"model.layout is {self.layout!r}; write it as 'm4 [T22] m4', of m, M, t and T with numbers")
      runs = [_runs(part) for part in (parts[1], parts[3]) if part]
      found.append(tuple(runs))
      if len(runs) == 1:
        return tuple(found)
      text = parts[2]

  @property
  def width(self) -> int:
    return self.widths[0]

  @property
  def depth(self) -> int:
    """Layers of all stages."""
    return sum(count for runs in self.stages for run in runs for _, count in run)

  @property
  def tied_embeddings(self) -> bool:
    return False

  def window(self, stage: int) -> int | None:
    if self.windows is not None:
      return self.windows[stage]
    return 1023 if stage < len(self.ratios) else None

  def mamba(self, stage: int) -> Mamba2Config:
    """The shape of a stage's Mamba-2 layers."""
    names = ("head_dim", "state", "taps", "expansion", "chunk", "norm_eps")
    return Mamba2Config(self.vocab_size, 1, self.widths[stage], **{name: getattr(self, name) for name in names})

  def transformer(self, stage: int) -> TransformerConfig:
    """The shape of a stage's attention layers and SwiGLUs."""
    heads, width = max(self.heads[stage], 1), self.widths[stage]
    sizes = dict(q_heads=heads, kv_heads=heads, head_dim=width // heads, mlp_width=max(self.mlp_widths[stage], 1))
    options = dict(norm_eps=self.norm_eps, rope_theta=self.rope_theta, layer_windows=(self.window(stage),))
    return TransformerConfig(vocab_size=self.vocab_size, depth=1, width=width, **sizes, **options)

  def flops_per_token(self, length: int, shares: tuple[float, ...] | None = None) -> float:
    """Training FLOPs a byte (forward and backward): every stage's layers by the share of the bytes that reach it.

    Args:
      shares: chunks a position, stage by stage; None: 1 / N, what training aims at.
    """
    shares = tuple(1 / n for n in self.ratios) if shares is None else shares
    total, reached = 6 * self.width * self.vocab_size, 1.0
    for stage, runs in enumerate(self.stages):
      positions = max(1, round(length * reached))
      layers = sum(count * self._layer_flops(kind, stage, positions) for run in runs for kind, count in run)
      between = 18 * self.widths[stage] ** 2 if stage < len(shares) else 0
      total += reached * (layers + between)
      reached *= shares[stage] if stage < len(shares) else 1.0
    return total

  def _layer_flops(self, kind: str, stage: int, length: int) -> int:
    """Of one layer and position."""
    shape = self.transformer(stage)
    mlp, head = 18 * shape.width * shape.mlp_width, 6 * shape.width * shape.vocab_size
    if kind in "mM":
      mixing = self.mamba(stage).flops_per_token(length) - head
    else:
      mixing = shape.flops_per_token(length) - head - mlp + 6 * self.gated * shape.width**2
    return mixing + (mlp if kind.isupper() else 0)


def _runs(text: str) -> Runs:
  return tuple((kind, int(count)) for kind, count in re.findall(r"([mMtT])(\d+)", text))


def stage_of(name: str) -> int:
  """The stage of a parameter by its dotted name; embedding and head are the outermost's."""
  return name.split(".").count("inner")
