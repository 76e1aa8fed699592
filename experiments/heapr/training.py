"""Training the mixture that is pruned: every expert for every token in one product, and a loss that balances them."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.text import Text, load_text, model_config, train_model
from jaxlab.core.files import write_text
from jaxlab.models import Transformer, hub
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.block import unstack_layers
from jaxlab.models.inference import Network, run_layers
from jaxlab.models.layers import MoE, wide
from jaxlab.training import losses
from jaxlab.training.metrics import read_metrics


def trained(config, workdir: Path, cache: Path, console) -> dict:
  """Trains by config.train and writes the mixture with its vocabulary to workdir/moe; resumes from the workdir.

  Returns:
    {parameters, experts (parameters of them), tokens, curve ([[step, loss], ...]), busiest (tokens of the expert that
    gets most over an even share, largest of the layers, at the end)}.
  """
  text = load_text(config, cache)
  shape = model_config(config, text.bpe.get_vocab_size())
  t = config.train

  def loss(model, batch, step, key):
    value, balance, busiest = balanced_loss(model, batch)
    return value + t.balance * balance, {"cross_entropy": value, "balance": balance, "busiest": busiest}

  start = Transformer(shape, jax.random.key(config.seed))
  model = train_model(config, text, start, loss, workdir=workdir / "training", console=console, title="mixture")
  write(model, text, workdir / "moe")
  rows = read_metrics(workdir / "training")
  moe = model.blocks.mlp
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
    "experts": sum(one[...].size for one in (moe.gate, moe.up, moe.down)),
    "tokens": t.steps * t.batch * t.length,
    "curve": [[row["step"], row["cross_entropy"]] for row in rows[:: max(1, len(rows) // 100)]],
    "busiest": float(np.mean([row["busiest"] for row in rows[-20:]])),
  }


def write(model: Transformer, text: Text, folder: Path) -> None:
  """In 16 bits, as the models that people prune are."""
  hub.save(jax.tree.map(lambda a: a.astype("bfloat16"), model), folder)
  write_text(folder / "tokenizer.json", text.bpe.to_str())


def hidden(model: Transformer, tokens, mlp: Callable[[int, MoE, jax.Array], jax.Array]):
  """What `model.logits` reads, layer by layer, with mlp(layer, the layer's experts, their input) for its experts."""
  blocks = unstack_layers(model.blocks, model.depth)
  for layer, block in enumerate(blocks):
    block.mlp = lambda a, layer=layer, moe=block.mlp: mlp(layer, moe, a)
  x, side, _ = model.embed(tokens)
  attend = lambda layer, block, x, q, k, v, window: dot_product_attention(q, k, v, window=window, start=0)
  return run_layers(Network(model, tuple(blocks)), x, side, attend)


def gates(moe: MoE, x) -> tuple[jax.Array, jax.Array]:
  """(weights (tokens, experts), 0 of those that a token is not routed to; probabilities of all), float32."""
  probability = jax.nn.softmax(wide(moe.router(x)), axis=-1)
  weight, chosen = jax.lax.top_k(probability, moe.active)
  if moe.normalize:
    weight = weight / weight.sum(axis=-1, keepdims=True)
  one_hot = jax.nn.one_hot(chosen, probability.shape[-1], dtype=weight.dtype)
  return jnp.einsum("tk,tke->te", weight, one_hot), probability


def balanced_loss(model: Transformer, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(cross-entropy, sum over layers of sum_e f_e P_e, busiest).

  f_e: tokens of expert e over an even share; P_e: its mean probability. 1 a layer is even.
  """
  balance, busiest = [], []

  def mlp(layer, moe, a):
    x = a.reshape(-1, a.shape[-1])
    weight, probability = gates(moe, x)
    share = (weight > 0).mean(axis=0) * weight.shape[1] / moe.active
    balance.append((jax.lax.stop_gradient(share) * probability.mean(axis=0)).sum())
    busiest.append(share.max())
    # Experts are few: all of them for all tokens, in one matrix, cost less than products of unequal groups.
    beside = lambda w: jnp.moveaxis(w[...], 0, 1).reshape(x.shape[1], -1).astype(x.dtype)
    h = jax.nn.silu(x @ beside(moe.gate)) * (x @ beside(moe.up))
    h = h.reshape(len(x), weight.shape[1], -1) * weight[..., None].astype(x.dtype)
    return (h.reshape(len(x), -1) @ moe.down[...].reshape(-1, x.shape[1]).astype(x.dtype)).reshape(a.shape)

  losses_of = losses.token_losses(model, hidden(model, batch["inputs"], mlp), batch["targets"])
  value = losses.mean_loss(losses_of, batch["targets"])
  return value, jnp.stack(balance).mean(), jnp.stack(busiest).max()
