"""Methods by name, and what selectors choose of a network's own queries and keys."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.long_context import Subject, parse
from experiments.overlap import overlapped
from jaxlab.attention.compact_attention import block_union, compact, density, quoka, summary_of
from jaxlab.attention.seer_gate import SeerGate, seer
from jaxlab.attention.selection import flash_prefill, flex_prefill, grouped_products, minference, x_attention
from jaxlab.core.checks import require
from jaxlab.evaluation.long_context import question
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.inference import Network, run_layers

DENSE, QUOKA, BLOCKS = "dense", "quoka", "block_sparse"
_SLASHES = 6  # diagonals a column, about as MInference has them


def selector(text: str, config, gate: SeerGate | None = None) -> Callable | tuple[Callable, ...]:
  """The rule of "compact ALPHA" and "block_sparse ALPHA" (FlashPrefill's), "x_attention THRESHOLD", "flex_prefill
  GAMMA", "minference COLUMNS" or "seer TAU"; of the last one for each layer.

  Raises:
    InputError: another name, or "seer" without a gate.
  """
  name, value = parse(text)
  c = config.select
  if name == "seer":
    require(gate is not None, "the method 'seer' needs a trained gate")
    return gate.selectors(tau=value, recent=c.recent)
  rules = {
    "compact": functools.partial(flash_prefill, alpha=value, sink=c.sink, window=c.window),
    "x_attention": functools.partial(x_attention, threshold=value, stride=c.stride),
    "flex_prefill": functools.partial(flex_prefill, gamma=value, budget=c.budget),
    "minference": functools.partial(minference, vertical=int(value), slash=int(value) * _SLASHES, last=c.last),
  }
  rules[BLOCKS] = rules["compact"]
  require(name in rules, f"the method is {name!r}; it must be one of seer, {QUOKA}, {', '.join(rules)}")
  return rules[name]


def decoders(methods, config, gate: SeerGate | None = None) -> dict:
  """{"dense", then every one of `methods`: its decoder}."""

  def method(text: str):
    name, value = parse(text)
    if name == QUOKA:
      return quoka(queries=config.select.queries, budget=value)
    last = config.select.dense_blocks if name == "seer" else 0
    return compact(selector(text, config, gate), union=name != BLOCKS, last=last)

  how = dict(chunk=config.chunk, page=config.page)
  return {DENSE: paged.decoder(**how)} | {text: paged.decoder(method(text), **how) for text in methods}


def prompts(subject: Subject, *, task: str, length: int, count: int) -> np.ndarray:
  """int32[count, length]: questions with their answers."""
  rows = []
  for seed in range(count):
    made = question(task, subject.tokens, subject.tokenizer, length=length, seed=seed)
    answer = subject.tokenizer.encode(f" {made.answers[0]}", add_special_tokens=False).ids
    rows.append([*made.prompt, *answer])
  require(
    all(len(row) == length for row in rows), f"questions of the task {task!r} have no length of their own; ask another"
  )
  return np.array(rows, np.int32)


@jax.jit
def captured(network: Network, tokens) -> list[tuple]:
  """(q, k) of every layer under dense attention, (batch, heads, time, head_dim) each."""
  x, side, _ = network.model.embed(tokens)
  found = []

  def attend(layer, _, x, q, k, v, window):
    found.append((jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)))
    return dot_product_attention(q, k, v, window=window, start=0)

  run_layers(network, x, side, attend)
  return found


def measure(config, subject: Subject, gate: SeerGate | None = None) -> dict:
  """{method: {"before", "after": the share of causal block pairs that is chosen, and that the union reads;
  "past": the share of past blocks that the union reads; "mass_before", "mass_after": the share of the attention that
  they hold; "least_gain": the least that any query gained by the union}}: means over layers, rows and all chunks but
  the first.
  """
  s = config.choices
  layers = captured(subject.network, prompts(subject, task=s.task, length=s.length, count=s.rows))

  of = lambda text: _over_layers(selector(text, config, gate), layers, chunk=config.chunk, block=config.page)
  return dict(zip(s.methods, overlapped(of, s.methods), strict=True))


def unions(config, subject: Subject, gate: SeerGate | None = None) -> dict:
  """{"method": the first of `choices.methods`, "rows": what `measure` has, by chunk and the heads that share a table}:
  chunks of `unions.chunks` tokens, every divisor of the heads that share a key head."""
  s, text = config.choices, config.choices.methods[0]
  layers = captured(subject.network, prompts(subject, task=s.task, length=s.length, count=s.rows))
  group = layers[0][0].shape[1] // layers[0][1].shape[1]
  cases = [(chunk, n) for chunk in config.unions.chunks for n in range(1, group + 1) if group % n == 0]

  def of(case: tuple[int, int]) -> dict:
    chunk, share = case
    found = _over_layers(selector(text, config, gate), layers, chunk=chunk, block=config.page, share=share)
    return {"chunk": chunk, "share": share} | found

  return {"method": text, "rows": list(overlapped(of, cases))}


def _over_layers(rules: Callable | tuple[Callable, ...], layers: list[tuple], **how) -> dict:
  """Means of `_statistics` over the layers, and the least gain."""
  each = []
  for i, (q, k) in enumerate(layers):
    rule, arrays = _rule(rules[i] if isinstance(rules, tuple) else rules)
    each.append(_statistics(q, k, arrays, select=rule, **how))
  mean = {name: float(np.mean([row[name] for row in each])) for name in each[0] if name != "least_gain"}
  return mean | {"least_gain": float(min(row["least_gain"] for row in each))}


def _rule(select: Callable) -> tuple[Callable, dict]:
  """(the rule, its arrays): apart, so that the layers share a program."""
  if select.func is not seer:
    return select, {}
  options = {name: value for name, value in select.keywords.items() if name != "maps"}
  return _seer(**options), {"maps": select.keywords["maps"]}


@functools.cache
def _seer(**options):
  return functools.partial(seer, **options)


@functools.partial(jax.jit, static_argnames=("select", "chunk", "block", "share"))
def _statistics(q, k, arrays, *, select, chunk: int, block: int, share: int | None = None) -> dict:
  summary = summary_of(select)
  keys = summary(k, block) if summary else k
  position = jnp.arange(k.shape[2])

  def one(past):
    rows = jax.lax.dynamic_slice_in_dim(q, past, chunk, axis=2)
    chosen = select(rows, keys, past=past, block=block, **arrays)
    union = block_union(chosen, kv_heads=k.shape[1], past=past // block, share=share)
    union = jnp.repeat(union, q.shape[1] // union.shape[1], axis=1)[:, :, None]
    causal = position <= past + jnp.arange(chunk)[:, None]
    score = jnp.where(causal, grouped_products(rows, k) / q.shape[3] ** 0.5, -jnp.inf)
    weight = jax.nn.softmax(score, axis=-1)
    by_key = lambda a: jnp.repeat(a, block, axis=-1)
    before = jnp.where(jnp.repeat(by_key(chosen), block, axis=2), weight, 0).sum(axis=-1)
    after = jnp.where(by_key(union), weight, 0).sum(axis=-1)
    behind = jnp.arange(k.shape[2] // block) < past // block
    return {
      "before": density(chosen, past // block),
      "after": density(jnp.broadcast_to(union, chosen.shape), past // block),
      "past": (union & behind).sum() / (behind.sum() * union[..., 0].size),
      "mass_before": before.mean(),
      "mass_after": after.mean(),
      "least_gain": (after - before).min(),
    }

  found = jax.lax.map(one, jnp.arange(chunk, q.shape[2], chunk))
  return {name: a.min() if name == "least_gain" else a.mean() for name, a in found.items()}
