"""Training a decoder on one kind of rows, and its loss on whole chapters by position."""

from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from experiments.dataset_decomposition import data
from experiments.text import adam_in_state, model_config
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require_choice
from jaxlab.data.packing import Batch
from jaxlab.data.tokens import Tokens
from jaxlab.kernels import chunk_attention
from jaxlab.models import Transformer
from jaxlab.sequence import dataset_decomposition as dd
from jaxlab.training import loop, losses

CONCAT, MASKED, BEST_FIT, UNIFORM, GROW = "concat", "concat_masked", "best_fit_masked", "uniform", "grow_p2"
ARMS = (CONCAT, MASKED, BEST_FIT, *dd.CURRICULA)


def masked(arm: str) -> bool:
  """Whether attention is kept within documents by a mask."""
  return arm in (MASKED, BEST_FIT)


def rows_of(config, arm: str, tokens: Tokens, seed: int) -> tuple[grain.IterDataset, dict[str, int], int]:
  """(batches of this host, {kind of step, as `speed` names it: steps}, the most documents in a row of rivals); as many
  steps for every arm as the buckets' schedule has."""
  require_choice("an arm", arm, ARMS)
  s, longest, shard = config.schedule, 2**config.high, (jax.process_index(), jax.process_count())
  buckets = dd.decompose(tokens, low=config.low, high=config.high, seed=config.seed)
  how = dict(cycles=s.cycles, batch_tokens=config.batch_tokens, token_weighted=s.token_weighted, seed=seed)
  plan = dd.schedule(buckets.counts, curriculum=arm if arm in dd.CURRICULA else GROW, **how)
  if arm in dd.CURRICULA:
    exponents, counts = np.unique(plan.exponent, return_counts=True)
    return (
      dd.batches(buckets, plan, shard=shard),
      {f"{2 ** int(i)}": int(n) for i, n in zip(exponents, counts, strict=True)},
      1,
    )
  rows = (data.best_fit if arm == BEST_FIT else data.chunks)(tokens, longest)
  made = data.batches(rows, config.batch_tokens // longest, seed, shard=shard)
  return made, {kind_of(config, arm): len(plan)}, data.most_documents(rows, tokens.bos)


def kind_of(config, arm: str) -> str:
  """Which of the steps that `speed` measures a rival's are."""
  return "masked" if masked(arm) else f"{2**config.high}"


def loss_of(config, arm: str, bos: int, most: int):
  """`(model, batch, step, key) -> (loss, {})`; most: documents in a row, at most."""

  def within_documents(model, batch, step, key):
    inputs = batch["inputs"]
    document = jnp.cumsum(inputs == bos, axis=1)

    def attention(q, k, v, *, window, start):
      del start
      return chunk_attention.packed(q, k, v, document, pieces=most, window=window)

    hidden = model.hidden(jnp.maximum(inputs, 0), attention=attention, remat=config.train.remat)
    found = losses.token_losses(model, hidden, batch["targets"])
    return losses.mean_loss(found, batch["targets"]), {}

  def plain(model, batch, step, key):
    return losses.language_model_loss(model, batch, remat=config.train.remat)

  return within_documents if masked(arm) else plain


def trained(
  config, arm: str, tokens: Tokens, *, vocab_size: int, rate: float, seed: int, workdir: Path, console
) -> tuple[Transformer, dict[str, int]]:
  """(the decoder in its computing precision, {kind of step: steps}); resumes from `workdir`."""
  t, shape = config.train, model_config(config, vocab_size)
  rows, steps, most = rows_of(config, arm, tokens, seed)
  total = sum(steps.values())
  with console.training(workdir.name) as progress:
    model = loop.train(
      Transformer(shape, jax.random.key(seed)),
      rows,
      loss_of(config, arm, tokens.bos, most),
      adam_in_state(rate, steps=total, warmup=t.warmup),
      steps=total,
      workdir=workdir,
      seed=seed,
      compute_dtype=t.dtype,
      checkpoint_every=t.checkpoint_every,
      mesh=meshes.make_mesh(config.mesh.to_dict()),
      progress=progress,
    )
  return loop.cast(model, t.dtype), steps


def by_position(model: Transformer, rows: Batch, edges: list[int], batch: int) -> dict:
  """{"mean": loss of a token, "positions": of those of each group of positions}."""
  sums, counts = np.zeros(edges[-1]), np.zeros(edges[-1])
  for i in range(0, len(rows["inputs"]), batch):
    part = {name: _filled(a[i : i + batch], batch, fill) for (name, a), fill in zip(rows.items(), (0, -1), strict=True)}
    sums += np.asarray(_losses(model, part), np.float64)
    counts += (part["targets"] >= 0).sum(axis=0)
  groups = [slice(a, b) for a, b in zip([0, *edges], edges, strict=False)]
  return dict(mean=float(sums.sum() / counts.sum()), positions=[float(sums[g].sum() / counts[g].sum()) for g in groups])


def _filled(a: np.ndarray, batch: int, fill: int) -> np.ndarray:
  return np.pad(a, ((0, batch - len(a)), (0, 0)), constant_values=fill)


@jax.jit
def _losses(model, batch):
  return losses.token_losses(model, model.hidden(batch["inputs"]), batch["targets"]).sum(axis=0)
