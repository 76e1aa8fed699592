from configs import dhsa as config_file
from tests.common import run_and_continue


def test_everything_is_measured_once(tmp_path, monkeypatch):
  measures = ("predicting.measure", "prefilling.measure", "prefilling.measure_network")
  measures += ("long_context.accuracy", "long_context.losses", "beside.trained")
  config = config_file.get_config("test")
  config.data.path = "docs/*.md"
  report = run_and_continue("dhsa", tmp_path, monkeypatch, *measures, config=config)
  assert set(report.metrics) == {"predictor", "accuracy", "losses", "prefill", "network"} and len(report.figures) == 2
  assert set(report.metrics["prefill"]["96"]["temporaries"]) >= {"dense", "materialised", "DHSA", "static blocks"}
