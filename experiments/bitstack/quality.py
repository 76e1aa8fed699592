"""What stacks of sign blocks lose at a number of bytes, and without a part of the method."""

import time

import jax
import numpy as np

from experiments.compressing import Subject, left_out, made_rows, rivals, row, selection_loss, sizes, stored
from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.weights import bitstack, svd

MAIN = "bitstack"


def whole(config, subject: Subject, **options) -> Transformer:
  """All blocks."""
  how = dict(blocks=sizes(config.blocks, subject), rank=config.rank, batch=sizes(config.text, subject).batch)
  return stored(bitstack.decompose(subject.model, subject.calibration, **(how | options)))


def order_of(config, subject: Subject, stacks: Transformer, how: str, scores=None) -> list[bitstack.Block]:
  """Blocks in their order; "level" takes no scores."""
  if how == "level":
    return bitstack.level_order(stacks)
  return bitstack.sort_blocks(scores, how=how, seed=config.seed)


def scored(subject: Subject, stacks: Transformer) -> dict:
  """Of every block, judged by activations in float32."""
  return bitstack.score_blocks(wide(stacks), selection_loss(subject))


def wide(model: Transformer) -> Transformer:
  """What is not in blocks in float32: activations have the dtype of the embedding."""
  return jax.tree.map(lambda a: a.astype("float32") if a.dtype == "bfloat16" else a, model)


def frontier(config, subject: Subject, *, console) -> dict:
  """{"rows": of the rivals, and of BitStack at their bytes and at sizes between; "order": how blocks were sorted;
  "seconds": to all blocks, unsorted}."""
  rows = made_rows(subject, sizes(config.rivals, subject), rivals(config, subject), console)
  start = time.perf_counter()
  stacks = jax.block_until_ready(whole(config, subject))
  seconds = time.perf_counter() - start
  if kept := left_out(subject.model, stacks):
    console.say(f"  left as they are, as one block takes more: {', '.join(kept)}")
  how = sizes(config.orders, subject)[0]
  order = order_of(config, subject, stacks, how, None if how == "level" else scored(subject, stacks))
  least, most = (bitstack.configurations(stacks, order)[i][0] for i in (0, -1))
  wanted = {one["bytes"] for one in rows[1:] if least <= one["bytes"] <= most}
  wanted |= {int(size) for size in np.linspace(least, most, config.steps)}
  for size in sorted(wanted):
    rows.append(row(subject, MAIN, size / 1e6, bitstack.at_budget(stacks, order, budget=size)))
    console.say(f"  {rows[-1]['bytes'] / 1e6:.4g} MB: perplexity {rows[-1]['perplexity']:.4g}")
  return {"rows": rows, "order": how, "seconds": seconds}


def sizes_of(config, subject: Subject) -> dict:
  """Perplexity through sizes, all of one program, which shrinks and grows again."""
  stacks = whole(config, subject)
  order = order_of(config, subject, stacks, "level")
  made = bitstack.configurations(stacks, order)
  places = np.linspace(0, len(made) - 1, 2 * config.steps).astype(int)
  rows = [row(subject, MAIN, i, bitstack.with_counts(stacks, made[i][1])) for i in map(int, places)]
  logits = jax.jit(lambda model, tokens: model(tokens))
  tokens = subject.selection[:1, :-1]
  first = logits(wide(stacks), tokens)
  for i in (*reversed(places), *places):
    last = logits(bitstack.with_counts(wide(stacks), made[int(i)][1]), tokens)
  kept = [dict(bytes=one["bytes"], perplexity=one["perplexity"]) for one in rows]
  same = bool((first == last).all())
  return {"rows": kept, "configurations": len(made), "programs": logits._cache_size(), "same": same}


def ablations(config, subject: Subject, *, console) -> list[dict]:
  """Rows of every ablation at the bytes of 2 bits and of 3, `budget` being the bits."""
  stacks = whole(config, subject)
  scores = scored(subject, stacks)
  orders = {how: order_of(config, subject, stacks, how, scores) for how in ("average", "greedy", "random")}
  names = {"average": MAIN}
  plain = {name: whole(config, subject, **options) for name, options in _PLAIN.items()}
  full = {name: svd.decompose(subject.model, subject.calibration, how) for name, how in _SVDS.items()}
  rows = []

  def add(name: str, bits: int, model: Transformer) -> None:
    rows.append(row(subject, name, bits, model))
    console.say(f"  {name} at the bytes of {bits} bits: perplexity {rows[-1]['perplexity']:.4g}")

  for bits in (2, 3):
    size = maps.bytes_of(stored(rivals(config, subject)["rtn"](bits)))
    least = bitstack.configurations(stacks, orders["average"])[0][0]
    require(size >= least, f"one block of every map takes {least} bytes, {bits} bits {size}; lower config.rank")
    for how, order in orders.items():
      add(names.get(how, how), bits, bitstack.at_budget(stacks, order, budget=size))
    share = rows[-len(orders)]["share"]
    for name, model in plain.items():
      add(name, bits, bitstack.at_budget(model, orders["average"], budget=size))
    for name, factors in full.items():
      add(name, bits, svd.truncate(subject.model, factors, budget=share))
  return rows


_PLAIN = {"unscaled": dict(scaled=False), "folded": dict(folded=True), "published": dict(from_stored=False)}


def _scaled_svd(weight, x):
  """The singular triplets of diag(s) W, s divided out again: BitStack without its signs."""
  scale = bitstack.input_scale(x)[:, None]
  down, up = svd.plain_svd(scale * weight.astype("float32"), x)
  return down / scale, up


_SVDS = {"svd": _scaled_svd, "svd unscaled": svd.plain_svd}


def within(config, subject: Subject) -> Transformer:
  """The model in config.budget of its blocks' bytes: as many blocks as fill it, in the order of `level`."""
  require(0 < config.budget <= 1, f"budget is {config.budget}; it must lie in 0 < budget <= 1")
  dense = stored(subject.model)
  blocks = maps.bytes_of(maps.named(dense.blocks))
  budget = maps.bytes_of(dense) - blocks + int(config.budget * blocks)
  stacks = whole(config, subject, blocks=bitstack.blocks_to_fill(dense, budget=budget, rank=config.rank))
  return bitstack.at_budget(stacks, order_of(config, subject, stacks, "level"), budget=budget)
