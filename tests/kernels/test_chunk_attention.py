"""Chunks behind a cache and packed sequences: the reference by hand, cuDNN's calls put together by it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError, warn_once
from jaxlab.kernels import chunk_attention
from jaxlab.kernels import cudnn as library
from jaxlab.kernels.chunk_attention import behind, cudnn, lengths, packed, preferred
from tests.cudnn import cudnn_by_definition

CHUNK, ROOM, HEADS, KV_HEADS, SIZE = 8, 32, 4, 2, 16


def problem(seed=0, *, batch=2, chunk=CHUNK, room=ROOM, size=SIZE, dtype=jnp.float32):
  """(q, k, v, what a derivative is taken against)."""
  keys = jax.random.split(jax.random.key(seed), 4)
  shapes = (batch, chunk, HEADS, size), *[(batch, room, KV_HEADS, size)] * 2, (batch, chunk, HEADS, size)
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(q, k, v, see):
  """Head by head, from the definition; see: (batch, queries, keys)."""
  group = q.shape[2] // k.shape[2]
  heads = []
  for h in range(q.shape[2]):
    score = jnp.einsum("bqd,bkd->bqk", q[:, :, h], k[:, :, h // group]) / np.sqrt(q.shape[3])
    heads.append(jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1) @ v[:, :, h // group])
  return jnp.stack(heads, axis=2)


def seen(start, chunk=CHUNK, room=ROOM, window=None):
  query, key = start + np.arange(chunk)[:, None], np.arange(room)
  return ((key <= query) & (True if window is None else key >= query - window))[None]


def with_gradients(attend, q, k, v, against):
  out, pull = jax.vjp(attend, q, k, v)
  return [out, *pull(against.astype(out.dtype))]


def close(ours, theirs, tolerance=2e-5):
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance)


@pytest.mark.parametrize(("start", "window"), [(0, None), (8, None), (24, None), (16, 5), (16, 20)])
def test_a_chunk_sees_what_is_before_it_and_itself(start, window):
  q, k, v, against = problem()
  run = jax.jit(lambda *a: with_gradients(lambda q, k, v: behind(q, k, v, start=a[-1], window=window), *a[:-1]))
  plain = with_gradients(lambda q, k, v: by_hand(q, k, v, seen(start, window=window)), q, k, v, against)
  close(run(q, k, v, against, start), plain)


@pytest.mark.parametrize("start", [0, 3, 8, 24])
def test_two_calls_of_cudnn_are_one_softmax(monkeypatch, start):
  """By its definition of each call, in float32: forwards and backwards, also where nothing is before the chunk, and
  whatever is left in derivatives past the length."""
  cudnn_by_definition(monkeypatch)
  q, k, v, against = problem()
  ours = jax.jit(lambda *a: with_gradients(lambda q, k, v: cudnn.behind(q, k, v, a[-1]), *a[:-1]))
  close(
    ours(q, k, v, against, jnp.int32(start)),
    with_gradients(lambda q, k, v: by_hand(q, k, v, seen(start)), q, k, v, against),
  )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_lengths_are_those_of_the_runs(runs):
  """At one shape, which is compiled once: what is left of a row is its last run."""
  runs = [*runs, 25 - sum(runs)]
  segments = np.repeat(np.arange(len(runs)) * 3 - 1, runs)[None]
  found = jax.jit(lengths, static_argnums=1)(segments, 7)[0]
  assert found.tolist() == runs + [-1] * (7 - len(runs))


RUNS = ((3, 1, 4), (8,), (2, 6))


def pieces_of(runs, chunk=CHUNK):
  return jnp.stack([jnp.repeat(jnp.arange(len(r)), jnp.array(r), total_repeat_length=chunk) for r in runs])


@pytest.mark.parametrize("how", ["reference", "cudnn"])
def test_packed_sequences_are_blind_to_each_other(monkeypatch, how):
  cudnn_by_definition(monkeypatch)
  q, k, v, against = problem(batch=3, room=CHUNK)
  segments = pieces_of(RUNS)
  same = np.asarray(segments[:, :, None] == segments[:, None]) & np.tri(CHUNK, dtype=bool)
  plain = with_gradients(lambda q, k, v: by_hand(q, k, v, same), q, k, v, against)
  attend = {
    "reference": lambda q, k, v: packed(q, k, v, segments, pieces=3, implementation="reference"),
    "cudnn": lambda q, k, v: cudnn.packed(q, k, v, lengths(segments, 3)),
  }[how]
  close(jax.jit(lambda *a: with_gradients(attend, *a))(q, k, v, against), plain)


@pytest.mark.skipif(jax.device_count() < 8, reason="eight devices, simulated on a CPU")
@pytest.mark.parametrize("shape", [{"data": 4, "fsdp": 2}, {"data": 2, "tensor": 4}])
def test_each_device_calls_cudnn_for_rows_of_its_own(monkeypatch, shape):
  """Its lengths and sums are not the partitioner's to split."""
  cudnn_by_definition(monkeypatch)
  seen_by, call = [], library.module().dot_product_attention

  def counted(q, *args, **how):
    seen_by.append(len(q))
    return call(q, *args, **how)

  monkeypatch.setattr(library.module(), "dot_product_attention", counted)
  q, k, v, against = problem(batch=8)
  mesh = meshes.make_mesh(shape)
  segments = jnp.tile(pieces_of(RUNS[:1]), (8, 1))
  mine = lambda a: a[:, :CHUNK]
  for attend in (
    lambda q, k, v: behind(q, k, v, start=jnp.int32(8)),
    lambda q, k, v: packed(q, mine(k), mine(v), segments, pieces=3),
  ):
    alone = with_gradients(attend, q, k, v, against)
    seen_by.clear()
    with meshes.using(mesh):
      spec = lambda a: meshes.spec(("batch", None, None, None), a.shape, mesh)
      place = lambda a, spec=spec: jax.device_put(a, jax.NamedSharding(mesh, spec(a)))
      shared = jax.jit(lambda *a, attend=attend: with_gradients(attend, *a))(*map(place, (q, k, v, against)))
    close(shared, alone)
    assert set(seen_by) == {8 // (shape["data"] * shape.get("fsdp", 1))}


@pytest.mark.parametrize(("size", "chunk", "start"), [(64, 256, 0), (64, 256, 512), (128, 512, 1024), (64, 128, 640)])
def test_cudnn_equals_the_reference(size, chunk, start):
  """On a GPU that has it, in bfloat16; elsewhere it says what it needs."""
  q, k, v, against = problem(chunk=chunk, room=2048, size=size, dtype=jnp.bfloat16)
  segments = pieces_of(((chunk - 50, 50), (30, 70, chunk - 100)), chunk)
  mine = lambda a: a[:, :chunk]
  ways = {
    "behind": lambda how, q, k, v: behind(q, k, v, start=jnp.int32(start), implementation=how),
    "packed": lambda how, q, k, v: packed(q, mine(k), mine(v), segments, pieces=4, implementation=how),
  }
  for way in ways.values():
    run = lambda how, way=way: jax.jit(functools.partial(with_gradients, functools.partial(way, how)))(q, k, v, against)
    if not cudnn.supports(q, k, None):
      with pytest.raises(InputError, match="cuDNN takes 16-bit numbers"):
        run("cudnn")
      continue
    for ours, theirs in zip(run("cudnn"), run("reference"), strict=True):
      ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
      np.testing.assert_allclose(ours, theirs, atol=2**-6 * np.abs(theirs).max())


def test_cudnn_is_taken_by_itself_where_its_numbers_are_right(monkeypatch):
  """JAX promises none of these calls: one that changed, or is gone, must not train on without a word."""
  q, k, *_ = problem()
  cudnn_by_definition(monkeypatch)
  proved, found = chunk_attention._proved.__wrapped__, library.module()
  assert proved() and preferred(q, k, None)
  assert jax.jit(lambda x: x if proved() else -x)(1.0) == 1  # also while a program is traced

  def wrong(part):
    def bind(*given, **how):
      *given, total, out, cotangent = given
      total, out = (total + 0.5, out) if part == "sums" else (total, 2 * out)
      return found._dot_product_attention_bwd_p_wrapper.bind(*given, total, out, cotangent, **how)

    return types.SimpleNamespace(
      **vars(found) | {"_dot_product_attention_bwd_p_wrapper": types.SimpleNamespace(bind=bind)}
    )

  for part in "sums", "out":
    monkeypatch.setattr(library, "module", functools.partial(wrong, part))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="cuDNN's calls give other numbers than the reference"):
      assert not proved()
  monkeypatch.setattr(library, "module", types.SimpleNamespace)
  with pytest.warns(UserWarning, match=r"cuDNN's calls fail here \(InputError\)"):
    assert not proved()


def test_a_row_of_more_sequences_than_said_is_no_number(monkeypatch):
  cudnn_by_definition(monkeypatch)
  q, k, v, _ = problem(batch=3, room=CHUNK)
  out = packed(q, k, v, pieces_of(RUNS), pieces=2)
  assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1:]).all()


def test_nothing_takes_cudnn_by_itself_where_it_is_left_out(monkeypatch):
  q, k, *_ = problem()
  monkeypatch.setattr(chunk_attention, "_proved", lambda: True)
  monkeypatch.setattr(cudnn, "supports", lambda q, k, window: window is None)
  assert preferred(q, k, None) and not preferred(q, k, 4)
  with library.left_out():
    assert not preferred(q, k, None)


def test_mistakes_are_named():
  q, k, v, _ = problem()
  segments = jnp.zeros((2, CHUNK), jnp.int32)
  with pytest.raises(InputError, match="implementation is 'triton'"):
    behind(q, k, v, start=0, implementation="triton")
  with pytest.raises(InputError, match=r"do not fit: expected .* whole groups of query heads"):
    behind(q[:, :, :3], k, v, start=0)
  with pytest.raises(InputError, match=r"and segments .* do not fit"):
    packed(q, k, v, segments, pieces=1)
  with pytest.raises(InputError, match="pieces is 0"):
    packed(q, k[:, :CHUNK], v[:, :CHUNK], segments, pieces=0)
