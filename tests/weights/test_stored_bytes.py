"""What a folder's tensors take is what `maps.bytes_of` counts, whatever a model was compressed by."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import TransformerConfig, generate, hub, inference, maps
from jaxlab.models.config import Experts
from jaxlab.models.layers import Linear
from jaxlab.models.packed_maps import SignStack
from jaxlab.weights import bitstack, heapr, lord, pruning, structured
from jaxlab.weights.quantise import quantise, rtn
from jaxlab.weights.structured import Groups
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(configs()["qwen3"], depth=2))


@pytest.fixture(scope="module")
def bases(model):
  return lord.decompose(model, TOKENS, batch=16)


@pytest.fixture(scope="module")
def stacks(model):
  return bitstack.decompose(model, TOKENS, blocks=3, rank=2, batch=16)


def at_size(stacks, blocks: int):
  """The stacks with one block each and so many more."""
  order = bitstack.level_order(stacks)
  return bitstack.at_budget(stacks, order, budget=bitstack.configurations(stacks, order)[blocks][0])


def of_experts():
  """HEAPr's layout: experts of unequal widths in tiles, unequal over layers too."""
  shape = dict(depth=2, width=16, q_heads=2, kv_heads=1, head_dim=8, mlp_width=16, vocab_size=64)
  model = random_model(TransformerConfig(**shape, experts=Experts(count=4, active=2, width=24)))
  keep = np.random.default_rng(0).random((2, 4, 24)) < np.array([[0.1, 0.9, 0.5, 0.3], [0.9, 0.8, 0.1, 0.2]])[..., None]
  return heapr.sliced(model, keep, tile=4)


def small(method: str, model, bases, stacks):
  rng = np.random.default_rng(0)
  if method == "bitstack":
    return at_size(stacks, 9)
  if method == "lord":
    return lord.truncate(model, bases, {"q": 8, "mlp.up": 12})
  if method == "lord, then bitstack":
    thin = lord.truncate(model, bases, {"mlp.up": 12})
    return at_size(bitstack.decompose(thin, TOKENS, blocks=2, rank=2, batch=16), 5)
  if method == "quantised":
    return quantise(model, TOKENS, rtn, bits=4, group=16, batch=16)
  if method == "icbs":
    masked = {
      name: one.weight[...] * (rng.random(one.weight.shape) < 0.4) for name, one in maps.named(model.blocks).items()
    }
    plain = {name: Linear(w, ("embed", "mlp")) for name, w in masked.items()}
    return pruning.stored_sparse(maps.with_blocks(model, maps.replaced(model.blocks, plain)))
  if method == "struprune":
    scores = Groups(rng.random((2, 2)), rng.random((2, 64)))
    keep = Groups(structured.top(scores.heads, [1, 2]), structured.top(scores.neurons, [40, 24]))
    biases = {name: rng.normal(size=(2, model.config.width)).astype(np.float32) for name in structured.ENDS}
    return structured.sliced(model, keep, biases)
  return of_experts()


METHODS = ("bitstack", "lord", "lord, then bitstack", "quantised", "icbs", "struprune", "heapr")


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_takes_the_bytes_that_are_counted(method, model, bases, stacks, tmp_path):
  made = small(method, model, bases, stacks)
  hub.save(made, tmp_path)
  taken = 0
  for file in tmp_path.glob("*.safetensors"):
    content = file.read_bytes()
    taken += len(content) - 8 - int.from_bytes(content[:8], "little")  # without the header
  again = hub.load(tmp_path)
  assert taken == maps.bytes_of(made) == maps.bytes_of(again)
  assert maps.spec_of(again) == maps.spec_of(made)
  np.testing.assert_array_equal(again(TOKENS), made(TOKENS))


def test_any_size_of_a_stack_is_the_size_of_its_folder(stacks):
  """One block at a time: what is counted never exceeds the budget, stacked or taken apart."""
  order = bitstack.level_order(stacks)
  for size, counts in bitstack.configurations(stacks, order)[:16]:
    made = bitstack.at_budget(stacks, order, budget=size)
    assert maps.bytes_of(made) == bitstack.bytes_in_use(made) == size
    assert {name: one.held for name, one in bitstack.stacks_of(made).items()} == {
      name: None if min(own) == max(own) else tuple(own) for name, own in counts.items()
    }
  held = bitstack.at_budget(stacks, order, budget=bitstack.configurations(stacks, order)[9][0])
  alone = inference.take_apart(held).blocks
  assert [one.mlp.gate.u.shape[0] for one in alone] == [2, 1]
  arrays = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves([maps.named(one) for one in tree]))
  assert arrays(alone) == maps.bytes_of(maps.named(held.blocks))
  np.testing.assert_array_equal(generate(held, TOKENS[:1], tokens=1), held(TOKENS[:1])[:, -1:].argmax(axis=-1))


def test_a_folder_of_more_blocks_in_use_than_it_holds_is_refused(stacks, tmp_path):
  broken = bitstack.with_counts(stacks, {"q": [99, 3]})
  hub.save(broken, tmp_path)
  with pytest.raises(InputError, match=r"blocks.q.count is \[99  3\]; the layers hold 3 blocks"):
    hub.load(tmp_path)
  uneven = at_size(stacks, 1)
  name, one = next((name, one) for name, one in bitstack.stacks_of(uneven).items() if one.held)
  assert isinstance(one, SignStack) and set(one.held) == {1, 2}
  hub.save(bitstack.with_counts(uneven, {name: [2, 2]}), tmp_path)
  with pytest.raises(InputError, match=rf"blocks.{name}.count is \[2 2\]; the layers hold \[\d \d\] blocks"):
    hub.load(tmp_path)
