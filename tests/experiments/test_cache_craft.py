from experiments import cache_craft as experiment
from experiments.cache_craft.trace import Prefixes
from tests.common import run_and_continue


def test_the_experiment_runs_and_goes_on(tmp_path, monkeypatch):
  report = run_and_continue("cache_craft", tmp_path, monkeypatch, "facts", "passages", "trace", "speed")
  assert len(report.claims) == 12 and set(report.figures) == {"facts.png", "passages.png", "trace.png"}
  rows = experiment.rows_of(report.metrics["facts"]["base"])
  assert rows["full prefill"]["lost"] == rows["full prefill"]["kl"] == 0 and rows["as cached"]["share"] == 0
  assert rows["Cache-Craft 0.5"]["share"] < rows["Cache-Craft 2"]["share"] <= 1


def test_caches_of_prefixes_find_what_they_should():
  known = Prefixes(5)
  assert [known.hits(names) for names in ("abc", "abc", "abd", "ba")] == [0, 3, 2, 0]
  assert known.ordered("dab") == tuple("abd") and known.ordered("xy") == ("x", "y")
  assert known.hits("xyzuv") == 0 and known.hits("abc") == 0  # five others are more recent
