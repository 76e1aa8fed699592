"""BitStack: the energies of the paper, any size within a budget, blocks in the order of their worth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compressing import left_out
from jaxlab.core.checks import InputError
from jaxlab.models import generate, hub, maps
from jaxlab.models.packed_maps import SignStack, pack_signs, unpack_signs
from jaxlab.weights import bitstack, lord
from jaxlab.weights.bitstack import absolute_value_decomposition as avd
from jaxlab.weights.quantise import quantise
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)
BLOCKS = 4


def rebuilt(signs, u, v, count):
  """The sum of the first blocks, in numpy."""
  signs = np.unpackbits(np.asarray(signs), axis=-1)[..., : v.shape[-1]] * 2.0 - 1
  return sum(signs[i] * (np.asarray(u[i], np.float64) @ np.asarray(v[i], np.float64)) for i in range(count))


@pytest.mark.parametrize("n", [8, 13, 16])
def test_signs_are_packed_in_the_published_order(n):
  x = np.random.default_rng(n).normal(size=(3, n)).astype(np.float32)
  x[0, :2] = 0, -1
  packed = pack_signs(x)
  assert packed.shape == (3, -(-n // 8)) and packed[0, 0] >> 6 == 0b10  # the first entry is the highest bit, 0 is +1
  np.testing.assert_array_equal(unpack_signs(packed, n), np.where(x < 0, -1, 1))


def test_every_block_takes_the_energy_of_its_singular_values():
  """Of the residual as it is left by what is stored, to 1e-5; a 0 has the sign +1 there too."""
  weight = jnp.asarray(np.random.default_rng(0).normal(size=(24, 40)), jnp.float32).at[:3, :5].set(0)
  signs, u, v, energy = avd(weight, blocks=3, rank=4)
  residual = np.asarray(weight, np.float64)
  for i in range(3):
    values = np.linalg.svd(np.abs(residual), compute_uv=False)
    np.testing.assert_allclose(energy[i + 1], (values[4:] ** 2).sum(), rtol=1e-5)
    assert energy[i + 1] < energy[i]
    residual = np.asarray(weight, np.float64) - rebuilt(signs, u, v, i + 1)
  whole = avd(weight, blocks=1, rank=24)
  np.testing.assert_allclose(rebuilt(*whole[:3], 1), weight, atol=5e-3)
  unrounded = avd(weight, blocks=1, rank=24, from_stored=False)[3]
  assert unrounded[1] < 1e-10 * unrounded[0]


def test_rounding_of_the_stored_factors_is_taken_up_by_the_next_block():
  weight = jnp.asarray(np.random.default_rng(0).normal(size=(32, 48)), jnp.float32)
  left = lambda made: float(((rebuilt(*made[:3], 6) - np.asarray(weight, np.float64)) ** 2).sum())
  stored, published = (avd(weight, blocks=6, rank=8, from_stored=flag) for flag in (True, False))
  np.testing.assert_allclose(left(stored), stored[3][-1], rtol=1e-2)
  assert left(stored) < left(published)


LEFT = {  # of the energy of a normal matrix, after each block of a rank
  1: (0.3622, 0.1297, 0.0579, 0.0324, 0.0221),
  4: (0.354,),
  16: (0.323, 0.105, 0.040, 0.017, 0.009),
}


@pytest.mark.parametrize("rank", LEFT)
def test_a_gaussian_matrix_loses_what_the_paper_says(rank):
  """And of as many bytes as one block of rank 4 an SVD without signs leaves 0.862.

  The first block of rank 1 leaves 1 - 2 / pi of a matrix without end.
  """
  weight = jax.random.normal(jax.random.key(0), (512, 512))
  energy = avd(weight, blocks=len(LEFT[rank]), rank=rank)[3]
  np.testing.assert_allclose(energy[1:] / energy[0], LEFT[rank], atol=4e-3)
  if rank == 1:
    np.testing.assert_allclose(energy[1] / energy[0], 1 - 2 / np.pi, atol=2e-3)
  if rank == 4:
    values = np.linalg.svd(np.asarray(weight), compute_uv=False) ** 2
    np.testing.assert_allclose(values[20:].sum() / values.sum(), 0.862, atol=4e-3)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(configs()["qwen3"], depth=2))


@pytest.fixture(scope="module")
def stacks(model):
  return bitstack.decompose(model, TOKENS, blocks=BLOCKS, rank=4, batch=16)


def loss_of(model):
  logp = jax.nn.log_softmax(model(TOKENS[:, :-1]))
  return -jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1).mean()


def test_blocks_add_up_to_the_model(model, stacks):
  """More blocks are nearer, until they are the model to rounding."""
  logits = model(TOKENS)
  run = jax.jit(lambda model, counts: bitstack.with_counts(model, counts)(TOKENS))
  level = lambda count: {name: np.full(2, count, np.int32) for name in bitstack.stacks_of(stacks)}
  apart = [float(jnp.abs(run(stacks, level(count)) - logits).mean()) for count in (1, 2, BLOCKS)]
  assert apart == sorted(apart, reverse=True) and run._cache_size() == 1
  np.testing.assert_array_equal(run(stacks, level(BLOCKS)), run(bitstack.with_counts(stacks, level(1)), level(BLOCKS)))
  many = bitstack.decompose(model, TOKENS, blocks=20, rank=8, batch=16)
  np.testing.assert_allclose(many(TOKENS), logits, rtol=0, atol=1e-5 * float(jnp.abs(logits).max()))


def test_inputs_that_are_large_weigh_more(model, stacks):
  """s follows the norms, its geometric mean is 1, and it is divided out again."""
  one = bitstack.stacks_of(stacks)["q"]
  start = model.embed(TOKENS)[0]
  block = jax.tree.map(lambda a: a[0], model.blocks)
  norm = jnp.sqrt((block.attention_norm(start) ** 2).sum(axis=1)).mean(axis=0) + 1e-3
  np.testing.assert_allclose(one.scale[0], norm / jnp.exp(jnp.log(norm).mean()), rtol=2e-3)
  plain = bitstack.decompose(model, TOKENS, blocks=1, rank=4, scaled=False, batch=16)
  assert bitstack.stacks_of(plain)["q"].scale is None


def test_a_budget_gives_the_largest_model_within_it(stacks, tmp_path):
  scores = bitstack.score_blocks(stacks, loss_of)
  assert len(scores) == 7 * 2 * (BLOCKS - 1)
  counts = {name: np.full(2, 2, np.int32) for name in bitstack.stacks_of(stacks)}
  counts["mlp.up"][1] = 3
  np.testing.assert_allclose(scores["mlp.up", 1, 3], loss_of(bitstack.with_counts(stacks, counts)), rtol=1e-5)
  order = bitstack.sort_blocks(scores)
  made = bitstack.configurations(stacks, order)
  sizes = [size for size, _ in made]
  assert sizes == sorted(set(sizes)) and sizes[-1] == maps.bytes_of(stacks)
  for _, counts in made:
    levels = np.concatenate([*counts.values()])
    assert levels.max() - levels.min() <= 1
  for budget in (sizes[0], sizes[20] + 1, sizes[-1]):
    small = bitstack.at_budget(stacks, order, budget=budget)
    size, counts = max((one for one in made if one[0] <= budget), key=lambda one: one[0])
    for name, one in bitstack.stacks_of(small).items():
      np.testing.assert_array_equal(one.count[...], counts[name])
    assert maps.bytes_of(small) == size <= budget
  small = bitstack.at_budget(stacks, order, budget=sizes[20])
  np.testing.assert_allclose(small(TOKENS), bitstack.with_counts(stacks, made[20][1])(TOKENS), rtol=1e-4, atol=1e-4)
  hub.save(small, tmp_path)
  again = hub.load(tmp_path)
  np.testing.assert_array_equal(again(TOKENS), small(TOKENS))
  np.testing.assert_array_equal(generate(again, TOKENS[:2], tokens=3), generate(small, TOKENS[:2], tokens=3))


def test_orders_of_known_scores():
  scores = {("q", 0, 2): 3.0, ("q", 0, 3): 1.0, ("o", 0, 2): 2.0, ("o", 0, 3): 2.5}
  order = lambda how: bitstack.sort_blocks(scores, how=how)
  assert order("average") == [("o", 0, 2), ("q", 0, 2), ("q", 0, 3), ("o", 0, 3)]
  assert order("greedy") == [("o", 0, 2), ("o", 0, 3), ("q", 0, 2), ("q", 0, 3)]
  shuffled = order("random")
  assert sorted(shuffled) == sorted(scores)
  assert all(shuffled.index((name, 0, 2)) < shuffled.index((name, 0, 3)) for name in "qo")
  with pytest.raises(InputError, match="how is 'best'"):
    order("best")


def test_blocks_are_scored_by_a_loss_that_is_known(stacks):
  """Worked out from the numbers of blocks in use alone; one is no number at the second of three levels."""
  worth = {name: 1.0 + i for i, name in enumerate(bitstack.stacks_of(stacks))}
  gain = jnp.asarray([1.0, 10.0])  # of a block of each layer

  def loss(model):
    counts = {name: one.count[...] for name, one in bitstack.stacks_of(model).items()}
    total = 1000 - sum(worth[name] * (gain * count).sum() for name, count in counts.items())
    broken = (counts["q"][1] == 3) & (counts["o"][1] == 2)
    return jnp.where(broken, jnp.nan, total)

  scores = bitstack.score_blocks(stacks, loss)
  base = lambda level: 1000 - 11 * level * sum(worth.values())
  known = {
    (name, layer, level + 1): base(level) - worth[name] * (1, 10)[layer]
    for name in worth
    for layer in (0, 1)
    for level in range(1, BLOCKS)
  }
  level_two = [value for block, value in known.items() if block[2] == 3 and block != ("q", 1, 3)]
  known["q", 1, 3] = known["q", 1, 4] + max(level_two)
  assert scores.keys() == known.keys()
  for block, value in known.items():
    np.testing.assert_allclose(scores[block], value, rtol=1e-6, err_msg=str(block))
  order = bitstack.sort_blocks(scores)
  assert order == sorted(known, key=lambda block: (block[2], known[block]))
  assert order[27] == ("q", 1, 3)  # the last of its level


def test_losses_that_are_no_number(stacks):
  """At a lower level they come after all others; at the last one nothing is left to say."""
  nan = float("nan")
  found = bitstack._filled({("q", 0): nan, ("q", 1): 5.0}, {("q", 0, 3): 2.0, ("q", 1, 3): 1.0}, 1, 3)
  assert found == {("q", 0): 7.0, ("q", 1): 5.0}
  with pytest.raises(InputError, match="the loss with 4 blocks of q, layer 0, is no number"):
    bitstack.score_blocks(stacks, lambda model: jnp.nan * model.norm.gain[0])


def test_wrong_input_is_one_line(model, stacks):
  order = bitstack.sort_blocks({("q", 0, 3): 1.0})
  with pytest.raises(InputError, match="block 3 of q, layer 0, comes before block 2"):
    bitstack.configurations(stacks, order)
  with pytest.raises(InputError, match=r"budget is 10 bytes; one block of every map takes \d+"):
    bitstack.at_budget(stacks, [], budget=10)
  with pytest.raises(InputError, match="holds no stacks"):
    bitstack.configurations(model, [])
  with pytest.raises(InputError, match=r"rank is 64; the smallest map takes 1\.\.32"):
    bitstack.decompose(model, TOKENS, rank=64)


def test_folded_scales_give_the_same_stacks_without_an_array_of_their_own(model):
  kept, folded = (bitstack.decompose(model, TOKENS, blocks=20, rank=4, folded=flag, batch=16) for flag in (False, True))
  specs = {name: one.scale is None for name, one in bitstack.stacks_of(folded).items()}
  assert specs == {name: name != "o" for name in specs}  # heads share their values: nothing before o takes its scale
  # A stack of so many blocks is the map itself, and the network is the same but for its scales.
  np.testing.assert_allclose(folded(TOKENS), model(TOKENS), rtol=2e-2, atol=2e-2)
  np.testing.assert_allclose(folded(TOKENS), kept(TOKENS), rtol=2e-2, atol=2e-2)
  assert maps.bytes_of(folded) < maps.bytes_of(kept)


@pytest.mark.parametrize("shape", [(5, 12), (8, 16)])
def test_the_published_order_of_bits_and_back(shape):
  """One run of bits over all rows: a row that ends inside a byte is followed by the next one."""
  rng = np.random.default_rng(0)
  weight = rng.normal(size=shape).astype(np.float32)
  one = SignStack(*avd(jnp.asarray(weight), blocks=2, rank=3)[:3], None, jnp.int32(2))
  blocks = bitstack.to_published(one)
  np.testing.assert_array_equal(np.unpackbits(blocks[0]["sign"])[: weight.size], (weight >= 0).ravel())
  back = bitstack.from_published(blocks)
  np.testing.assert_array_equal(back.weight(), one.weight())
  with pytest.raises(InputError, match="the signs of block 0 have shape"):
    bitstack.from_published([blocks[0] | {"sign": blocks[0]["sign"][:-1]}])


def test_a_map_that_a_block_would_enlarge_stays_as_it_is(model):
  """Of 32 x 32 in 16 bits one block of rank 16 takes 128 + 2048 bytes beside its scale; of the others it takes less."""
  stacks = bitstack.decompose(model, TOKENS, blocks=2, rank=16, batch=16)
  before, after = maps.named(model.blocks), maps.named(stacks.blocks)
  assert set(after) - set(bitstack.stacks_of(stacks)) == {"k", "v"} == set(left_out(model, stacks))
  for name in "kv":
    np.testing.assert_array_equal(after[name].weight[...], before[name].weight[...])
  least = bitstack.configurations(stacks, bitstack.level_order(stacks))[0][0]
  assert bitstack.blocks_to_fill(model, budget=least, rank=16) == 1
  assert maps.bytes_of(maps.named(bitstack.at_budget(stacks, [], budget=least).blocks)) < maps.bytes_of(before)
  for call in (bitstack.blocks_to_fill, functools.partial(bitstack.decompose, tokens=TOKENS)):
    with pytest.raises(InputError, match="one block of rank 32 takes more bytes than the map in 16 bits, of every map"):
      call(model, rank=32, **({"budget": 10**6} if call is bitstack.blocks_to_fill else {}))


def test_a_map_of_low_rank_becomes_two_stacks_of_any_size(model):
  """LoRD, then BitStack: budgets, counts and the folder treat the factors as maps of their own."""
  small = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 8, "q": 6})
  stacks = bitstack.decompose(small, TOKENS, blocks=3, rank=2, batch=16)
  assert {"q.down", "q.up", "mlp.up.down", "mlp.up.up", "o"} <= set(bitstack.stacks_of(stacks))
  order = bitstack.level_order(stacks)
  made = bitstack.configurations(stacks, order)
  whole = made[-1][0]
  assert whole == maps.bytes_of(stacks) == bitstack.bytes_in_use(stacks)
  two = made[2 * len(bitstack.stacks_of(stacks))][0]
  wanted = (made[0][0], two, two + 1, whole, whole + 1)
  assert [bitstack.blocks_to_fill(small, budget=size, rank=2) for size in wanted] == [1, 2, 3, 3, 4]
  with pytest.raises(InputError, match=f"one block of every map takes {made[0][0]}"):
    bitstack.blocks_to_fill(small, budget=made[0][0] - 1, rank=2)
  middle = bitstack.at_budget(stacks, order, budget=(made[0][0] + whole) // 2)
  assert made[0][0] < bitstack.bytes_in_use(middle) <= (made[0][0] + whole) // 2
  apart = lambda one: float(jnp.abs(one(TOKENS) - small(TOKENS)).mean())
  assert apart(stacks) < apart(middle)


def test_a_folder_of_products_loads_again(model, tmp_path):
  small = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 8})
  for made in (
    bitstack.decompose(small, TOKENS, blocks=2, rank=2, batch=16),
    quantise(small, TOKENS, bits=4, group=8, batch=16),
  ):
    hub.save(made, tmp_path)
    again = hub.load(tmp_path)
    assert maps.spec_of(again) == maps.spec_of(made) and maps.bytes_of(again) == maps.bytes_of(made)
    np.testing.assert_array_equal(again(TOKENS), made(TOKENS))
