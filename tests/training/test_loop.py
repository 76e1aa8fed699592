import itertools
import json
import os
import random
import shutil
import signal
import socket
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.data import packing, tokens
from jaxlab.models.config import nanochat
from jaxlab.training import loop, losses
from jaxlab.training.metrics import read_metrics
from jaxlab.training.optimizers import muon_adamw
from tests.common import configs, random_model, random_tokens, start, wait

CONFIG = nanochat(depth=3, aspect_ratio=16, head_dim=16, vocab_size=64, context=512)
SMALL = configs()["llama"]


def make_data(batch=8, time=16):
  def make(i):
    row = np.random.default_rng(i).integers(0, 64, time + 1).astype(np.int32)
    return {"inputs": row[:-1], "targets": row[1:]}

  return grain.MapDataset.range(10_000).map(make).batch(batch).to_iter_dataset()


def plain_loss(model, batch, step, key):
  return losses.language_model_loss(model, batch)


def run(workdir, steps=6, config=CONFIG, **changes):
  options = dict(steps=steps, workdir=workdir, compute_dtype="float32", checkpoint_every=2)
  optimizer = muon_adamw(config, steps=6, batch_tokens=128)
  return loop.train(random_model(config), make_data(), plain_loss, optimizer, **(options | changes))


def losses_of(workdir):
  return [line["loss"] for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("reference")
  return run(workdir), losses_of(workdir), workdir


def test_the_loss_falls_and_everything_is_written(reference):
  _, curve, workdir = reference
  assert len(curve) == 6 and curve[-1] < curve[0]
  assert list((workdir / "tensorboard").iterdir())
  assert {"step", "loss", "gradient_norm", "tokens_per_second"} <= set(read_metrics(workdir)[-1])
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "6"]


def test_a_finished_run_is_only_read_again(reference):
  model, curve, workdir = reference
  again = run(workdir)
  assert losses_of(workdir) == curve
  chex.assert_trees_all_equal(again, model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_the_next_run_goes_on_exactly(reference, tmp_path, number):
  def at_step_3(metrics):
    if metrics["step"] == 3:
      os.kill(os.getpid(), number)

  with pytest.raises(loop.Interrupted, match="same command continues"):
    run(tmp_path, checkpoint_every=100, progress=at_step_3)
  assert 3 < len(losses_of(tmp_path)) < 6
  model = run(tmp_path, checkpoint_every=100)
  assert losses_of(tmp_path) == reference[1]
  chex.assert_trees_all_equal(model, reference[0])


def test_accumulation_changes_nothing_but_rounding(reference, tmp_path):
  run(tmp_path, accumulate=4)
  np.testing.assert_allclose(losses_of(tmp_path), reference[1], rtol=1e-4)


def test_microbatches_are_traced_once():
  """Not once more for the shapes of their sums."""
  traced = []

  def loss(model, batch, step, key):
    traced.append(batch["inputs"].shape)
    return plain_loss(model, batch, step, key)

  optimizer, mesh = optax.sgd(0.1), meshes.make_mesh({"data": 1}, jax.devices()[:1])
  state = loop.initial_state(random_model(SMALL), optimizer, mesh, 0)
  step = loop.make_step(loss, optimizer, meshes.shardings(state, mesh), accumulate=2)
  step.trace(state, {name: random_tokens(4, 8) for name in ("inputs", "targets")})
  assert traced == [(2, 8)]


def test_a_gradient_of_ones_own_trains_as_the_loss_does(reference, tmp_path):
  """Worked out in two halves of the rows, of a model in the computing dtype."""

  def halves(model, batch, step, key):
    gradient = jax.value_and_grad(plain_loss, has_aux=True)
    half = lambda i: gradient(model, jax.tree.map(lambda a: a[i::2], batch), step, key)
    return jax.tree.map(lambda a, b: (a + b) / 2, half(0), half(1))

  optimizer = muon_adamw(CONFIG, steps=6, batch_tokens=128)
  how = dict(steps=6, workdir=tmp_path, compute_dtype="float32")
  loop.train(random_model(CONFIG), make_data(), None, optimizer, gradient_fn=halves, **how)
  np.testing.assert_allclose(losses_of(tmp_path), reference[1], rtol=1e-4)
  with pytest.raises(InputError, match="give a loss_fn or a gradient_fn, and not both"):
    loop.train(random_model(CONFIG), make_data(), plain_loss, optimizer, gradient_fn=halves, **how)


@pytest.mark.parametrize(
  "shape", [{"data": 8}, {"fsdp": 8}, {"data": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "data": 2}]
)
def test_every_sharding_equals_one_device(one_device, tmp_path, shape):
  np.testing.assert_allclose(sgd_curve(tmp_path, meshes.make_mesh(shape)), one_device, rtol=2e-5)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  return sgd_curve(tmp_path_factory.mktemp("one"), meshes.make_mesh({}, jax.devices()[:1]))


def test_a_checkpoint_of_four_devices_goes_on_on_two_and_on_one(tmp_path):
  """Split by fsdp and by heads (2, which divide), in microbatches, with Muon: the losses stay those of one device."""
  train = lambda workdir, steps, shape, devices: run(
    workdir, steps, SMALL, accumulate=2, mesh=meshes.make_mesh(shape, jax.devices()[:devices])
  )
  train(tmp_path / "one", 4, {}, 1)
  train(tmp_path / "four", 2, {"fsdp": 2, "tensor": 2}, 4)
  shutil.copytree(tmp_path / "four", tmp_path / "two")
  for workdir, shape, devices in (("two", {"fsdp": 2}, 2), ("four", {}, 1)):
    model = train(tmp_path / workdir, 4, shape, devices)
    assert len(model.blocks.o.weight.get_value().sharding.device_set) == devices
    np.testing.assert_allclose(losses_of(tmp_path / workdir), losses_of(tmp_path / "one"), rtol=1e-4)


def sgd_curve(workdir, mesh):
  """SGD: Adam's normalisation would blow rounding up where gradients are zero."""
  options = dict(steps=3, workdir=workdir, compute_dtype="float32", mesh=mesh)
  loop.train(random_model(CONFIG), make_data(), plain_loss, optax.sgd(0.1), **options)
  return losses_of(workdir)


def test_bfloat16_computes_on_a_copy(tmp_path):
  model = run(tmp_path, steps=3, compute_dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
  half = loop.cast(random_model(configs()["mhc"]), "bfloat16")
  assert half.blocks.q.weight.get_value().dtype == jnp.bfloat16
  assert half.blocks.mlp_mixing.residual.get_value().dtype == jnp.float32


def test_no_number_and_jumps_stop_the_run(tmp_path):
  poisoned = lambda model, batch, step, key: (jnp.where(step == 3, jnp.nan, plain_loss(model, batch, step, key)[0]), {})
  with pytest.raises(loop.Diverged, match=r"the loss is nan at step 4 .*lower the learning rate.*last checkpoint"):
    loop.train(random_model(CONFIG), make_data(), poisoned, optax.sgd(0.1), steps=6, workdir=tmp_path)
  guard = loop._Guard()
  for step in range(60):
    guard({"loss": 3.0, "step": step})
  with pytest.raises(loop.Diverged, match=r"loss is 5\.1 at step 60"):
    guard({"loss": 5.1, "step": 60})


def test_a_checkpoint_of_another_model_is_refused(reference, tmp_path):
  run(tmp_path, steps=2)
  with pytest.raises(InputError, match="use another --workdir"):
    run(tmp_path, config=configs()["qwen3"])
  assert len(losses_of(tmp_path)) == 2


def test_a_full_disk_is_named(tmp_path, monkeypatch):
  import orbax.checkpoint as ocp

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ocp.CheckpointManager, "save", full)
  with pytest.raises(InputError, match=r"could not save checkpoint 2: .*No space left.*free some disk space"):
    run(tmp_path, steps=2)


def test_batches_that_do_not_split_are_named(tmp_path):
  with pytest.raises(InputError, match="accumulate=3 must divide batch=8"):
    run(tmp_path, accumulate=3)


def test_a_uniform_model_has_eight_bits_per_byte():
  """Logits of zero over 256 one-byte tokens; special tokens (0 bytes) change nothing."""
  config = configs()["llama"].__class__(**{**configs()["llama"].__dict__, "vocab_size": 256})
  model = random_model(config)
  model.head.weight.set_value(jnp.zeros_like(model.head.weight.get_value()))
  tokens = random_tokens(3, 17, vocab=256)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  forward = jax.jit(lambda m, inputs: m.hidden(inputs))
  sizes = np.ones(256, np.int32)
  assert losses.evaluator(forward, sizes)(model, [batch])["bits_per_byte"] == pytest.approx(8.0, rel=1e-5)
  sizes[:100] = 0
  assert losses.evaluator(forward, sizes)(model, [batch])["bits_per_byte"] == pytest.approx(8.0, rel=1e-5)
  with pytest.raises(InputError, match="token_bytes has 257 ids, the model 256"):
    losses.evaluator(forward, np.ones(257, np.int32))(model, [batch])


KILLED = """
import pathlib, sys, time
from tests.training.test_loop import SMALL, run
options = dict(config=SMALL, steps=int(sys.argv[2]), checkpoint_every=3)
run(pathlib.Path(sys.argv[1]), progress=lambda m: time.sleep(0.02), **options)
"""


@pytest.mark.parametrize("kills, steps", [(3, 16), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_killed_runs_lose_nothing(tmp_path, kills, steps):
  """SIGKILL at random moments: the recorded losses are those of a run that was left alone."""
  begin = lambda folder: start(KILLED, str(folder), str(steps))
  whole, hurt = tmp_path / "whole", tmp_path / "hurt"
  assert wait(begin(whole)).returncode == 0
  rng = random.Random(kills)
  for _ in range(kills):
    process = begin(hurt)
    before = len(losses_of(hurt))
    deadline = time.time() + 60
    # Past the start-up at least half of the time, or no step would ever be reached.
    if rng.random() < 0.7:
      while len(losses_of(hurt)) <= before and process.exitcode is None and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    wait(process)
  assert wait(begin(hurt)).returncode == 0
  assert losses_of(hurt) == losses_of(whole) and len(losses_of(whole)) == steps
  assert [line["step"] for line in read_metrics(hurt)] == list(range(1, steps + 1))


HOST = """
import pathlib, sys
import jax
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from tests.training.test_loop import batches_of, run_hosts
for steps in (2, 4):
  run_hosts(pathlib.Path(sys.argv[1]), batches_of(jax.process_index()), steps)
"""


def batches_of(host: int):
  corpus = tokens.Tokens(np.arange(600) % 63 + 1, np.arange(0, 601, 30), bos=0)
  return packing.batches(packing.training_rows(corpus, row=16, seed=0, shard=(host, 2)), 8)


def run_hosts(workdir, data, steps, **options):
  optimizer = muon_adamw(SMALL, steps=4, batch_tokens=256)
  options |= dict(compute_dtype="float32", checkpoint_every=2)
  loop.train(random_model(SMALL), data, plain_loss, optimizer, steps=steps, workdir=workdir, **options)


def test_two_hosts_train_as_one_and_resume(tmp_path):
  """Stopped after two steps and resumed, they write the losses of one process that reads what both read."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  both = tmp_path / "both"
  hosts = [wait(host, 120) for host in [start(HOST, str(both), address, str(i)) for i in range(2)]]
  assert [host.returncode for host in hosts] == [0, 0], hosts[0].stderr[-2000:]
  assert [line["step"] for line in read_metrics(both)] == [1, 2, 3, 4]
  saved = json.loads((both / "checkpoints" / "4" / "iterator" / "metadata").read_text())
  assert len(saved["hosts"]) == 2 and saved["hosts"][0] != saved["hosts"][1]
  shares = zip(*(itertools.islice(batches_of(host), 4) for host in range(2)), strict=True)
  joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *pair) for pair in shares]
  data = grain.MapDataset.source(joined).to_iter_dataset()
  run_hosts(tmp_path / "one", data, 4, mesh=meshes.make_mesh({}, jax.devices()[:1]))
  np.testing.assert_allclose(losses_of(both), losses_of(tmp_path / "one"), rtol=1e-5)
