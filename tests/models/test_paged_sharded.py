"""A prompt over eight devices is the prompt on one: logits, cache, and what is generated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.many_gpus import collectives
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged, paged_sharded
from tests.common import random_tokens
from tests.models.test_paged import network

LENGTHS = np.array([61, 1, 22])
PROMPTS = random_tokens(3, 61)
SIZES = dict(capacity=70, chunk=16, page=2)


@functools.cache
def mesh(devices=8):
  return meshes.make_mesh({"sequence": devices}, jax.devices()[:devices])


@functools.cache
def programs(devices):
  """(prefill, step) on several devices, and on one."""
  many = [functools.partial(f, mesh=mesh(devices)) for f in (paged_sharded.prefill, paged_sharded.step)]
  prefills = [jax.jit(functools.partial(f, **SIZES)) for f in (many[0], paged.prefill)]
  return (prefills[0], jax.jit(many[1])), (prefills[1], jax.jit(paged.step))


def caches(state):
  """What rows hold up to their lengths."""
  for pair in state.pools:
    for pool in pair:
      rows = np.asarray(paged.rows(jnp.asarray(np.asarray(pool)), np.asarray(state.table)))
      yield from (row[:, :length] for row, length in zip(rows, np.asarray(state.length), strict=True))


@pytest.mark.parametrize("name, devices", [("nanochat", 8), ("mhc", 4), ("qwen3", 8)])
def test_logits_and_cache_are_those_of_one_device(name, devices):
  """Rows of unlike lengths that no chunk divides, grouped heads, smearing, windows and streams; then token by token."""
  many, one = programs(devices)
  logits, state = many[0](network(name), PROMPTS, LENGTHS)
  expected, alone = one[0](network(name), PROMPTS, LENGTHS)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  for token in random_tokens(3, 4, seed=1).T:
    logits, state = many[1](network(name), token[:, None], state)
    expected, alone = one[1](network(name), token[:, None], alone)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  for found, wanted in zip(caches(state), caches(alone), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_each_device_holds_its_share_of_the_pages_and_the_state_is_a_plain_one():
  (prefill, _), (_, step) = programs(8)
  net, token = network("qwen3"), PROMPTS[:, :1]
  _, state = prefill(net, PROMPTS, LENGTHS)
  pool = state.pools[0][0]
  assert pool.shape[1] == 3 * 40 and pool.sharding.shard_shape(pool.shape)[1] == 3 * 5  # 70 positions, in whole chunks
  assert sorted(np.asarray(state.table).ravel()) == list(range(3 * 40))
  expected = programs(8)[0][1](net, token, state)[0]
  np.testing.assert_allclose(step(net, token, state)[0], expected, rtol=1e-4, atol=1e-4)  # the partitioner's own way


def test_generation_goes_on_from_the_shared_cache():
  """Also of prompts shorter than a chunk, of which less is made."""
  net = network("nanochat")
  for prompts, lengths in ((PROMPTS, LENGTHS), (PROMPTS[:, :5], np.array([5, 1, 3]))):
    expected = generate(net, prompts, lengths, tokens=6)
    decoder = paged_sharded.decoder(mesh(4), chunk=32, page=4)
    np.testing.assert_array_equal(generate(net, prompts, lengths, tokens=6, decoder=decoder), expected)


def test_what_the_kernel_is_given_is_what_the_loop_reads(monkeypatch):
  """Stretches of a chunk as rows of the kernel, by its reference: before, within and past a device's own part; then
  steps of one token and of three, which lie on two devices."""
  net = network("qwen3")
  expected, state = programs(4)[0][0](net, PROMPTS, LENGTHS)
  three = lambda: jax.jit(functools.partial(paged_sharded.step, mesh=mesh(4)))(net, PROMPTS[:, :3], state)[0]
  later = three()
  monkeypatch.setattr(paged, "kernel_takes", lambda q, keys, window: window is None)
  prefill = jax.jit(functools.partial(paged_sharded.prefill, mesh=mesh(4), **SIZES))
  np.testing.assert_allclose(prefill(net, PROMPTS, LENGTHS)[0], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(three(), later, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capacity", [64, 256])
def test_what_is_sent_does_not_grow_with_the_context_and_a_device_holds_its_part(capacity):
  """A chunk sends its queries and what they found, in every layer; nothing else is sent in the loop over chunks."""
  net, prompts = network("qwen3"), random_tokens(2, capacity)
  one, many = (
    jax.jit(functools.partial(f, capacity=capacity, chunk=32, page=4)).lower(net, prompts).compile()
    for f in (paged.prefill, functools.partial(paged_sharded.prefill, mesh=mesh()))
  )
  layer = 2 * 32 * 4 * 16 * 4  # batch, chunk, heads, head_dim, bytes
  inside = [c for c in collectives.collectives(many.as_text()) if c.depth]
  sent = {kind: sum(c.bytes for c in inside if c.kind == kind) for kind in {c.kind for c in inside}}
  assert sent == {"all-gather": 2 * layer, "all-to-all": 2 * (layer + layer // 16)}
  held = lambda program: program.memory_analysis().output_size_in_bytes - 2 * 64 * 4 - 2 * capacity  # not the logits
  pools = 2 * 2 * 2 * capacity * 2 * 16 * 4  # layers, keys and values, batch, positions, heads, head_dim, bytes
  assert pools <= held(one) < pools + 1000 and held(many) < pools / 8 + 1000


def test_positions_lie_in_turn_on_the_devices():
  """By brute force: `share` pages after each other, rows apart, every page once."""
  table = np.asarray(paged_sharded._table(3, 24, 2, 4))
  for row in range(3):
    assert [int(number) // (3 * 6) for number in table[row]] == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    for device in range(4):
      own = [int(n) % 18 for n in table[row] if n // 18 == device]
      assert own == list(range(6 * row, 6 * row + 6))


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda: paged_sharded.decoder(mesh(8), chunk=100, page=4),
      "page x devices on 'sequence'=32 must divide chunk=100",
    ),
    (lambda: paged_sharded.decoder(mesh(8), chunk=64, page=0), "page is 0"),
    (lambda: paged_sharded.decoder(jax.make_mesh((8,), ("data",))), "it needs one named 'sequence'"),
    (
      lambda: paged_sharded.prefill(network("qwen3"), PROMPTS, mesh=mesh(8), capacity=60, chunk=16, page=2),
      "the prompt has 61 tokens, the cache room for 60",
    ),
    (
      lambda: paged_sharded.prefill(network("qwen3"), PROMPTS, mesh=mesh(8), capacity=64, chunk=24, page=2),
      "=16 must divide chunk=24",
    ),
  ],
)
def test_impossible_sizes_and_meshes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


@pytest.mark.smollm2
def test_layers_of_a_real_model_on_two_devices_are_those_on_one(smollm2):
  model, _ = smollm2
  net, prompts, lengths = inference.take_apart(model, 3), random_tokens(2, 90, vocab=49_152), np.array([90, 41])
  sizes = dict(capacity=100, chunk=64, page=16)
  expected, _ = jax.jit(functools.partial(paged.prefill, **sizes))(net, prompts, lengths)
  logits, _ = jax.jit(functools.partial(paged_sharded.prefill, mesh=mesh(2), **sizes))(net, prompts, lengths)
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
