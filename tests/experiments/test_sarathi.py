import pytest

from configs import sarathi as config_file
from experiments import sarathi as experiment
from experiments.sarathi.profile import marginal, points
from experiments.sarathi.serve import at_balance, balance, gains, part_of
from tests.common import run_and_continue


def test_everything_is_measured_once(tmp_path, monkeypatch):
  report = run_and_continue("sarathi", tmp_path, monkeypatch, "profile", "throughput", "budgets", "online", "bubbles")
  (found,) = report.metrics.values()
  config = config_file.get_config("test")
  policies = config.throughput.policies
  assert [row["policy"] for row in found["throughput"]] == list(policies)
  assert all(row["rate"] > 0 and 0 <= row["padding"] < 1 for row in found["throughput"])
  assert len(report.claims) == 11 and found["budgets"]["chosen"] in config.throughput.budgets
  assert {row["policy"] for row in found["online"]} == set(config.online.policies)
  assert found["bubbles"]["orca"]["makespan"] > 0


def rows(**rates):
  return [dict(length=9, ratio=r, policy=name, rate=v) for name, of in rates.items() for r, v in of.items()]


def test_figures_follow_from_what_was_timed():
  config = config_file.get_config("cpu")
  assert balance(config) == pytest.approx(64 / 7)
  found = dict(throughput=rows(sarathi={3: 10, 10: 30, 30: 20}, orca={3: 10, 10: 24, 30: 25}))
  gained = gains(found, "orca")
  assert gained == {(9, 3): 1.0, (9, 10): 1.25, (9, 30): 0.8}
  assert at_balance(config, gained) == 1.25
  gpu = config_file.get_config("gpu")
  assert part_of(gpu, gpu.engine.budget) == 124 and part_of(config, 72) == 64 and balance(gpu) == 32
  assert all((point.decode + point.chunk) % 128 == 0 for point in points(gpu)["mixed"])  # whole tiles
  chosen = experiment.chosen_claim([dict(rate={"256": 10.0, "512": 9.0}, chosen=c) for c in (256, 512)])
  assert chosen.ours == 0.9 and not chosen.holds
  step = lambda decode, chunk, seconds: dict(decode=decode, chunk=chunk, context=5, seconds=seconds)
  timed = dict(decode=[step(4, 0, 2.0)], prefill=[step(0, 8, 3.0)], mixed=[step(4, 8, 3.5)])
  assert marginal(timed) == [dict(decode=4, chunk=8, context=5, ratio=0.25)]


def test_a_model_of_ones_own_alone(tmp_path, tiny_checkpoint):
  config = config_file.get_config("test")
  config.model = f"hf:{tiny_checkpoint}"
  assert experiment.subject_names(config) == [tiny_checkpoint.name]
  network = experiment._network(config, config.model)
  assert network.model.config.vocab_size
