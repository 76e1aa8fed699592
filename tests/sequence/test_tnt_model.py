"""A language model of deep memories: prompts, steps and training are one function of its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.models import generate
from jaxlab.sequence import tnt, tnt_model
from jaxlab.sequence.tnt_model import MemoryModel, MemoryModelConfig, decoder
from jaxlab.training import loop, losses, optimizers

VOCABULARY, WIDTH, ROWS, TIME = 20, 12, 2, 24
SMALL = dict(heads=2, head_dim=4, expansion=2)
TNT = tnt.MemoryConfig(WIDTH, global_chunk=8, local_chunks=(2, 4), shard=8, **SMALL)
MEMORIES = {
  "tnt": TNT,
  "titans": tnt.titans(WIDTH, chunk=4, **SMALL),
  "ttt": tnt.ttt(WIDTH, chunk=4, layers=2, **SMALL),
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, TIME)).astype(np.int32)


def shape_of(memory):
  return MemoryModelConfig(VOCABULARY, depth=2, mlp_width=16, memory=memory)


@pytest.fixture(scope="module", params=MEMORIES)
def model(request):
  """Every parameter far from where a zero would hide it."""
  shapes = jax.eval_shape(lambda: MemoryModel(shape_of(MEMORIES[request.param]), jax.random.key(0)))
  random = np.random.default_rng(1)
  draw = lambda path, a: 0.3 * random.normal(size=a.shape) + ("norm" in jax.tree_util.keystr(path))
  return jax.tree_util.tree_map_with_path(lambda path, a: jnp.asarray(draw(path, a), a.dtype), shapes)


@pytest.fixture(scope="module")
def programs():
  forward = jax.jit(lambda model, tokens, chunks: model(tokens, local_chunks=chunks), static_argnums=2)
  prefill = jax.jit(lambda model, tokens: model.prefill(tokens))
  step = jax.jit(lambda model, token, state, chunks: model.step(token, state, local_chunks=chunks), static_argnums=3)
  return forward, prefill, step


def test_a_prompt_of_any_length_and_steps_are_the_forward(model, programs):
  """A prompt of whole shards, one that ends within a chunk, and one shorter than any."""
  forward, prefill, step = programs
  logits = np.asarray(forward(model, TOKENS, None))
  for length in (8, 19, 1) if model.config.memory == TNT else (19,):
    out, state = prefill(model, TOKENS[:, :length])
    np.testing.assert_allclose(np.asarray(out)[:, 0], logits[:, length - 1], rtol=1e-4, atol=1e-4)
    for t in range(length, length + 3):
      out, state = step(model, TOKENS[:, t], state, None)
      np.testing.assert_allclose(out, logits[:, t], rtol=1e-4, atol=1e-4)
  assert logits.std() > 0.1


@pytest.mark.parametrize("model", ["tnt"], indirect=True)
def test_decoding_in_chunks_of_one_is_the_forward_in_chunks_of_one(model, programs):
  forward, _, step = programs
  ones = (1,) * len(model.config.memory.local_chunks)
  logits = np.asarray(forward(model, TOKENS, ones))
  state = jax.jit(lambda model: model.empty_state(ROWS))(model)
  for t in range(TIME // 2):
    out, state = step(model, TOKENS[:, t], state, ones)
    np.testing.assert_allclose(out, logits[:, t], rtol=1e-4, atol=1e-4)
  assert np.abs(logits - forward(model, TOKENS, None)).max() > 1e-3


def test_sixteen_bits_leave_the_memories_alone():
  """Near the 4 that it starts from, a forget logit in 16 bits moves by 0.03 or not at all; W_init is no activation."""
  for memory in (dataclasses.replace(TNT, momentum=True, decay=True), MEMORIES["ttt"]):
    half = jax.eval_shape(lambda memory=memory: loop.cast(MemoryModel(shape_of(memory), jax.random.key(0)), "bfloat16"))
    own = [half.blocks.mixer.global_memory, *half.blocks.mixer.local_memories]
    assert {a.dtype for a in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    assert half.blocks.mixer.inputs.weight.dtype == half.blocks.mixer.out.weight.dtype == jnp.bfloat16
  memory = dataclasses.replace(TNT, local_chunks=(4,), decay=True)
  model = jax.jit(lambda: MemoryModel(shape_of(memory), jax.random.key(0)))()
  forward = jax.jit(lambda model: loop.cast(model, "bfloat16")(TOKENS[:1]))
  logits = np.asarray(forward(model))
  (own,) = model.blocks.mixer.local_memories
  own.bias = own.bias + np.array([0.0, 0.008], np.float32)[:, None]  # step sizes stay
  assert np.abs(forward(model) - logits).max() > 0


@pytest.mark.parametrize("model", ["tnt"], indirect=True)
def test_it_generates_what_its_steps_say(model, programs):
  _, prefill, step = programs
  ones = (1,) * len(model.config.memory.local_chunks)
  out = np.asarray(generate(model, TOKENS[:, :19], tokens=3, decoder=decoder(ones)))
  logits, state = prefill(model, TOKENS[:, :19])
  for t in range(3):
    token = np.argmax(np.reshape(logits, (ROWS, -1)), axis=-1).astype(np.int32)
    np.testing.assert_array_equal(out[:, t], token)
    logits, state = step(model, token, state, ones)


def test_it_trains_and_stage_two_moves_local_memories_alone(tmp_path):
  """By the one training loop, resumed half way; in stage 2 at other chunks, all but the local memories stands still."""
  shape = shape_of(dataclasses.replace(TNT, local_chunks=(4,)))
  row = np.random.default_rng(0).integers(0, VOCABULARY, TIME + 1)
  batch = {"inputs": np.tile(row[:-1], (8, 1)).astype(np.int32), "targets": np.tile(row[1:], (8, 1)).astype(np.int32)}

  class Data:
    """The same batch again and again."""

    def __iter__(self):
      return self

    def __next__(self):
      return batch

    def get_state(self):
      return {}

    def set_state(self, state):
      pass

  seen, mesh = [], meshes.make_mesh({"data": 1}, jax.devices()[:1])

  def run(model, folder, steps, optimizer, loss=lambda *args: losses.language_model_loss(*args[:2], remat="dots")):
    how = dict(steps=steps, workdir=tmp_path / folder, compute_dtype="float32", checkpoint_every=20, mesh=mesh)
    return loop.train(model, Data(), loss, optimizer, progress=lambda m: seen.append(m["loss"]), **how)

  fresh = jax.jit(lambda: MemoryModel(shape, jax.random.key(0)))()
  one = run(fresh, "one", 40, optimizers.adam(2e-2, steps=40, warmup=4))
  assert seen[0] > 2.5 and seen[-1] < 0.5 * seen[0]

  def second(model, batch, step, key):
    found = losses.token_losses(model, model.hidden(batch["inputs"], local_chunks=(2,)), batch["targets"])
    return losses.mean_loss(found, batch["targets"]), {}

  local = lambda name: float(tnt_model.of_local_memories(name))
  two = run(one, "two", 3, optimizers.adamw(1e-2, steps=3, factor=local), second)
  moved = optimizers.by_name(lambda name: name, two)
  for name, before, after in zip(*map(jax.tree.leaves, (moved, one, two)), strict=True):
    assert np.any(np.asarray(before) != np.asarray(after)) == tnt_model.of_local_memories(name), name


def test_the_shape_is_counted():
  """Matrices by hand, and FLOPs that grow with chunks and memories alone."""
  shape = shape_of(TNT)
  model = jax.eval_shape(lambda: MemoryModel(shape, jax.random.key(0)))
  named = optimizers.by_name(lambda name: name, model)
  sizes = {name: a.size for name, a in zip(*map(jax.tree.leaves, (named, model)), strict=True)}
  matrices = ("inputs.weight", "out.weight", "gate.weight", "up.weight", "down.weight", "head.weight")
  assert shape.matmul_parameters == sum(n for name, n in sizes.items() if name.endswith(matrices))
  flops = lambda **fields: dataclasses.replace(shape, memory=dataclasses.replace(TNT, **fields)).flops_per_token(64)
  assert flops(global_chunk=None) < flops() < flops(local_chunks=(2, 8)) < flops(local_chunks=(2, 4, 4))
  assert flops(projection=None) < flops() and shape.flops_per_token(64) == shape.flops_per_token(4096)


def test_bad_input():
  model = jax.eval_shape(lambda: MemoryModel(shape_of(TNT), jax.random.key(0)))
  model = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), model)
  for call, message in (
    (lambda: dataclasses.replace(shape_of(TNT), depth=0), "model.depth is 0"),
    (lambda: model(TOKENS[:, :20]), "global_chunk=8 must divide time=20"),
    (lambda: model(TOKENS[:, :0]), "rows have no token"),
    (lambda: model.prefill(TOKENS[:, :0]), "the prompt has no token"),
    (lambda: model(TOKENS, local_chunks=(1,)), "local_chunks has 1 lengths"),
    (lambda: generate(model, TOKENS, np.array([3, 4]), tokens=1, decoder=decoder()), "prompts of one length"),
  ):
    with pytest.raises(InputError, match=message):
      jax.eval_shape(call)
