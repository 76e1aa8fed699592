"""What the regulariser costs in memory: temporary bytes of a compiled training step."""

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.results import Claim
from experiments.snlp.settings import PLAIN, REGULARISED
from experiments.snlp.training import training_loss
from experiments.text import Text, model_config
from jaxlab.core import mesh as meshes
from jaxlab.models import Transformer
from jaxlab.training import loop
from jaxlab.training.optimizers import muon_adamw


def measure(config, text: Text) -> dict:
  """Temporary bytes of a compiled training step, plain and regularised."""
  shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
  t, mesh = config.train, meshes.make_mesh(config.mesh.to_dict())
  optimizer = muon_adamw(shape, steps=t.steps, batch_tokens=t.batch * t.length)
  state = loop.initial_state(Transformer(shape, jax.random.key(0)), optimizer, mesh, 0)
  ids = jax.ShapeDtypeStruct((t.batch, t.length), jnp.int32, sharding=meshes.batch_sharding(mesh))
  result = {}
  for name, loss in ((PLAIN, training_loss(config)), (REGULARISED, training_loss(config, config.reg))):
    step = loop.make_step(
      loss, optimizer, meshes.shardings(state, mesh), accumulate=t.accumulate, compute_dtype=t.dtype
    )
    result[name] = timing.memory(step.lower(state, {"inputs": ids, "targets": ids}).compile())
  return result


def claims(measured: dict) -> list[Claim]:
  """At most twice the memory of an ordinary step."""
  plain = measured[PLAIN]["temporaries"]
  return [
    Claim(
      "How many times the memory of a plain training step one with SNLP's regulariser takes", "x", "lower",
      ours=measured[REGULARISED]["temporaries"] / plain, threshold=2.0, baseline=f"{plain / 2**30:.2f} GiB",
      note="temporary buffers of the compiled step; config.train.remat says what is recomputed",
    )
  ]  # fmt: skip
