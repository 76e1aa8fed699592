"""TNT's experiment: rivals of equal size, recall tasks, and a run of which every part is measured once."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from configs import tnt as config_file
from experiments import results, timing, tnt
from experiments.tnt import arms, recall, speed, windowed
from jaxlab.core import mesh as meshes
from jaxlab.sequence.tnt import MemoryConfig, MemoryLayer
from tests.common import run_and_continue

TRAINED = (arms.TNT, "Transformer")


def test_everything_is_measured_once(tmp_path, monkeypatch):
  """Two arms are measured, Titans' steps are timed, on one device; the others are said to be like these: each would be
  compiled for itself."""
  make_mesh = meshes.make_mesh
  monkeypatch.setattr(meshes, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))
  config = config_file.get_config("test")
  config.data.path, config.data.name = "docs/**/*.md", "local_text"
  config.chunks.local, config.chunks.small, config.eval.chunks = (4,), (1,), (1, 4)
  config.chunks.inner.tnt = 2.0  # so that losses, whatever the documents say, differ by more than rounding
  real, train = (arms.Lab.measured, arms.Lab.at_rate), arms.Lab.train
  like, factors = lambda name: name if name in TRAINED else arms.TNT, {}

  def train_some(lab, model, folder, **how):
    factors[folder.split(" 0.")[0]] = how.get("factor")
    return train(lab, model, folder, **how) if folder.startswith((*TRAINED, "stage 2")) else model

  known = {}

  def once(kind, lab, name, *given):
    if (kind, like(name)) not in known:
      known[kind, like(name)] = real[kind](lab, like(name), *given)
    return known[kind, like(name)]

  monkeypatch.setattr(arms.Lab, "measured", lambda lab, *given: once(0, lab, *given))
  monkeypatch.setattr(arms.Lab, "at_rate", lambda lab, *given: once(1, lab, *given))
  monkeypatch.setattr(arms.Lab, "train", train_some)
  one = functools.cache(lambda name: recalled(config, name))
  recalled, each = recall.measure, (recall.LINEAR + recall.PROJECTED, recall.TRANSFORMER)
  monkeypatch.setattr(recall, "measure", lambda config, name: one(name if name in each else each[0]))
  timed = functools.cache(functools.partial(speed.step, config))
  monkeypatch.setattr(speed, "step", lambda _, name, words, rows, length: timed(arms.TITANS, words, 16, 32))
  parts = ("arms.Lab.measured", "arms.Lab.at_rate", "stages.measure", "speed.measure", "recall.measure")
  report = run_and_continue("tnt", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 12 and set(report.metrics["arms"]) == set(arms.ARMS)
  row = report.metrics["stages"]
  assert row["untuned"] != row["old"] and row[tnt.TUNED]["loss"] != row["untuned"]
  moves = lambda name: [factors[name](f"blocks.mixer.{part}.bias") for part in ("global_memory", "local_memories.0")]
  assert moves(tnt.TUNED) == [0, 1] and moves(tnt.WHOLE) == [1, 1]
  assert row["curves"]["stage 1"]["1"] == row["untuned"]  # local chunks of 1 are those of stage 2
  found = report.metrics["speed"]["milliseconds"]
  assert set(found) == set(speed.NAMES) and set(found[arms.TNT]) == {"32", "64"}


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_networks_that_are_compared_have_as_many_parameters(scale):
  """Within the SwiGLUs' steps of 8 neurons, and none has so few that it is another network."""
  config = config_file.get_config(scale)
  vocabulary = config.data.vocab_size
  shapes = {name: arms.shape_of(config, name, vocabulary) for name in (*arms.ARMS, *arms.ABLATIONS)}
  sizes = {name: arms.parameters(shape) for name, shape in shapes.items()}
  assert max(sizes.values()) < 1.01 * sizes[arms.TNT] and min(sizes.values()) > 0.99 * sizes[arms.TNT]
  assert all(arms.shape_of(config, name, vocabulary) == shape for name, shape in shapes.items())
  narrow = lambda shape: getattr(shape, "mlp_width", None) or shape.mlp_widths[0]
  assert min(map(narrow, shapes.values())) > 0.3 * config.model.mlp_width


def test_arms_differ_from_the_method_in_what_they_are_called_after():
  config = config_file.get_config("cpu")
  ours, c = arms.memory_of(config, arms.TNT), config.chunks
  of = lambda name: arms.memory_of(config, name)
  assert of("without resets").shard is None and of("without projection").projection is None
  assert of("without global memory").global_chunk is None and of(arms.SMALL).local_chunks == tuple(c.small)
  assert of("1 local memory").local_chunks == ours.local_chunks[:1]
  assert of("4 local memories").local_chunks == (4, 8, 16, 32) and of("3 local memories").local_chunks == (4, 8, 16)
  assert (
    of(arms.COARSE).local_step == pytest.approx(c.inner.titans / 2) and of(arms.TITANS).local_step == c.inner.titans
  )
  plain = of(arms.PLAIN)
  assert (plain.momentum, plain.decay) == (ours.momentum, ours.decay) == (False, False) and plain.shard is None
  assert of("TTT-Linear").layers == 1 and of("TTT-MLP").layers == 2
  assert arms.shape_of(config, "Transformer, sliding window", 300).windows == (c.window - 1,)
  assert of(arms.WINDOWED) == dataclasses.replace(ours, local_chunks=(), shard=None)
  assert arms.shape_of(config, arms.WINDOWED, 300).window == c.window
  with pytest.raises(ValueError, match="no arm is called 'RWKV'"):
    of("RWKV")


def test_attention_in_a_window_is_beside_the_global_memory():
  """A softmax over the last three tokens by the definition; angles are those of complex numbers."""
  config = MemoryConfig(12, heads=2, head_dim=4, global_chunk=4, local_chunks=(), shard=None)
  layer = jax.jit(lambda: windowed.WindowedLayer(config, jax.random.key(0), window=3))()
  layer.log_gain = layer.log_gain + np.array([0.5, -0.5], np.float32)
  random = np.random.default_rng(0)
  x, (q, k, v) = random.normal(size=(1, 8, 12)).astype(np.float32), random.normal(size=(3, 1, 8, 2, 4))
  q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
  run = jax.jit(lambda kind, *given: kind.recall(layer, *given, ())[0], static_argnums=0)
  said = np.subtract(*(np.asarray(run(kind, x, q, k, v)) for kind in (windowed.WindowedLayer, MemoryLayer)))
  turn = lambda a, t: (a[:2] + 1j * a[2:]) * np.exp(1j * t * np.array([1.0, 0.01]))
  for t, head in itertools.product((0, 1, 5, 7), range(2)):
    seen = range(max(t - 2, 0), t + 1)
    cosines = [(turn(q[0, t, head], t) * turn(k[0, s, head], s).conj()).sum().real for s in seen]
    shares = np.exp(2.0 * np.exp([0.5, -0.5][head]) * np.array(cosines))
    expected = shares @ v[0, list(seen), head] / shares.sum()
    np.testing.assert_allclose(said[0, t, head], expected, rtol=1e-4, atol=1e-5)


def test_what_is_asked_for_was_written_and_a_right_answer_is_one():
  made = jax.jit(lambda: recall.batch(5, 3, jax.random.key(0)))()
  inputs, targets = (np.asarray(made[name]) for name in ("inputs", "targets"))
  for row, answers in zip(inputs, targets, strict=True):
    pairs = dict(zip(row[:10:2].tolist(), row[1:10:2].tolist(), strict=True))
    assert len(pairs) == 5 and max(pairs) < 10 <= min(pairs.values())
    assert [pairs[key] for key in row[10:].tolist()] == answers[10:].tolist() and (answers[:10] == -1).all()

  class Knows:
    config = type("config", (), {"vocab_size": 20})

    def hidden(self, tokens):
      return targets, None

    def logits(self, hidden, _=None):
      return 50.0 * jax.nn.one_hot(hidden, 20)

  loss, right = jax.jit(lambda made: recall.judged(Knows(), made))(made)
  assert right == 1 and loss < 1e-3


def test_titans_and_tnt_are_timed_in_chunks_of_their_own(monkeypatch):
  """The memory of a contestant has the chunk that it is called after; speeds compare the same chunk."""
  config, seen = config_file.get_config("test"), []
  config.speed.more.titans, config.speed.more.tnt, config.speed.large = (4, 16), (4,), 16
  config.train.length = 32  # so that steps as they are trained have other numbers of tokens

  def step(config, arm, vocabulary, rows, length):
    memory = None if arm == arms.SMALL else arms.memory_of(config, arm)
    seen.append((arm, memory and memory.local_chunks, rows * length))
    return lambda: None

  seconds = {name: np.array([float(n + 1)]) for n, name in enumerate(speed.contestants(config))}
  monkeypatch.setattr(speed, "step", step)
  compare = lambda steps, **how: timing.Times({name: seconds.get(name, np.ones(1)) for name in steps})
  monkeypatch.setattr(timing, "compare", compare)
  found = speed.measure(config, 300)
  each = [(arm, chunks) for arm, chunks, tokens in seen if tokens == config.speed.tokens]
  one = [(arms.PLAIN, 8)] + [(arms.TITANS, n) for n in (8, 4, 16)] + [(arms.TNT, n) for n in (8, 16, 4)]
  assert sorted(map(str, each)) == sorted(2 * [str((arm, (n,))) for arm, n in one] + 2 * [str(("Transformer", None))])
  at = {how: seconds[name][0] for name, how in speed.contestants(config).items()}
  assert {int(n): faster for n, (faster, _) in found["same"].items()} == {
    n: at[arms.TITANS, n] / at[arms.TNT, n] for n in (4, 8, 16)
  }
  assert found["plain"][0] == at[arms.PLAIN, 8] / at[arms.TNT, 8] != found["over"][arms.TNT][0]


def test_the_speed_that_is_claimed_is_over_titans_by_the_same_rule():
  """Where that was timed: results of before say what they have."""
  config = config_file.get_config("test")
  rows = {f"{n}": {"median": 3.0} for n in config.speed.lengths}
  found = {"milliseconds": dict.fromkeys(speed.NAMES, rows), "over": {arms.TNT: [4.0, [3.9, 4.1]]}}
  before, *_ = tnt.speed_claims(config, found)
  claim, *_ = tnt.speed_claims(config, found | {"plain": [2.0, [1.9, 2.1]]})
  assert (before.ours, claim.ours) == (4.0, 2.0) and before.baseline == "Titans 3 ms" and "momentum" not in before.note
  assert (
    claim.baseline == "plain Titans 3 ms"
    and "no momentum and no forgetting, as TNT; over Titans with both 4" in claim.note
  )
  assert "2.00x as fast as plain Titans' in" in tnt.finding(config, {"speed": found | {"plain": [2.0, [1.9, 2.1]]}})


def test_a_rows_time_has_the_exponent_of_its_length():
  rows = {f"{n}": {"median": 3.0 * n**0.5} for n in (256, 512, 1024)}  # steps of as many tokens
  assert speed.exponent(rows) == pytest.approx(1.5)
