"""What the training step sends between devices, and the experiment that measures it, at scale test."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import many_gpus as config_file
from experiments import many_gpus as experiment
from experiments import results
from experiments.chunkflow import speed
from experiments.console import Console
from experiments.many_gpus import chunked, collectives, suffix, training
from jaxlab.core.checks import InputError
from jaxlab.models import Transformer
from jaxlab.models.config import nanochat, qwen3
from jaxlab.sequence import chunkflow
from tests.common import run_and_continue

HLO = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gather = (bf16[4,8]{1,0:T(8)}, bf16[16,8]{1,0:S(1)}) all-gather-start(%x), channel_id=1, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%gather)
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], /*index=1*/f32[4]) while(%p), condition=%sum, body=%inner, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %r = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%sum
}

ENTRY %main (p: (s32[], f32[4])) -> f32[4] {
  %s = ((f32[8]{0}, f32[8]{0}), (f32[2]{0}, f32[2]{0}), u32[]) reduce-scatter-start(%a, %b), to_apply=%sum
  %l = (s32[], f32[4]) while(%p), condition=%sum, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %g = f32[4]{0} get-tuple-element(%l), index=1
}
"""


def test_collectives_are_counted_in_nested_loops_and_asynchronous_forms():
  assert collectives.collectives(HLO) == [
    ("all-gather", 16 * 8 * 2, 24, 2),
    ("all-reduce", 4 * (4 + 6), 3, 1),
    ("reduce-scatter", 2 * 2 * 4, 1, 0),
  ]
  assert collectives.summary(HLO)["all-gather"] == {"instructions": 1, "runs": 24, "bytes": 24 * 256}


SHAPE = dict(depth=4, aspect_ratio=16, vocab_size=96, context=128, window_pattern="L", x0=False, value_embeddings=False)
CASE = dict(batch=64, rows=16, length=128, dtype="float32", shape=SHAPE)
LAYERS, WIDTH, MICROBATCHES = 4, 64, 2
ACTIVATION = CASE["rows"] * CASE["length"] * WIDTH * 4  # a device's rows of the residual, 524 kB; a layer has 197 kB


def sent(axis: str, head_dim: int = 32) -> tuple[list, float]:
  """(collectives of a training step on two devices, those that moved most first; bytes, over the parameters' of every
  microbatch)."""
  shapes = jax.eval_shape(lambda: Transformer(nanochat(**SHAPE, head_dim=head_dim), jax.random.key(0)))
  model = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
  ids = np.zeros((CASE["batch"], CASE["length"] + 1), np.int32)
  compiled, state, *_ = training.prepare(CASE, model, ids, axis, 2)
  found = collectives.collectives(compiled.as_text())
  parameters = sum(a.nbytes for a in jax.tree.leaves(state.model))
  return found, sum(c.bytes * c.runs for c in found) / parameters / MICROBATCHES


def test_data_sends_gradients_and_shares_muon_out():
  """Gradients once a microbatch, orthogonal factors once a step."""
  found, ratio = sent("data")
  assert {c.kind for c in found} == {"all-reduce", "all-gather"} and 1.0 < ratio < 1.6
  assert all(c.depth == 0 for c in found if c.kind == "all-gather")


def test_fsdp_sends_weights_and_gradients_but_no_activation():
  """Weights are gathered a layer at a time, forwards and for the gradient, in the loop over layers."""
  found, ratio = sent("fsdp")
  assert max(c.bytes for c in found) < ACTIVATION and ratio < 4
  gathered = [c for c in found if c.kind == "all-gather" and c.depth == 2]
  assert sum(c.bytes * c.runs for c in gathered) <= MICROBATCHES * LAYERS * 2 * 12 * WIDTH**2 * 4


@pytest.mark.parametrize("head_dim, exchanges", [(64, 5), (32, 12)])
def test_tensor_exchanges_rows_around_split_products_only(head_dim, exchanges):
  """An MLP exchanges rows five times: into its products, twice as they are computed again for the gradient, out of
  them, and both ways for the gradient. Attention does alike, but not where its one head of 64 cannot be split: each
  device then has rows of its own. Gradients of queries, keys and values come out one by one here: two more.
  """
  found, _ = sent("tensor", head_dim)
  exchanged = [c.bytes // (2 * ACTIVATION) * c.runs for c in found if c.depth == 2]
  assert sum(exchanged) == MICROBATCHES * LAYERS * exchanges


def test_every_number_is_measured_and_claims_follow_from_them(tmp_path, monkeypatch):
  parts = [f"{part}.measure" for part in ("training", "suffix", "prompts", "serving", "chunked")]
  report = run_and_continue("many_gpus", tmp_path, monkeypatch, *parts)
  runs = report.metrics["training"]["tiny"]
  assert list(runs) == ["one device", "data 2", "fsdp 2", "tensor 2"]
  assert training.difference(runs) < 1e-5 and len(runs["fsdp 2"]["losses"]) == 4
  np.testing.assert_allclose(runs["data 2"]["tokens_per_second"] * runs["data 2"]["step_seconds"], 8 * 16)
  assert set(report.metrics["suffix"]["decode"]["milliseconds"]) == {
    *("sequential", "tensor 1", "tensor 2"),
    *("layer 1 K1", "layer 2 K1"),
  }
  assert all(claim.holds for claim in report.claims) and len(report.claims) == 6
  config = config_file.get_config("gpu")
  made = experiment.claims(config, report.metrics)  # as where speeds count
  speed = next(claim for claim in made if "fsdp 2 devices" in claim.name)
  rate = lambda name: runs[name]["tokens_per_second"]
  np.testing.assert_allclose(speed.ours, rate("fsdp 2") / rate("one device") / 2)
  assert len(made) == 12 and "the engine serves over 2 devices as on one" in "".join(claim.name for claim in made)
  [slower] = [claim.ours for claim in made if "a global batch by" in claim.name]
  of = lambda rows: rows["2"]["tokens_per_second"] / rows["1"]["tokens_per_second"] / 2
  np.testing.assert_allclose(slower, min(map(of, report.metrics["chunked"].values())))
  assert 0 < chunked.difference(report.metrics["chunked"]) < 1e-5
  assert "124 tokens shared out over 2 devices" in "".join(claim.name for claim in made)
  assert "2 GPUs train tiny" in experiment.finding(config, report.metrics)
  pictures = {"sent.png", "prompts.png", "training.png", "latency.png"}
  assert set(experiment.draw(config, report.metrics, tmp_path)) == pictures


def test_of_one_token_and_a_prompt_the_lesser_gain_is_claimed_where_claims_are_many():
  """The other gain is in the note; nothing else is lost."""
  published = json.loads((Path(__file__).parents[2] / "results/many_gpus/x4.json").read_text())
  config, metrics = config_file.get_config("gpu"), results.restored(published["metrics"])
  metrics.pop("chunked", None)
  before = {claim.name: claim for claim in experiment.claims(config, metrics)}
  row = {"tokens_per_second": 1.0, "bytes": 1e9, "difference": 0.0, "balance": 1.0}
  found = {"1": row, "4": row | {"tokens_per_second": 3.6, "difference": 1e-3}}
  after = experiment.claims(config, metrics | {"chunked": dict.fromkeys(chunked.METHODS, found)})
  gone = (
    set(before) - {claim.name for claim in after} - {claim.name for claim in before.values() if "Bytes" in claim.name}
  )
  assert gone == {
    "How many times as fast a prompt is read with SNLP's suffix over 4 devices as on one",
    "How many times as fast a prompt is read with SNLP's suffix over 4 devices as without SNLP",
  }
  assert all(name in " ".join(claim.note for claim in after) for name in gone)
  assert [claim.ours for claim in after if "ChunkFlow" in claim.name] == [0.9, 1e-3]


def test_a_wrong_gradient_is_seen_on_whichever_device():
  """One parameter off by a tenth on two devices, though it is a small part of the whole gradient."""
  model = {"large": jnp.full(1000, 10.0), "small": jnp.ones(10)}

  def gradient(model, batch, step, key):
    wrong = 1 + 0.1 * (jax.sharding.get_abstract_mesh().size > 1)
    return (0.0, {}), model | {"small": model["small"] * wrong + 0 * batch["targets"].sum()}

  batch = {"targets": np.ones((4, 8), np.int32)}
  rows = chunked.compared(gradient, model, {1: batch, 2: batch}, 1)
  assert rows["1"]["difference"] == 0
  np.testing.assert_allclose(rows["2"]["difference"], 0.1, rtol=1e-5)


def test_every_scale_has_batches_that_its_devices_can_share_evenly():
  for scale in ("test", "cpu", "gpu"):
    config = config_file.get_config(scale)
    c = config.chunked
    plan = chunkflow.pack(speed.lengths(c.chunkflow.batch, c.chunkflow.longest, c.chunkflow.seed), c.chunkflow.chunk)
    cost = chunked.operations(qwen3(**c.shape.to_dict(), context=c.chunkflow.longest), c.dtype)
    for devices, masked in itertools.product((n for n in config.devices if n <= 4), (True, False)):
      assert 1 <= chunked.balance(plan, devices, c.chunkflow.keep, cost._replace(masked=masked)) < 1.05


def test_the_cost_model_finds_the_times_it_was_made_from():
  spec = config_file.get_config("gpu").suffix
  true = dict(floor=0.2, tensor_floor=0.3, layer=0.008, message=0.02)
  layer, message = true["layer"], true["message"]
  times = {"sequential": 1.0}
  for n in (1, 2):
    times[f"tensor {n}"] = true["tensor_floor"] + 32 / n * layer + 64 * message * (n > 1)
    times |= {f"layer {n} K{k}": true["floor"] + k * (24 / n * layer + message * (n > 1)) for k in (1, 2)}
  fit = suffix.fit({"milliseconds": {name: {"median": t} for name, t in times.items()}}, spec)
  np.testing.assert_allclose([fit[name] for name in true], list(true.values()))
  assert fit["worst"] < 1e-9


def test_one_device_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  with pytest.raises(InputError, match="one device cannot be split"):
    experiment.measure(config_file.get_config("test"), tmp_path, tmp_path, Console(quiet=True))
