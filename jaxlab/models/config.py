"""One configuration for every decoder-only transformer here, and the presets that name the published ones."""

import dataclasses
import math

from jaxlab.core.checks import require, require_choice, require_divides


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3 frequency scaling: wavelengths above context/low_frequency grow by `factor`, a ramp in between."""

  factor: float = 8.0
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class Experts:
  """Mixture of experts: each token goes to `active` of `count` SwiGLU experts of hidden size `width`."""

  count: int
  active: int
  width: int
  normalize: bool = True


@dataclasses.dataclass(frozen=True)
class HyperConnections:
  """Manifold-constrained hyper-connections (mHC): `streams` residual streams mixed by doubly stochastic matrices.

  static: input-independent mixing. dynamic: mixing computed from the token's streams (arXiv 2512.24880).
  """

  streams: int = 4
  dynamic: bool = False
  rounds: int = 10
  temperature: float = 0.05


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape and switches of a decoder-only transformer.

  Attributes:
    context: trained sequence length in tokens; sets the short window.
    mlp: "swiglu" (gate, up, down) or "relu2" (squared ReLU).
    norm_gain: RMSNorm has a learned gain.
    rope_factor: every rotary frequency is divided by it (linear scaling of positions).
    rope_direction: +1 rotates by +theta (Llama), -1 by -theta (nanochat).
    qk_norm: None, "before_rope" (Qwen3) or "after_rope" (nanochat), per head over head_dim.
    qk_scale: factor on normalised queries and keys.
    window_pattern: "L" full and "S" short windows, tiled over the layers; the last layer is always full.
    layer_windows: a window for every layer instead (query i sees keys i - w .. i; None is full), or None.
    layer_kv_heads, layer_mlp_widths: the key-value heads (each with its q_heads / kv_heads queries) and the neurons of
      every layer, or None where all have kv_heads and mlp_width. Stacked, layers with fewer are filled with zeros.
    embed_norm: RMSNorm on the embeddings.
    value_embeddings: alternate layers (the last included) add a gated per-token embedding to the values.
    residual_lambdas: each block reads lam_l x + mu_l x0.
    smear: each embedding receives a gated copy of its predecessor.
    backout: subtract backout_lambda times the output of block depth // 2 before the head.
    logit_softcap: c in c tanh(logits / c), or None.
    parallel_sublayers: attention and MLP read the same input and are added together (GPT-J, PaLM).
  """

  vocab_size: int
  depth: int
  width: int
  q_heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  context: int = 2048
  mlp: str = "swiglu"
  norm_gain: bool = True
  norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rope_factor: float = 1.0
  rope_direction: int = 1
  qk_norm: str | None = None
  qk_scale: float = 1.0
  window_pattern: str = "L"
  layer_windows: tuple[int | None, ...] | None = None
  layer_kv_heads: tuple[int, ...] | None = None
  layer_mlp_widths: tuple[int, ...] | None = None
  embed_norm: bool = False
  value_embeddings: bool = False
  residual_lambdas: bool = False
  smear: bool = False
  backout: bool = False
  logit_softcap: float | None = None
  tied_embeddings: bool = False
  parallel_sublayers: bool = False
  experts: Experts | None = None
  hyper: HyperConnections | None = None

  def __post_init__(self):
    for name in ("vocab_size", "depth", "width", "q_heads", "kv_heads", "head_dim", "mlp_width", "context"):
      require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
    require_choice("model.mlp", self.mlp, ("swiglu", "relu2"))
    require_choice("model.qk_norm", self.qk_norm, (None, "before_rope", "after_rope"))
    require_divides("model.kv_heads", self.kv_heads, "model.q_heads", self.q_heads)
    require_divides("2 (rotary halves)", 2, "model.head_dim", self.head_dim)
    require(
      set(self.window_pattern) <= {"S", "L"} and self.window_pattern != "",
      f"model.window_pattern is {self.window_pattern!r}; it must be made of S (short) and L (long)",
    )
    if self.layer_windows is not None:
      enough = len(self.layer_windows) == self.depth and all(w is None or w >= 0 for w in self.layer_windows)
      require(enough, f"model.layer_windows is {self.layer_windows}; it must have {self.depth} sizes >= 0 or None")
    for name, most in (("kv_heads", self.kv_heads), ("mlp_widths", self.mlp_width)):
      sizes = getattr(self, f"layer_{name}")
      fits = sizes is None or (len(sizes) == self.depth and all(1 <= n <= most for n in sizes))
      require(fits, f"model.layer_{name} is {sizes}; it must have {self.depth} sizes of 1..{most}")
    if self.experts:
      require(
        1 <= self.experts.active <= self.experts.count,
        f"experts.active={self.experts.active} must lie in 1..experts.count={self.experts.count}",
      )
    require(
      not (self.hyper and self.residual_lambdas), "hyper-connections replace residual_lambdas; turn one of the two off"
    )
    require(
      not (self.hyper and self.parallel_sublayers),
      "hyper-connections mix the streams before each sublayer; turn parallel_sublayers off",
    )

  @property
  def windows(self) -> tuple[int | None, ...]:
    """Per layer: query i sees keys i - w .. i (w + 1 of them); None is plain causal."""
    if self.layer_windows is not None:
      return self.layer_windows
    short = math.ceil(self.context / 4 / 128) * 128
    kinds = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.depth)]
    kinds[-1] = "L"
    return tuple(short if kind == "S" else None for kind in kinds)

  @property
  def ragged(self) -> bool:
    """Whether layers differ in heads or neurons."""
    return self.layer_kv_heads is not None or self.layer_mlp_widths is not None

  def of_layer(self, layer: int) -> "TransformerConfig":
    """The config whose heads and neurons are those of one layer."""
    heads = self.kv_heads if self.layer_kv_heads is None else self.layer_kv_heads[layer]
    neurons = self.mlp_width if self.layer_mlp_widths is None else self.layer_mlp_widths[layer]
    sizes = dict(kv_heads=heads, q_heads=heads * (self.q_heads // self.kv_heads), mlp_width=neurons)
    return dataclasses.replace(self, **sizes, layer_kv_heads=None, layer_mlp_widths=None)

  @property
  def value_layers(self) -> tuple[int, ...]:
    """Layers that have a value embedding: every second one, the last included."""
    if not self.value_embeddings:
      return ()
    return tuple(layer for layer in range(self.depth) if layer % 2 == (self.depth - 1) % 2)

  @property
  def matmul_parameters(self) -> int:
    """Parameters that multiply activations once a token: the block matrices (active experts) and the head."""
    if self.ragged:
      layers = [dataclasses.replace(self.of_layer(i), depth=1, layer_windows=None) for i in range(self.depth)]
      head = self.width * self.vocab_size
      return head + sum(layer.matmul_parameters - head for layer in layers)
    attention = self.width * self.head_dim * (2 * self.q_heads + 2 * self.kv_heads)
    matrices = 3 if self.mlp == "swiglu" else 2
    mlp = matrices * self.width * self.mlp_width
    if self.experts:
      mlp = self.width * self.experts.count + 3 * self.experts.active * self.width * self.experts.width
    return self.depth * (attention + mlp) + self.width * self.vocab_size

  def flops_per_token(self, length: int) -> int:
    """Training FLOPs a token (forward and backward) at sequence length `length`: 6 N plus attention's 12 H d keys."""
    keys = [min(length, (w or length) + 1) for w in self.windows]
    read = sum(n * self.of_layer(layer).q_heads for layer, n in enumerate(keys))
    return 6 * self.matmul_parameters + 12 * self.head_dim * read


def nanochat(
  *,
  depth: int,
  aspect_ratio: int = 64,
  head_dim: int = 128,
  vocab_size: int = 32768,
  context: int = 2048,
  window_pattern: str = "SSSL",
  x0: bool = True,
  value_embeddings: bool = True,
  parallel_sublayers: bool = False,
  hyper: HyperConnections | None = None,
) -> TransformerConfig:
  """karpathy/nanochat: one dial, `depth`; width = depth * aspect_ratio rounded up to whole heads.

  `x0` turns the x0 / residual lambdas on; hyper-connections force them off.
  """
  heads = math.ceil(depth * aspect_ratio / head_dim)
  width = heads * head_dim
  return TransformerConfig(
    vocab_size=vocab_size,
    depth=depth,
    width=width,
    q_heads=heads,
    kv_heads=heads,
    head_dim=head_dim,
    mlp_width=4 * width,
    context=context,
    mlp="relu2",
    norm_gain=False,
    norm_eps=1.1920929e-07,
    rope_theta=100000.0,
    rope_direction=-1,
    qk_norm="after_rope",
    qk_scale=1.2,
    window_pattern=window_pattern,
    embed_norm=True,
    value_embeddings=value_embeddings,
    residual_lambdas=x0 and hyper is None,
    smear=True,
    backout=True,
    logit_softcap=15.0,
    parallel_sublayers=parallel_sublayers,
    hyper=hyper,
  )


def qwen3(
  *,
  vocab_size: int,
  depth: int,
  width: int,
  q_heads: int,
  kv_heads: int,
  head_dim: int,
  mlp_width: int,
  context: int,
  rope_theta: float = 1e6,
  tied_embeddings: bool = True,
) -> TransformerConfig:
  """Qwen3: grouped queries, gained RMSNorm on queries and keys before RoPE, SwiGLU."""
  return TransformerConfig(
    vocab_size=vocab_size,
    depth=depth,
    width=width,
    q_heads=q_heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_width=mlp_width,
    context=context,
    rope_theta=rope_theta,
    qk_norm="before_rope",
    tied_embeddings=tied_embeddings,
  )
