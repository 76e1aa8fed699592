"""What merging loses: questions answered, losses behind a prompt, divergence of predictions, likeness of keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.chelsea import decoders
from experiments.chelsea.decoders import DENSE
from experiments.long_context import Subject, accuracy, documents, losses, padded
from experiments.overlap import overlapped
from jaxlab.evaluation.long_context import continuation_logprobs, late
from jaxlab.models import paged
from jaxlab.models.layers import apply_rope, rope_table

SEEN = "question seen"


def losses_of(config, subject: Subject) -> list[dict]:
  """Rows of `long_context.losses`: dense, Chelsea at every keep, and rivals with the bytes of the main one."""
  mine = subject.name == "base"
  read = config.losses.base if mine else config.losses.others
  keeps, rivals = (config.keeps, config.rivals) if mine else ((config.keep,), config.others_rivals)
  compared = {DENSE: paged.decoder(chunk=256, page=64)}
  compared |= {f"Chelsea {keep:g}": decoders.of_chelsea(config, keep) for keep in keeps}
  how = dict(time=read.prompt, bytes_of_entry=decoders.entry_bytes(subject))
  compared |= {name: decoders.of_rival(config, name, config.keep, **how) for name in rivals}
  found = losses(subject, compared, read, seed=config.seed)
  held = {keep: decoders.entries(config.method, keep, read.prompt) / read.prompt for keep in keeps}
  return [row | {"entries": _share(row["decoder"], held, config.keep)} for row in found]


def _share(name: str, held: dict[float, float], main: float) -> float:
  """Of the prompt's entries that are held."""
  if name == DENSE:
    return 1.0
  return next((share for keep, share in held.items() if name == f"Chelsea {keep:g}"), held[main])


def questions_of(config, subject: Subject) -> list[dict]:
  """Rows of `long_context.accuracy`, of decoders that shrank the cache before the question and, of some, after it."""
  asked, rows = config.questions, []
  for length in asked.lengths:
    how = dict(time=length - asked.late, bytes_of_entry=decoders.entry_bytes(subject))
    rival = lambda name, how=how: decoders.of_rival(config, name, config.keep, **how)
    whole = {DENSE: paged.decoder(chunk=256, page=64), "Chelsea": decoders.of_chelsea(config, config.keep)}
    whole |= {name: rival(name) for name in config.rivals}
    compared = {name: late(decoder, asked.late) for name, decoder in whole.items()}
    compared |= {f"{name}, {SEEN}": whole[name] for name in ("Chelsea", "snapkv") if name in whole}
    one = asked.copy_and_resolve_references()
    one.lengths = (length,)
    rows += accuracy(subject, compared, one)
  return rows


def mergings_of(config, subject: Subject) -> dict[str, dict]:
  """{way of merging: {kl: mean KL(dense || merged) of a prediction in nats, error: of that mean over documents,
  difference: of the loss}}."""
  read = config.mergings.read
  rows = documents(subject.tokens, read.documents, read.prompt + read.rest, seed=config.seed + 1)
  parts = [padded(rows[i : i + read.batch], read.batch) for i in range(0, len(rows), read.batch)]
  predict = functools.partial(continuation_logprobs, subject.network, prompt=read.prompt)
  plain = paged.decoder(chunk=256, page=64)
  exact = [predict(part, decoder=plain) for part in parts]

  def one(decoder) -> dict:
    pairs = [_divergence(a, predict(part, decoder=decoder), part) for a, part in zip(exact, parts, strict=True)]
    kl, difference = (np.concatenate(a)[: len(rows)].mean(axis=1) for a in zip(*pairs, strict=True))
    error = kl.std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
    return {"kl": float(kl.mean()), "error": float(error), "difference": float(difference.mean())}

  compared = decoders.mergings(config, config.keep)
  return dict(zip(compared, overlapped(one, compared.values()), strict=True))


@jax.jit
def _divergence(exact, merged, tokens):
  """(KL(exact || merged), merged loss less exact loss) of every prediction, float32[batch, rest] each."""
  loss = lambda logprobs: -jnp.take_along_axis(logprobs, tokens[:, -logprobs.shape[1] :, None], axis=2)[..., 0]
  return (jnp.exp(exact) * (exact - merged)).sum(axis=-1), loss(merged) - loss(exact)


def similarity_of(config, subject: Subject) -> dict:
  """How alike keys are, mean over tokens, heads and layers.

  Returns:
    {"distances", "cosine": of two keys at each, "unrotated": before RoPE, "within": share of tokens whose likeliest
    other key lies less than a chunk away}.
  """
  s, network = config.similarity, subject.network
  rows = documents(subject.tokens, s.documents, s.tokens, seed=config.seed + 2)
  _, state = jax.jit(functools.partial(paged.prefill, capacity=s.tokens, chunk=256, page=64))(network, rows)
  cos, sin = rope_table(network.model.config, jnp.arange(s.tokens), jnp.float32)
  distances = [2**i for i in range(s.tokens.bit_length() - 1)]
  measure = jax.jit(functools.partial(_likeness, distances=distances, chunk=config.method.chunk))

  def of_layer(pool):
    keys = paged.rows(pool, state.table)[:, :, : s.tokens]
    plain = apply_rope(jnp.swapaxes(keys, 1, 2).astype(jnp.float32), cos, -sin)
    return measure(keys), measure(jnp.swapaxes(plain, 1, 2))

  layers = [of_layer(pool) for pool, _ in state.pools]
  mean = lambda kind, what: np.mean([np.asarray(layer[kind][what]) for layer in layers], axis=0).tolist()
  return {"distances": distances, "cosine": mean(0, 0), "unrotated": mean(1, 0), "within": mean(0, 1)}


def _likeness(keys, *, distances, chunk: int):
  unit = keys.astype(jnp.float32)
  unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
  mean = jnp.stack([(unit[:, :, d:] * unit[:, :, :-d]).sum(axis=-1).mean() for d in distances])
  count = unit.shape[2]
  one = lambda unit: jnp.argmax(jnp.where(jnp.eye(count, dtype=bool), -2.0, unit @ unit.T), axis=1)
  best = jax.lax.map(one, unit.reshape(-1, *unit.shape[2:]))
  return mean, (jnp.abs(best - jnp.arange(count)) < chunk).mean()
