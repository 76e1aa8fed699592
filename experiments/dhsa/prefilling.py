"""What reading a prompt takes: one layer of DHSA beside dense attention, and a whole network."""

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.long_context import Subject, documents
from jaxlab.attention.dhsa import block_sparse, dhsa
from jaxlab.attention.dhsa_boundaries import BoundaryPredictor
from jaxlab.models import inference, paged
from jaxlab.models.config import TransformerConfig

DENSE, MATERIALISED, OURS, FIRST, SECOND, BLOCKS = (
  "dense", "materialised", "DHSA", "DHSA with boundaries", "DHSA, choice shared", "static blocks",
)  # fmt: skip


def measure(config, length: int, console) -> dict:
  """One layer at the published shape, on noise: all that a method does takes as long whatever the keys are.

  Returns:
    {"length", "milliseconds": {form: {median, p10, p90}}, "speedup": {form: [median, p10, p90] over dense attention},
    "temporaries": {form: bytes}}. "DHSA" is a layer that has the first one's boundaries.
  """
  console.say(f"timing a layer at {length} positions")
  p = config.prefill
  keys = jax.random.split(jax.random.key(config.seed), 4)
  shape = lambda heads: (1, length, heads, p.size)
  q, k, v = (
    jax.random.normal(key, shape(heads), p.dtype)
    for key, heads in zip(keys, (p.heads, p.kv_heads, p.kv_heads), strict=False)
  )
  network = TransformerConfig(
    vocab_size=16, depth=2, width=16, q_heads=p.heads, kv_heads=p.kv_heads, head_dim=p.size, mlp_width=16
  )
  predictor = BoundaryPredictor(network, keys[3])
  plan = dict(budget=p.budget, block=p.block, instruction=p.instruction)
  how = dict(local=p.local, sink=p.sink, theta=0.0, share_masks=True, **plan)
  sizes = dict(batch=1, capacity=length, page=1, dtype=q.dtype)
  view = lambda layer: paged.View(
    layer, None, None, None, jnp.zeros((1, 1), jnp.int32), jnp.int32(0), jnp.full((1,), length), None
  )

  def layer(number: int, share_masks: bool):
    """Attention of a layer: number 0 finds boundaries, 1 goes on from the memory: it chooses, or takes the choice."""

    def run(given):
      q, k, v, predictor, memory = given
      method = dhsa(predictor.score, **how | dict(share_masks=share_masks))
      return method.attend(q, k, v, view(number), memory if share_masks else memory.rule)[0]

    return run

  @jax.jit
  def begin(given):
    q, k, v, predictor = given
    method = dhsa(predictor.score, **how)
    return method.attend(q, k, v, view(0), method.empty(network, **sizes))[1]

  blocks = block_sparse(**plan)
  backend = "cudnn" if jax.default_backend() == "gpu" else "xla"
  dense = lambda implementation: (
    lambda a: jax.nn.dot_product_attention(*a[:3], is_causal=True, implementation=implementation)
  )
  forms = {
    DENSE: dense(backend),
    OURS: layer(1, False),
    SECOND: layer(1, True),
    FIRST: layer(0, False),
    BLOCKS: lambda a: blocks.attend(*a[:3], view(1), ())[0],
  }
  if length <= p.materialised:
    forms[MATERIALISED] = dense("xla")
  return {"length": length} | _compared(forms, (q, k, v, predictor, begin((q, k, v, predictor))), p.repetitions)


def measure_network(config, subject: Subject, score) -> dict:
  """As `measure`, of reading one prompt by a whole network: "dense" by the fastest attention there is."""
  p = config.prefill
  tokens = jnp.asarray(documents(subject.tokens, 1, p.prompt, seed=config.seed))
  method = dhsa(score, budget=p.budget, block=p.block, instruction=p.instruction, local=p.local, sink=p.sink)
  lengths = jnp.full((1,), p.prompt, jnp.int32)
  how = dict(capacity=p.prompt, chunk=p.prompt, page=config.page)
  forms = {
    DENSE: lambda a: inference.prefill(*a, capacity=p.prompt)[0],
    "dense, paged": lambda a: paged.prefill(*a, **how)[0],
    OURS: lambda a: paged.prefill(*a, method=method, **how)[0],
  }
  return {"length": p.prompt} | _compared(forms, (subject.network, tokens, lengths), p.repetitions)


def _compared(forms: dict, given, repetitions: int) -> dict:
  runs = {name: timing.Steady(form, given) for name, form in forms.items()}
  times = timing.compare(runs, repetitions=repetitions)
  over = {name: times.speedup(name, over=DENSE) for name in forms if name != DENSE}
  return {
    "milliseconds": times.summary(),
    "speedup": {name: [ratio, *spread] for name, (ratio, spread) in over.items()},
    "temporaries": {name: run.memory()["temporaries"] for name, run in runs.items()},
  }
