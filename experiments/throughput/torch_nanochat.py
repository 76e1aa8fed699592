"""nanochat's forward pass in PyTorch, under karpathy's parameter names: the opponent in speed, a witness in tests.

Written for `torch.compile`: weights pre-cast, one fused QKV product, SDPA's flash kernel. Full causal windows only,
where SDPA needs no mask.
"""

import torch
import torch.nn.functional as F
from torch import nn

from jaxlab.core.checks import require
from jaxlab.models.config import TransformerConfig


class Nanochat(nn.Module):
  """`model(tokens: int64[batch, time]) -> float32[batch, time, vocab]`."""

  def __init__(self, config: TransformerConfig, tensors: dict, dtype=torch.float32, device="cpu"):
    """`tensors`: NumPy arrays under karpathy's names (`hub.to_tensors(model, formats.KARPATHY)`)."""
    super().__init__()
    require(set(config.windows) == {None}, "the torch opponent has full windows only; use window_pattern='L'")
    self.config = config
    place = lambda name: torch.from_numpy(tensors[name].astype("float32")).to(device, dtype)
    scalars = lambda name: torch.from_numpy(tensors[name].astype("float32")).to(device)
    self.wte, self.head = place("transformer.wte.weight"), place("lm_head.weight")
    self.smear_gate, self.smear_lambda = place("smear_gate.weight"), scalars("smear_lambda")
    self.backout_lambda = scalars("backout_lambda")
    self.lam = scalars("resid_lambdas").tolist() if config.residual_lambdas else None
    self.mu = scalars("x0_lambdas").tolist() if config.residual_lambdas else None
    self.layers, self.values = [], {}
    for i in range(config.depth):
      get = lambda part, i=i: place(f"transformer.h.{i}.{part}.weight")
      layer = {"qkv": torch.cat([get(f"attn.c_{x}") for x in "qkv"]), "o": get("attn.c_proj")}
      layer |= {"fc": get("mlp.c_fc"), "proj": get("mlp.c_proj")}
      if i in config.value_layers:
        layer["gate"] = get("attn.ve_gate")
        self.values[i] = place(f"value_embeds.{i}.weight")
      self.layers.append(layer)
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    angle = torch.arange(config.context, dtype=torch.float32, device=device)[:, None] * frequency
    self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

  def forward(self, tokens):
    c = self.config
    batch, time = tokens.shape
    norm = lambda x: F.rms_norm(x, (x.shape[-1],), eps=c.norm_eps)
    cos, sin = self.cos[:time, None], self.sin[:time, None]

    def rotate(x):
      a, b = x.chunk(2, dim=-1)
      return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

    x = norm(self.wte[tokens])
    gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(x[:, 1:, :24] @ self.smear_gate.T)
    x = x0 = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
    heads, groups = c.q_heads, c.kv_heads
    for i, layer in enumerate(self.layers):
      if self.lam:
        x = self.lam[i] * x + self.mu[i] * x0
      a = norm(x)
      q, k, v = (a @ layer["qkv"].T).view(batch, time, -1, c.head_dim).split([heads, groups, groups], dim=2)
      if i in self.values:
        value = self.values[i][tokens].view(batch, time, groups, c.head_dim)
        v = v + 3 * torch.sigmoid(a[..., :12] @ layer["gate"].T)[..., None] * value
      q, k = 1.2 * norm(rotate(q)), 1.2 * norm(rotate(k))
      y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
      x = x + y.transpose(1, 2).reshape(batch, time, -1) @ layer["o"].T
      x = x + F.relu(norm(x) @ layer["fc"].T).square() @ layer["proj"].T
      if i == c.depth // 2:
        backout = x
    x = norm(x - self.backout_lambda.to(x.dtype) * backout)
    return 15 * torch.tanh((x @ self.head.T).float() / 15)
