"""The throughput experiment measures what it says, at scale test."""

import numpy as np

from configs import throughput as config_file
from experiments import results
from experiments import throughput as experiment
from experiments.console import Console


def test_every_figure_is_measured_and_claims_follow_from_them(tmp_path):
  config = config_file.get_config("test")
  config.training.tiny.batch = 16  # eight devices, two microbatches
  report = results.evaluate(experiment, config, tmp_path, tmp_path, Console(quiet=True))
  m = report.metrics
  tiny = m["training"]["tiny"]
  np.testing.assert_allclose(tiny["tokens_per_second"] * tiny["step_seconds"], 16 * 64)  # batch times length
  assert 5 < tiny["loss"] < 7 and tiny["mfu"] == 0.0  # near log(512); a CPU has no known peak
  assert set(m["forward"]) == {"T16", "T64"} and m["torch"] == {}
  for kinds in m["forward"].values():
    for kind in ("scan", "unrolled"):
      assert all(kinds[kind][way]["median"] > 0 for way in experiment.WAYS)
  decode = m["decode"]["tiny"]
  assert decode["finite"] and decode["floor_ms"] > 0
  decoding = m["decoding"]
  assert decoding["equal"] == {"generate": 12, "stream": 12} and all(rate > 0 for rate in decoding["rates"].values())
  (floor,) = report.claims
  np.testing.assert_allclose(floor.ours, decode["milliseconds"]["median"] / decode["floor_ms"])
  served, large = m["serving"]["served"], m["serving"]["large"]
  assert set(served) == {"1", "2"} and all(row["rates"]["engine"] > 0 for row in served.values())
  np.testing.assert_allclose(large["host"]["share"], 1 - large["decode"]["seconds"] / large["host"]["seconds"])
  assert all(row["seconds"] > 0 for row in large.values())  # no NaN of a step that was never made
  assert large["decode"]["share"] > 0 and large["read"]["share"] is None  # a CPU has no known peak
  assert (tmp_path / "forward.png").read_bytes().startswith(b"\x89PNG")
