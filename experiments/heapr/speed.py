"""How much faster a text is read without some of the atomic experts, and what that takes of memory."""

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.compressing import Subject, stored
from jaxlab.models import Transformer, inference, maps
from jaxlab.models.attention import dot_product_attention
from jaxlab.weights import heapr


def measure(config, subject: Subject) -> dict:
  """Of the layers apart, as `generate` runs them: {rows, time, dense (tokens/s), experts (bytes of the dense ones),
  kept: [{layout, ratio, speedup, spread, bytes, flops (as XLA counts them, over the dense ones)}]}.

  tiles: widths chosen in config.tile; padded: one width for all experts, ranked in each.
  """
  r, model = config.speed, subject.model
  found = heapr.statistics(model, subject.calibration, batch=config.text.others.batch)
  s, ratios = heapr.scores(found), sorted({1 - config.budget, 0.5})
  size = found.energy.shape[-1]
  contestants = {("dense", 0.0): model}
  for ratio in ratios:
    contestants["tiles", ratio] = heapr.sliced(model, heapr.select(s, ratio, multiple=config.tile), tile=config.tile)
    contestants["padded", ratio] = heapr.padded(model, heapr.select(s, ratio, pool="expert", multiple=config.tile))
  tokens = jnp.asarray(jnp.resize(subject.calibration, (r.rows, r.time)))
  networks = {name: _network(one, r.dtype) for name, one in contestants.items()}
  name_of = lambda layout, ratio: f"{layout} {ratio:g}"
  runs = {name_of(*name): timing.Steady(_read, network, tokens) for name, network in networks.items()}
  times = timing.compare(runs, repetitions=r.repetitions)
  arithmetic = {name: runs[name_of(*name)].flops() for name in networks}
  dense = next(iter(contestants))
  kept = []
  for layout, ratio in list(contestants)[1:]:
    speedup, spread = times.speedup(name_of(layout, ratio), name_of(*dense))
    kept.append(
      dict(layout=layout, ratio=ratio, speedup=speedup, spread=spread)
      | dict(bytes=_experts(networks[layout, ratio]), flops=arithmetic[layout, ratio] / arithmetic[dense])
    )
  rate = r.rows * r.time / times.median(name_of(*dense))
  return dict(rows=r.rows, time=r.time, dense=rate, experts=_experts(networks[dense]), hidden=size, kept=kept)


def _network(model: Transformer, dtype: str) -> inference.Network:
  cast = lambda a: a.astype(dtype) if a.dtype == jnp.bfloat16 else a
  return jax.jit(inference.take_apart)(jax.tree.map(cast, stored(model)))


def _read(network: inference.Network, tokens):
  return inference.hidden(network, tokens, None, attention=dot_product_attention)[0]


def _experts(network: inference.Network) -> int:
  return sum(maps.bytes_of(block.mlp) for block in network.blocks)
