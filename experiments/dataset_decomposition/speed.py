"""Seconds of a training step on every bucket, and on rows of the longest under a document mask."""

import jax
import numpy as np

from experiments import timing
from experiments.dataset_decomposition.data import most_documents
from experiments.dataset_decomposition.training import CONCAT, MASKED, kind_of, loss_of
from experiments.text import adam_in_state, model_config
from jaxlab.core import mesh as meshes
from jaxlab.kernels import chunk_attention
from jaxlab.models import Transformer
from jaxlab.training import loop

_BOS = 0
MASK = "a mask given to the same attention"


def measure(config, vocab_size: int) -> dict:
  """{"milliseconds": {kind: median, p10, p90}, "temporaries": {kind: bytes}, "flops": {kind: of the model, a token},
  "apart": by what documents of masked rows are kept apart}.

  Whole steps, optimizer included, with as many tokens each, in one process and turn by turn; nothing is compiled, and
  no row is made, while the clock runs. Concat-and-chunk's step is that of the longest bucket.
  """
  shape = model_config(config, vocab_size)
  mesh = meshes.make_mesh(config.mesh.to_dict())
  optimizer = adam_in_state(1e-3, steps=1000, warmup=config.train.warmup)
  state = loop.initial_state(Transformer(shape, jax.random.key(0)), optimizer, mesh, 0)
  placed = meshes.shardings(state, mesh)
  rng = np.random.default_rng(0)

  def step(arm: str, length: int):
    ids = rng.integers(1, vocab_size, (config.batch_tokens // length, length + 1)).astype(np.int32)
    ids[rng.random(ids.shape) < 1 / config.law.mean] = _BOS
    loss = loss_of(config, arm, _BOS, most_documents(ids, _BOS))
    run = loop.make_step(loss, optimizer, placed, compute_dtype=config.train.dtype)
    batch = meshes.place_batch({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, mesh)
    return timing.Steady(lambda _, batch, state: run(state, batch)[::-1], (), batch, carry=state)

  lengths = {f"{2**i}": 2**i for i in range(config.low, config.high + 1)}
  contestants = {kind: step(CONCAT, length) for kind, length in lengths.items()}
  contestants[kind_of(config, MASKED)] = step(MASKED, 2**config.high)
  times = timing.compare(contestants, repetitions=config.speed.repetitions, warmup=1)
  heads = jax.ShapeDtypeStruct((1, 1, shape.q_heads, shape.head_dim), config.train.dtype)
  packed = chunk_attention.preferred(heads, heads, None)
  return dict(
    apart="documents in cuDNN's packed layout" if packed else MASK,
    milliseconds=times.summary(),
    temporaries={kind: contestant.memory()["temporaries"] for kind, contestant in contestants.items()},
    flops={kind: shape.flops_per_token(length) for kind, length in lengths.items()},
  )
