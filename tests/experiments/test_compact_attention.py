from tests.common import run_and_continue


def test_everything_is_measured_once(tmp_path, monkeypatch):
  measures = ("executing.measure", "choosing.measure", "long_context.accuracy", "long_context.losses")
  report = run_and_continue("compact_attention", tmp_path, monkeypatch, *measures)
  assert set(report.metrics) == {"executions", "choices", "accuracy", "losses"} and len(report.figures) == 3
