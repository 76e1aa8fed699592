"""The dual form is gradient descent token by token; TNT's memories begin anew, keep to the past, and decode."""

import dataclasses
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.sequence import deep_memory, tnt
from jaxlab.sequence.deep_memory import Gates, Memory, Running

TIME, SIZE, WIDTH = 12, 4, 10
SMALL = dict(heads=2, head_dim=SIZE, expansion=2)
CONFIG = tnt.MemoryConfig(WIDTH, global_chunk=8, local_chunks=(2, 4), shard=8, **SMALL)
ONE = dataclasses.replace(CONFIG, local_chunks=(4,))
FORMS = {"linear": (), "mlp": (6,), "three": (6, 5)}
RULES = {"plain": (), "decay": ("keep",), "momentum": ("momentum",), "titans": ("keep", "momentum")}


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def memory_of(form="mlp", *, momentum=False, ttt=False, seed=0):
  random = np.random.default_rng(seed)
  sizes = (SIZE, *FORMS[form], SIZE)
  draw = lambda of: tuple(jnp.array(random.normal(size=(a + ttt, b)) / of) for a, b in itertools.pairwise(sizes))
  norm = (jnp.array(random.uniform(0.5, 1.5, SIZE)), jnp.array(random.normal(size=SIZE))) if ttt else None
  return Memory(draw(2), draw(20) if momentum else None, norm)


def data(time=TIME, gates=(), seed=1):
  """(q, k, v, gates) with keys and queries of unit length, and steps with which momentum does not run away."""
  random = np.random.default_rng(seed)
  q, k, v = random.normal(size=(3, time, SIZE))
  unit = lambda a: jnp.array(a / np.linalg.norm(a, axis=1, keepdims=True))
  names = {name: jnp.array(random.uniform(0.3, 0.8, time)) for name in gates}
  return unit(q), unit(k), jnp.array(v), Gates(jnp.array(random.uniform(0.02, 0.08, time)), **names)


def predict(weights, norm, x):
  """f for one vector, by the paper."""
  y = x
  for n, w in enumerate(weights):
    y = jax.nn.gelu(y) if n else y
    y = y @ w[: len(y)] + (w[-1] if len(w) > len(y) else 0)
  if norm is None:
    return y
  return x + norm[0] * (y - y.mean()) / jnp.sqrt(y.var() + 1e-6) + norm[1]


predicted = jax.jit(predict)
gradient = jax.jit(jax.grad(lambda weights, norm, k, v: jnp.sum((predict(weights, norm, k) - v) ** 2)))


def tokenwise(memory, q, k, v, gates, *, chunk, reads="token", pace=None, clip=None):
  """The definition: every token's weights are made, every gradient is one of `jax.grad`."""
  memory, q, k, v, gates = jax.tree.map(np.asarray, (memory, q, k, v, gates))  # what is not compiled is numpy's
  start = now = memory.weights
  momentum, out = memory.momentum or tuple(map(np.zeros_like, start)), []

  def between(share, limit):
    change = [share * (b - a) for a, b in zip(start, now, strict=True)]
    if limit is not None:
      change = [c * min(1.0, limit / np.linalg.norm(c)) for c in change]
    return tuple(a + c for a, c in zip(start, change, strict=True))

  for t in range(len(q)):
    keep = 1.0 if gates.keep is None else gates.keep[t]
    eta = 0.0 if gates.momentum is None else gates.momentum[t]
    slopes = map(np.asarray, gradient(start, memory.norm, k[t], v[t]))
    momentum = tuple(eta * s - gates.step[t] * g for s, g in zip(momentum, slopes, strict=True))
    now = tuple(keep * w + s for w, s in zip(now, momentum, strict=True))
    share = 1.0 if pace is None else float(pace[t % chunk])
    out.append(np.asarray(predicted(start if reads == "chunk" else between(share, None), memory.norm, q[t])))
    if t % chunk == chunk - 1:
      start = now = between(share, clip)
  return Memory(now, momentum if memory.momentum else None, memory.norm), np.stack(out)


scan = jax.jit(deep_memory.scan, static_argnames=("chunk", "reads", "clip", "loss"))
read, effect = jax.jit(deep_memory.read), jax.jit(deep_memory.effect)


def row(tree, *at):
  return jax.tree.map(lambda a: np.asarray(a)[at], tree)


@functools.partial(jax.jit, static_argnames=("chunk", "reads", "clip"))
def by_steps(memory, q, k, v, gates, **how):
  """`step` over the sequence and the memory that the next chunk would start from."""

  def one(carry, parts):
    running, t = carry
    running, out = deep_memory.step(running, *parts, t, **how)
    return (running, t + 1), out

  another = jax.tree.map(lambda a: jnp.concatenate([a, 0 * a[:1]]), (q, k, v, gates))
  (running, _), out = jax.lax.scan(one, (Running(memory, memory), 0), another)
  return running.start, out[:-1]


def same(a, b, tolerance=1e-12):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), a, b)


def differ(a, b):
  return float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 1e-4


@pytest.mark.parametrize(
  ("form", "rule", "chunk"),
  [
    *itertools.product(("linear", "mlp"), RULES, (4,)),
    *itertools.product(("mlp",), ("plain", "titans"), (1, TIME)),
  ],
)
def test_the_dual_form_and_the_steps_are_the_definition(form, rule, chunk):
  """Outputs, and weights and momentum at the end; chunks of one token are the rule token by token."""
  memory = memory_of(form, momentum="momentum" in RULES[rule])
  given = data(gates=RULES[rule])
  expected = tokenwise(memory, *given, chunk=chunk)
  same(scan(memory, *given, chunk=chunk), expected)
  if chunk != TIME:
    same(by_steps(memory, *given, chunk=chunk), expected)


@pytest.mark.parametrize(
  "how",
  [dict(form="three"), dict(ttt=True), dict(ttt=True, form="linear"), dict(clip=0.1), dict(reads="chunk")],
  ids=str,
)
def test_so_it_is_for_ttt_and_with_every_option(how):
  """TTT: residual and norm, biases, the step of a pair of tokens by the place of the one that reads."""
  options = dict(form="mlp", ttt=False) | how
  form, ttt = options.pop("form"), options.pop("ttt")
  momentum = not ttt
  given = data(gates=RULES["titans"] if momentum else ())
  if ttt:
    options["pace"] = 1 / jnp.arange(1.0, 5)
  memory = memory_of(form, momentum=momentum, ttt=ttt)
  expected = tokenwise(memory, *given, chunk=4, **options)
  same(scan(memory, *given, chunk=4, **options), expected)
  same(by_steps(memory, *given, chunk=4, **options), expected)


def test_one_chunk_is_one_step_of_full_batch_descent():
  memory, (q, k, v, gates) = memory_of(), data()
  one = lambda weights, k, v, step: step * jnp.sum((predict(weights, None, k) - v) ** 2)
  loss = lambda weights: jax.vmap(one, (None, 0, 0, 0))(weights, k, v, gates.step).sum()
  expected = jax.jit(lambda weights: jax.tree.map(jnp.subtract, weights, jax.grad(loss)(weights)))(memory.weights)
  same(scan(memory, q, k, v, gates, chunk=TIME)[0].weights, expected)


def test_open_and_closed_gates():
  """alpha = eta = 0 is the rule without; a gate that closes within a chunk, where products of gates are 0 / 0."""
  memory, (q, k, v, gates) = memory_of(), data()
  zeros = memory._replace(momentum=jax.tree.map(np.zeros_like, memory.weights))
  open_ = Gates(gates.step, np.ones(TIME), np.zeros(TIME))
  after, out = scan(zeros, q, k, v, open_, chunk=4)
  expected, plain = scan(memory, q, k, v, gates, chunk=4)
  same((after.weights, out), (expected.weights, plain))
  at = np.arange(TIME)
  closing = Gates(gates.step, 1.0 * (at != 5), 0.9 * (at != 6))
  memory = memory_of(momentum=True)
  same(scan(memory, q, k, v, closing, chunk=4), tokenwise(memory, q, k, v, closing, chunk=4))
  gradient = jax.jit(jax.grad(lambda gates: deep_memory.scan(memory, q, k, v, gates, chunk=4)[1].sum()))
  assert all(np.isfinite(g).all() for g in gradient(closing))


def test_only_a_gradient_that_reads_the_weights_depends_on_the_chunk():
  """A linear memory under the Hebbian loss -v.f(k) gives the same for any chunk; the squared error does not."""
  hebbian = lambda prediction, v: -(prediction * v).sum()
  memory, given = memory_of("linear", momentum=True), data(gates=RULES["titans"])
  run = lambda chunk, loss: scan(memory, *given, chunk=chunk, loss=loss)
  for chunk in (3, TIME):
    same(run(chunk, hebbian), run(1, hebbian))
  assert differ(run(3, deep_memory.squared_error)[1], run(1, deep_memory.squared_error)[1])


def test_a_write_takes_its_share_of_the_error():
  """Of a linear memory a chunk leaves (I - 2 theta K K') of the error."""
  memory, (q, k, v, _) = memory_of("linear"), data()
  after, _ = scan(memory, q, k, v, Gates(jnp.full(TIME, 0.05)), chunk=TIME)
  k, v = map(np.asarray, (k, v))
  error = lambda memory: np.asarray(read(memory, k)) - v
  (old,), (new,) = jax.tree.map(np.asarray, (memory.weights, after.weights))
  same(error(after), error(memory) - 0.1 * k @ (k.T @ error(memory)))
  change, size, before, now = effect(memory, after, k, v)
  same((before, now), (np.square(error(memory)).sum(), np.square(error(after)).sum()))
  same((change, size), (np.linalg.norm(new - old), np.linalg.norm(new)))
  assert float(now) < 0.9 * float(before)
  far, _ = scan(memory, q, k, v, Gates(jnp.full(TIME, 0.5)), chunk=TIME)
  too_far = effect(memory, far, k, v)
  assert too_far.after > too_far.before and too_far.change > change


def test_what_a_write_did_is_told_of_all_matrices():
  """Also in 16 bits, in which the sums would be wrong."""
  memory, after, (_, k, v, _) = memory_of(), memory_of(seed=2), data()
  flat = lambda memory: np.concatenate([np.ravel(w) for w in memory.weights])
  found = effect(memory, after, k, v)
  same(found[:2], (np.linalg.norm(flat(after) - flat(memory)), np.linalg.norm(flat(after))))
  half = jax.tree.map(lambda a: np.asarray(a, jnp.bfloat16), (memory, after, k, v))
  assert {a.dtype for a in jax.eval_shape(deep_memory.effect, *half)} == {jnp.dtype("float32")}


def test_gradients_are_those_of_finite_differences():
  """Of the start, the keys, the gates, through the gradients inside; checkpointed scans in scans."""
  memory, given = memory_of("mlp", momentum=True), data(time=8, gates=RULES["titans"])
  run = jax.jit(lambda *given: deep_memory.scan(*given, chunk=2, clip=0.2))
  check_grads(run, (memory, *given), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
  memory, given = memory_of("linear", ttt=True), data(time=4)
  run = jax.jit(lambda pace, *given: deep_memory.scan(*given, chunk=2, pace=pace))
  check_grads(run, (jnp.array([1.0, 0.4]), memory, *given), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


def heads(time, rows=1, count=2, seed=3):
  random = np.random.default_rng(seed)
  return jnp.array(random.normal(size=(2, rows, time, count, SIZE)))


def test_queries_are_projected_by_the_running_sum_of_their_window():
  q, k = map(np.asarray, heads(24, rows=2))
  project = jax.jit(
    lambda window, renormalize: tnt.project_queries(q, k, window=window, renormalize=renormalize), static_argnums=(0, 1)
  )
  for window in (24, 8, 1):
    out, gram = map(np.asarray, project(window, False))
    for t in (0, 7, 8, 15, 23):
      seen = k[:, t - t % window : t + 1]
      same(out[:, t], np.einsum("bthi,bthj,bhj->bhi", seen, seen, q[:, t]), 1e-11)
    same(gram, np.einsum("bthi,bthj->bhij", k[:, -window:], k[:, -window:]), 1e-11)
    same(project(window, True)[0], out / np.sqrt(np.square(out).sum(axis=-1, keepdims=True) + 1e-6), 1e-11)


def test_orthonormal_keys_leave_queries_as_they_are():
  q, k = np.asarray(heads(SIZE)[1]), np.asarray(heads(SIZE)[0])
  k = np.linalg.qr(k[0].transpose(1, 0, 2))[0].swapaxes(0, 1)[None]  # rows of each head are orthonormal
  out, gram = jax.jit(lambda q, k: tnt.project_queries(q, k, window=SIZE, renormalize=False))(q, k)
  same(gram[0], np.tile(np.eye(SIZE), (2, 1, 1)))
  same(out[:, -1], q[:, -1])
  same(np.einsum("hi,hi->h", out[0, 0], k[0, 1]), np.zeros(2))  # so far the first key alone


@functools.cache
def shapes_of(config):
  return jax.eval_shape(lambda: tnt.MemoryLayer(config, jax.random.key(0)))


def layer_of(config=CONFIG):
  """In float64, every parameter far enough from zero that every memory and every gate counts."""
  random = np.random.default_rng(0)
  draw = lambda path, a: 0.3 * random.normal(size=a.shape) + ("norm" in jax.tree_util.keystr(path))
  return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes_of(config)))


def tokens(time=24, rows=2, seed=5):
  return jnp.array(np.random.default_rng(seed).normal(size=(rows, time, WIDTH)))


def change_of(config, at, time=24):
  """Which outputs a change of token `at` reaches."""
  layer, x = layer_of(config), tokens(time, rows=1)
  both = np.concatenate([x, x])
  both[1, at] += 1.0
  out = np.asarray(jax.jit(lambda layer, x: layer(x))(layer, both))
  moved = np.abs(out[1] - out[0]).max(axis=1)
  return np.flatnonzero(moved > 1e-9)


@pytest.mark.parametrize("projection", ["shard", "chunk", None])
def test_local_memories_begin_anew_with_every_shard(projection):
  """A change in a shard changes that shard alone, from there on."""
  config = dataclasses.replace(ONE, global_chunk=None, taps=1, projection=projection)
  assert list(change_of(config, 10)) == list(range(10, 16))
  assert list(change_of(dataclasses.replace(config, shard=None), 10)) == list(range(10, 24))


def test_the_global_memory_is_read_before_its_chunk_is_written():
  """A change reaches the token itself, by its query, and all later chunks."""
  config = dataclasses.replace(CONFIG, local_chunks=(), taps=1)
  assert list(change_of(config, 10)) == [10, *range(16, 24)]


@pytest.mark.parametrize("config", [CONFIG, tnt.titans(WIDTH, chunk=4, **SMALL)], ids=["tnt", "titans"])
def test_no_token_sees_a_later_one(config):
  assert change_of(config, 13).min() == 13


@jax.jit
def parts_of(layer, x):
  c = layer.config
  u = layer.inputs(x)[..., : 3 * c.inner]
  return layer.heads(u, jnp.zeros_like(u[:, : c.taps - 1]))


def test_one_local_memory_that_never_returns_is_titans():
  """Also TNT with its one shard as long as the sequence."""
  x = tokens(8)
  recall = jax.jit(lambda layer, *given: layer.recall(*given, (4,))[0])
  for shard in (None, 8):
    layer = layer_of(dataclasses.replace(tnt.titans(WIDTH, chunk=4, **SMALL), shard=shard, clip=None))
    given, own = parts_of(layer, x), layer.local_memories[0]
    out = np.asarray(recall(layer, x, *given))
    memory, gates = jax.jit(lambda own, x: (own.memory(), own.gates_of(x)))(own, x)
    for head in range(2):
      one = row((*given, gates), 1, slice(None), head)
      same(out[1, :, head], tokenwise(row(memory, head), *one, chunk=4)[1])


def test_queries_and_keys_turn_by_their_place_in_the_chunk():
  """Of TTT: as if they came turned, by the angles of complex numbers; values do not."""
  config = tnt.ttt(WIDTH, chunk=4, **SMALL)
  layer, x = layer_of(config), tokens(8)
  plain = layer_of(dataclasses.replace(config, rotary=False))
  q, k, v = map(np.asarray, parts_of(layer, x))
  recall = jax.jit(lambda layer, *given: layer.recall(*given, (4,))[0])
  turn = np.exp(1j * (np.arange(8) % 4)[:, None, None] * np.array([1.0, 0.01]))

  def turned(a):
    both = (a[..., :2] + 1j * a[..., 2:]) * turn
    return np.concatenate([both.real, both.imag], axis=-1)

  out = recall(layer, x, q, k, v)
  same(out, recall(plain, x, turned(q), turned(k), v))
  assert differ(out, recall(plain, x, q, k, v))


def test_a_row_of_one_token_is_the_first_of_a_longer_one():
  layer, x = layer_of(), tokens(8)
  one, longer = jax.jit(lambda layer, x: (layer(x[:, :1]), layer(x)))(layer, x)
  same(one, longer[:, :1])


def test_equal_memories_add_up():
  layer, x = layer_of(dataclasses.replace(CONFIG, global_chunk=None, local_chunks=(4,))), tokens(8)
  q, k, v = parts_of(layer, x)
  three = layer_of(dataclasses.replace(CONFIG, global_chunk=None, local_chunks=(4, 4, 4)))
  for n in range(3):
    three.local_memories[n] = layer.local_memories[0]
  recall = jax.jit(lambda layer, chunks: layer.recall(x, q, k, v, chunks)[0], static_argnums=1)
  same(recall(three, (4, 4, 4)), 3 * recall(layer, (4,)))


@pytest.mark.parametrize(
  "config",
  [
    CONFIG,
    dataclasses.replace(ONE, projection="chunk", renormalize=False, clip=0.05, momentum=True, decay=True),
    dataclasses.replace(ONE, global_chunk=None, shard=None, rotary=True),
    tnt.titans(WIDTH, chunk=4, **SMALL),
    tnt.ttt(WIDTH, chunk=4, layers=2, **SMALL),
  ],
  ids=["tnt", "gates", "endless", "titans", "ttt"],
)
def test_decoding_is_the_forward(config):
  """Token by token, at the chunks of stage 1 and at chunks of one token."""
  layer, x = layer_of(config), tokens()

  def both(layer, x, chunks):
    move = lambda state, x: layer.step(x, state, local_chunks=chunks)[::-1]
    out = jax.lax.scan(move, layer.empty_state(2), x.swapaxes(0, 1))[1]
    return out.swapaxes(0, 1), layer(x, local_chunks=chunks)

  every = None, (1,) * len(config.local_chunks)
  results = jax.jit(lambda layer, x: [both(layer, x, chunks) for chunks in every])(layer, x)
  for steps, forward in results:
    same(steps, forward, 1e-11)
  assert differ(results[0][1], results[1][1])


@pytest.mark.parametrize(("own", "length", "projection"), [(CONFIG, 8, "shard"), (ONE, 16, None)], ids=["8", "16"])
def test_a_prompt_is_read_at_once_and_gone_on_from(own, length, projection):
  """At chunks of 8 and of the memories, then token by token in chunks of one: as if all had been steps."""
  config = dataclasses.replace(own, shard=16, projection=projection, momentum=True, decay=True)
  ones, x = (1,) * len(own.local_chunks), tokens()

  @jax.jit
  def run(layer, x):
    move = lambda chunks: lambda state, x: layer.step(x, state, local_chunks=chunks)[::-1]
    y, state = layer.prefill(x[:, :length])
    expected, _ = jax.lax.scan(move(None), layer.empty_state(2), x[:, :length].swapaxes(0, 1))
    both = jax.tree.map(lambda *a: jnp.stack(a), state, expected)  # steps from either state, side by side
    out = jax.lax.scan(jax.vmap(move(ones), (0, None)), both, x[:, length:].swapaxes(0, 1))[1]
    return y, layer(x[:, :length]), out[:, 0], out[:, 1]

  y, forward, after_prompt, after_steps = run(layer_of(config), x)
  same(y, forward)
  same(after_prompt, after_steps)


def test_every_shard_teaches_the_common_start_and_stage_two_leaves_the_global_memory():
  layer, x = layer_of(ONE), tokens(16, rows=1)
  weights = jnp.array(np.random.default_rng(0).normal(size=x.shape))

  loss = lambda layer, counts: (counts[:, None] * weights * layer(x)).sum()
  gradient = jax.jit(jax.grad(loss))
  first = np.arange(16.0) < 8
  both, *each = (gradient(layer, counts) for counts in (np.ones(16), 1.0 * first, 1.0 * ~first))
  start = lambda g: np.asarray(g.local_memories[0].weights[0][...])
  assert all(np.abs(start(g)).max() > 1e-6 for g in each)
  same(start(both), start(each[0]) + start(each[1]))
  mask = tnt.local_parameters(layer)
  optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), jax.tree.map(lambda a: not a, mask)))
  after = jax.jit(lambda layer, g: optax.apply_updates(layer, optimizer.update(g, optimizer.init(layer))[0]))(
    layer, both
  )
  same(after.global_memory, layer.global_memory, 0)
  moved = [
    differ(a, b) for a, b in zip(*(jax.tree.leaves(t.local_memories[0].weights) for t in (after, layer)), strict=True)
  ]
  assert all(moved) and differ(after.inputs.weight[...], layer.inputs.weight[...])


def work(function, *arguments):
  """(multiplications of matrix products, longest chain of scan steps), counted in the program."""

  def count(jaxpr):
    products, depth = 0, 0
    for equation in jaxpr.eqns:
      inner = [count(p) for p in jax.extend.core.jaxprs_in_params(equation.params)]
      times = equation.params["length"] if equation.primitive.name == "scan" else 1
      if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        products += equation.outvars[0].aval.size * int(np.prod([left[n] for n in contracted]))
      products += times * sum(p for p, _ in inner)
      own = max((d for _, d in inner), default=0)
      depth = max(depth, times * max(own, 1) if equation.primitive.name == "scan" else own)
    return products, depth

  return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_time_is_linear_and_shards_shorten_the_chain():
  """Products grow with the tokens; steps one after the other are max(L / C_G, S_L / C_L) instead of L / C_L."""
  layer = layer_of(dataclasses.replace(CONFIG, global_chunk=128, shard=128, local_chunks=(4,)))
  endless = layer_of(dataclasses.replace(CONFIG, global_chunk=None, shard=None, local_chunks=(4,), projection=None))
  run = lambda layer, time: work(lambda x: layer(x), tokens(time, rows=1))
  (short, depth), (long, later) = run(layer, 256), run(layer, 1024)
  assert long == 4 * short and depth == later == 128 // 4
  (short, depth), (long, later) = run(endless, 256), run(endless, 1024)
  assert long == 4 * short and (depth, later) == (256 // 4, 1024 // 4)


def test_gates_make_the_program_no_longer_with_the_chunk():
  """A scan over the tokens of a chunk would, with every doubling."""

  def equations(chunk):
    count = lambda jaxpr: (
      len(jaxpr.eqns) + sum(count(inner) for e in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(e.params))
    )
    run = lambda *given: deep_memory.scan(memory_of("linear", momentum=True), *given, chunk=chunk)
    return count(jax.make_jaxpr(run)(*data(chunk, RULES["titans"])).jaxpr)

  assert equations(32) == equations(128)


def test_devices_share_shards_and_heads_out():
  layer, x = layer_of(), tokens(32)
  run = jax.jit(lambda layer, x: layer(x))
  expected = run(layer, x)
  mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
  with meshes.using(mesh):
    same(jax.jit(run)(jax.device_put(layer, meshes.shardings(layer, mesh)), x), expected)


def test_sixteen_bits_outside_thirty_two_inside():
  with jax.enable_x64(False):
    x = jnp.asarray(tokens(), jnp.bfloat16)

    @jax.jit
    def run():
      layer = tnt.MemoryLayer(CONFIG, jax.random.key(0))
      y, exact = layer(x), layer(x.astype(jnp.float32))
      return y, layer.empty_state(1), jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)

    y, state, error = run()
    assert y.dtype == jnp.bfloat16 and state.local[0].now.weights[0].dtype == jnp.float32
    assert float(error) < 0.03


@pytest.mark.parametrize("layers", [1, 2])
def test_it_learns_to_recall(layers):
  """Four pairs, then their keys in another order: the value behind each. To know the values alone is log 4 = 1.39."""
  with jax.enable_x64(False):
    how = dict(heads=2, head_dim=16, expansion=2, layers=layers)
    config = tnt.MemoryConfig(32, global_chunk=None, local_chunks=(4,), shard=12, **how)
    keys = jax.random.split(jax.random.key(0), 4)
    fresh = lambda: (0.5 * jax.random.normal(keys[0], (16, 32)), tnt.MemoryLayer(config, keys[1]), jnp.zeros((32, 8)))

    def loss(parameters, key):
      embedding, layer, head = parameters
      pairs, values, order = jax.random.split(key, 3)
      shuffled = lambda key, n: jax.random.permutation(key, jnp.tile(jnp.arange(n), (32, 1)), axis=1, independent=True)
      asked = shuffled(pairs, 8)[:, :4]
      answers, order = jax.random.randint(values, (32, 4), 0, 8), shuffled(order, 4)
      written = jnp.stack([asked, answers + 8], axis=-1).reshape(32, 8)
      x = embedding[jnp.concatenate([written, jnp.take_along_axis(asked, order, 1)], axis=1)]
      logits = (x + layer(x))[:, -4:] @ head
      targets = jnp.take_along_axis(answers, order, 1)
      return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    optimizer = optax.adam(1e-2)

    def step(carry, key):
      parameters, state = carry
      value, gradient = jax.value_and_grad(loss)(parameters, key)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(parameters, updates), state), value

    @jax.jit
    def train():
      start = fresh()
      return jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(keys[3], 80))[1]

    curve = train()
    assert curve[0] > 1.9 and curve[-10:].mean() < 0.7


def test_bad_input():
  memory, (q, k, v, gates) = memory_of(), data()
  layer, x = layer_of(), tokens()
  run = lambda *a, **how: deep_memory.scan(*a, **(dict(chunk=4) | how))
  for call, message in (
    (lambda: run(memory, q, k, v, gates, chunk=0), "chunk is 0"),
    (lambda: run(memory, q, k, v, gates, chunk=5), "chunk=5 must divide time=12"),
    (lambda: run(memory, q[:8], k, v, gates), "disagree; expected"),
    (lambda: run(memory, q[:, :3], k[:, :3], v[:, :3], gates), "cannot map vectors of 3"),
    (lambda: run(memory, q, k, v, gates, reads="now"), "reads is 'now'"),
    (lambda: run(memory, q, k, v, gates._replace(momentum=gates.step)), "momentum is in one of memory and gates"),
    (lambda: run(memory, q, k, v, gates, pace=jnp.ones(3)), r"pace has shape \(3,\)"),
    (
      lambda: deep_memory.step(Running(memory, memory), q[0], k[0], v[0], Gates(gates.step[0]), 0, chunk=0),
      "chunk is 0",
    ),
    (lambda: tnt.project_queries(q[None, :, None], k[None, :, None], window=5), "window=5 must divide time=12"),
    (lambda: dataclasses.replace(CONFIG, heads=0), "memory.heads is 0"),
    (lambda: dataclasses.replace(CONFIG, shard=0), "memory.shard is 0"),
    (lambda: dataclasses.replace(CONFIG, local_chunks=(3,)), "local_chunk=3 must divide shard=8"),
    (lambda: dataclasses.replace(CONFIG, local_chunks=(), global_chunk=None), "remembers nothing"),
    (lambda: dataclasses.replace(CONFIG, projection="all"), "memory.projection is 'all'"),
    (lambda: dataclasses.replace(CONFIG, clip=0.0), "memory.clip is 0.0"),
    (lambda: dataclasses.replace(CONFIG, local_step=-1.0), "memory.local_step is -1.0"),
    (lambda: dataclasses.replace(CONFIG, global_step=0.0), "memory.global_step is 0.0"),
    (lambda: run(memory, q[:0], k[:0], v[:0], Gates(gates.step[:0])), r"there is no token \(q \(0, 4\)\)"),
    (lambda: layer(x[:, :0]), r"rows have no token \(x \(2, 0, 10\)\)"),
    (lambda: layer(x[:, :20]), "global_chunk=8 must divide time=20"),
    (lambda: layer_of(dataclasses.replace(CONFIG, global_chunk=4))(x[:, :20]), "shard=8 must divide time=20"),
    (lambda: layer.prefill(x[:, :4]), "global_chunk=8 must divide time=4"),
    (lambda: layer_of(tnt.titans(WIDTH, **SMALL)).prefill(x[:, :8]), "local_chunk=16 must divide time=8"),
    (lambda: layer(x, local_chunks=(1,)), "local_chunks has 1 lengths; the layer has 2"),
    (lambda: layer_of(tnt.ttt(WIDTH, chunk=4, **SMALL))(x, local_chunks=(8,)), "has 4 of them at most"),
  ):
    with pytest.raises(InputError, match=message):
      jax.eval_shape(call)
