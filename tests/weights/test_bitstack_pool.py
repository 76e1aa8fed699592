"""BitStack's pool: any size of one program, the same network as that of a folder written at the budget."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import generate, hub, inference
from jaxlab.models.inference import take_apart
from jaxlab.weights import bitstack, lord
from jaxlab.weights.bitstack_pool import Shelf
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)
PROMPTS = TOKENS[:2, :8]
forward = jax.jit(lambda network: inference.step(network, PROMPTS)[0])


@pytest.fixture(scope="module")
def stacks():
  """One map of low rank, whose factors are stacks of shapes of their own; a map that a block would enlarge stays."""
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=2))
  thin = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 8})
  made = bitstack.decompose(thin, TOKENS, blocks=4, rank=4, batch=16)
  assert {"mlp.up.down", "mlp.up.up", "q"} <= set(bitstack.stacks_of(made))
  return made


@pytest.fixture(scope="module")
def order(stacks):
  """At random: layers of a map have unequal numbers of blocks."""
  scores = dict.fromkeys(bitstack.level_order(stacks), 0.0)
  return bitstack.sort_blocks(scores, how="random")


@pytest.fixture(scope="module")
def sizes(stacks, order):
  return [size for size, _ in bitstack.configurations(stacks, order)]


def test_a_size_of_the_pool_is_the_folder_written_at_that_budget(stacks, order, sizes, tmp_path):
  """Grown from a smaller size or shrunk from a larger one; all blocks loaded are the full sum (bitstack.md, 6)."""
  shelf = Shelf(stacks, order, capacity=sizes[-1])
  middle = sizes[len(sizes) // 2] + 1
  hub.save(bitstack.at_budget(stacks, order, budget=middle), tmp_path)
  folder = hub.load(tmp_path)
  grown = shelf.grow(shelf.load(sizes[0]), middle - sizes[0])
  np.testing.assert_allclose(forward(grown.network), forward(take_apart(folder)), rtol=1e-4, atol=1e-4)
  tokens = generate(folder, PROMPTS, tokens=4)
  np.testing.assert_array_equal(generate(grown.network, PROMPTS, tokens=4), tokens)
  shrunk = shelf.shrink(shelf.load(sizes[-1]), sizes[-1] - middle)
  np.testing.assert_array_equal(generate(shrunk.network, PROMPTS, tokens=4), tokens)
  assert grown.size == shrunk.size == middle - 1 == bitstack.bytes_in_use(folder)
  whole = shelf.load(sizes[-1])
  np.testing.assert_allclose(forward(whole.network), forward(take_apart(stacks)), rtol=1e-4, atol=1e-4)


def test_a_change_of_budget_compiles_nothing_and_undoes_itself(stacks, order, sizes, caplog):
  """Through every size up and down and up at once; growing writes blocks in place."""
  shelf = Shelf(stacks, order, capacity=sizes[-1])
  pool = shelf.load(sizes[0])
  lie = lambda pool: [[a.unsafe_buffer_pointer() for a in arrays] for arrays in pool.arrays.values()]
  start, seen = lie(pool), [forward(pool.network)]
  caplog.clear()
  with jax.log_compiles():
    for before, after in itertools.pairwise(sizes):
      pool = shelf.grow(pool, after - before)
      assert pool.size == after
      seen.append(forward(pool.network))
    for before, after in itertools.pairwise(reversed(sizes)):
      pool = shelf.shrink(pool, before - after)
      np.testing.assert_array_equal(forward(pool.network), seen[sizes.index(after)])
    pool = shelf.grow(pool, sizes[-1] - sizes[0])
    np.testing.assert_array_equal(forward(pool.network), seen[-1])
  assert not [record for record in caplog.records if "ompil" in record.getMessage()]
  assert not any(np.array_equal(one, two) for one, two in itertools.pairwise(seen))  # every size is another network
  assert lie(pool) == start
  np.testing.assert_array_equal(forward(shelf.load(sizes[-1]).network), seen[-1])


def test_wrong_input_is_one_line(stacks, order, sizes):
  with pytest.raises(InputError, match=f"capacity is 10 bytes; one block of every map takes {sizes[0]}"):
    Shelf(stacks, order, capacity=10)
  shelf = Shelf(stacks, order, capacity=sizes[3])
  pool = shelf.load(sizes[2])
  places = sum(len(arrays[0]) for arrays in pool.arrays.values())
  assert places == 2 * len(bitstack.stacks_of(stacks)) + 3  # of the capacity, not of all blocks
  with pytest.raises(InputError, match=f"budget is {sizes[4]} bytes; the pool's capacity is {sizes[3]}"):
    shelf.grow(pool, sizes[4] - sizes[2])
  with pytest.raises(InputError, match=f"one block of every map takes {sizes[0]}"):
    shelf.shrink(pool, sizes[2])
  with pytest.raises(InputError, match="more is -1 bytes"):
    shelf.grow(pool, -1)
  with pytest.raises(InputError, match="less is -1 bytes"):
    shelf.shrink(pool, -1)
