"""The kernels' benches run, and a wrong or a slow kernel fails its claim."""

import jax.numpy as jnp
import pytest

from configs import kernels as config_file
from experiments import kernels as experiment
from jaxlab.kernels import Bench
from tests.common import run_and_continue


def test_kernels_are_right_where_they_cannot_be_timed(tmp_path, monkeypatch):
  report = run_and_continue("kernels", tmp_path, monkeypatch, "measure_case")
  (claim,) = report.claims
  assert claim.holds and set(report.metrics["kernels"]) == set(config_file.get_config("test").kernels)


def test_a_wrong_or_slow_kernel_fails():
  case = lambda difference, **times: {
    "difference": difference,
    "milliseconds": times,
    "floor_ms": 0.1,
  }
  metrics = lambda *cases: {"kernels": {"k": dict(zip("ab", cases, strict=True))}}
  held = lambda *cases: [c.holds for c in experiment.claims(config_file.get_config("gpu"), metrics(*cases))]
  good = case(0.01, triton=1.0, reference=2.0, cudnn=1.5, mosaic_gpu=0.8)
  assert held(good, good) == [True, True]
  assert held(good, case(0.2, triton=1.0, reference=2.0)) == [True, False]
  assert held(good, case(0.0, triton=1.0, reference=2.0, cudnn=0.9)) == [False, True]
  tested = lambda failed: metrics(good, good) | {"suite": {"passed": 9, "failed": failed, "skipped": 1}}
  held = lambda found: experiment.claims(config_file.get_config("gpu"), found)[-1].holds
  assert held(tested(0)) and not held(tested(1))


def test_cudnn_stands_in_for_a_reference_that_does_not_fit():
  plain = lambda by: lambda x, _: (by * x, None)
  bench = Bench({"triton": plain(1.1), "cudnn": plain(1.0)}, (jnp.ones(4),), None, 1)
  assert experiment.measure_case(bench, 2, 1e9)["difference"] == pytest.approx(0.1)


@pytest.mark.slow
def test_the_suite_of_the_kernels_is_counted():
  counts = experiment.suite("cpu")
  assert counts["passed"] > 50 and counts["failed"] == 0
