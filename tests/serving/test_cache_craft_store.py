import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.serving.cache_craft_store import DEVICE, DISK, HOST, ChunkStore, Record

PREFIXES = [(bytes([100 + i]),) for i in range(6)]


def record(chunk: int, prefix: tuple = (), tokens: int = 2, **more) -> Record:
  shape = (tokens, 1 + len(prefix))
  weights = np.ones(shape, np.float32)
  return Record(bytes([chunk]), prefix, (20,) * len(prefix), weights, np.ones(tokens, np.float32), 4, **more)


def parts(value: float, tokens: int = 2, dtype=jnp.float32):
  """Keys and values of two stages, of 3 layers and 1."""
  of = lambda layers: jnp.full((layers, tokens, 1, 4), value, dtype)
  return [(of(3), of(3) + 1), (of(1), of(1) + 1)]


def put(store, chunk, prefix=(), share=1.0, **more):
  return store.put(record(chunk, prefix, **more), parts(chunk), share)


def test_a_store_keeps_to_its_numbers_and_bytes_and_forgets_the_same_every_time(tmp_path):
  """Random requests, twice: what is left is the same, and what is loaded is what was put."""

  def run(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    budget = dict(device_bytes=1200, host_bytes=900, disk_bytes=700)
    store = ChunkStore([1], chunks=4, variants=2, stages=(3,), folder=folder, **budget)
    seen = set()
    for _ in range(150):
      store.tick()
      chunk = int(rng.integers(7))
      mine = store.of(bytes([chunk]))
      if mine and rng.random() < 0.5:
        one = mine[rng.integers(len(mine))]
        store.touch(one, float(rng.random()))
        for stage in range(2):
          keys, values = store.load(one, stage)
          np.testing.assert_array_equal(keys, chunk)
          np.testing.assert_array_equal(values, chunk + 1)
          assert keys.sharding.memory_kind == DEVICE and keys.shape[0] == (3, 1)[stage]
      else:
        put(store, chunk, PREFIXES[rng.integers(6)], float(rng.random()))
      names = {v.record.chunk for i in range(7) for v in store.of(bytes([i]))}
      assert len(names) <= 4 and all(len(store.of(name)) <= 2 for name in names)
      assert all(store.used(tier) <= most for tier, most in store.budget.items())
      assert store.used(DISK) <= sum(file.stat().st_size for file in folder.iterdir()) + 200 * len(store)
      seen |= {v.tier for name in names for v in store.of(name)}
    assert seen == {DEVICE, HOST, DISK}
    return [(v.record.chunk, v.record.prefix, v.tier) for i in range(7) for v in store.of(bytes([i]))]

  assert run(tmp_path / "a") == run(tmp_path / "b")


def test_what_is_used_most_for_its_bytes_stays():
  size = parts(0)[0][0].nbytes * 2 + parts(0)[1][0].nbytes * 2 + 2 * 4 + 2 * 4
  store = ChunkStore([1], device_bytes=3 * size)
  for chunk in range(3):
    put(store, chunk)
  store.touch(store.of(b"\0")[0], 0.01)  # counts for 20, not for 100
  store.touch(store.of(b"\2")[0], 1.0)
  put(store, 3)
  assert [len(store.of(bytes([i]))) for i in range(4)] == [1, 0, 1, 1]
  for _ in range(400):  # 21 * 0.99^400 < 1
    store.tick()
  for chunk in (4, 5, 6):
    put(store, chunk)
  assert [len(store.of(bytes([i]))) for i in range(7)] == [0, 0, 0, 0, 1, 1, 1]
  assert not put(ChunkStore([1], device_bytes=10), 1)  # larger than the store


def test_a_variant_replaces_another_only_if_much_of_it_was_new():
  store = ChunkStore([1], variants=2)
  assert put(store, 1, PREFIXES[0]) and put(store, 1, PREFIXES[1], 0.1)
  store.touch(store.of(b"\1")[0], 0.0)
  assert not put(store, 1, PREFIXES[2], 0.3) and put(store, 1, PREFIXES[3], 0.31)
  assert [v.record.prefix for v in store.of(b"\1")] == [PREFIXES[0], PREFIXES[3]]
  # Behind the same chunks the better one stays: exact, or less repaired.
  assert not put(store, 1, PREFIXES[0], exact=False)
  assert put(store, 2, PREFIXES[0], exact=False, repairs=2) and put(store, 2, PREFIXES[0], exact=False, repairs=1)
  assert put(store, 2, PREFIXES[0]) and [v.record.exact for v in store.of(b"\2")] == [True]


def test_every_number_format_comes_back_from_disk(tmp_path):
  store = ChunkStore([1], device_bytes=0, disk_bytes=10**6, folder=tmp_path)
  store.put(record(1), parts(1.5, dtype=jnp.bfloat16))
  (one,) = store.of(b"\1")
  keys, values = store.load(one, 0)
  assert one.tier == DISK and keys.dtype == jnp.bfloat16 and (keys == 1.5).all() and (values == 2.5).all()


def test_names_tell_models_and_system_prompts_apart():
  names = {ChunkStore(s, salt=salt).name([5, 6]) for s in ([1], [1, 2]) for salt in ("", "a")}
  assert len(names) == 4 and ChunkStore([1]).name([5, 6]) in names


@pytest.mark.parametrize(
  ("how", "words"),
  [
    (dict(system=[]), "system prompt is empty"),
    (dict(variants=0), "variants is 0"),
    (dict(disk_bytes=5), "needs folder"),
    (dict(stages=(2, 2)), "ascending"),
  ],
)
def test_a_store_that_cannot_be_is_refused(how, words):
  with pytest.raises(InputError, match=words):
    functools.partial(ChunkStore, **{"system": [1]} | how)()
