import numpy as np
import pytest

from configs import compositions as config_file
from experiments import compositions, compressing, results
from experiments.compositions import chains
from experiments.compositions.solved import solved_perplexity
from jaxlab.core.checks import InputError
from tests.common import run_and_continue


@pytest.fixture
def config(two_layers):
  made = config_file.get_config("test")
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  made.subjects = (f"hf:{two_layers}",)
  return made


def test_chains_are_measured_once_and_begin_alike(config, two_layers, tmp_path, monkeypatch):
  config.chains.others = (
    *("gptq 4", "rtn 4", "awq 4", "wanda 0.5", "icbs 0.5", "bitstack 2"),
    "lord 0.7",
    "even 0.6",
    "struprune 0.75 + lord 0.7",
    "lord 0.7 + gptq 4",
    "even 0.6 + gptq 4",
  )
  report = run_and_continue("compositions", tmp_path, monkeypatch, "Maker", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  rows = report.metrics[two_layers.name]
  of = {row["method"]: row for row in rows}
  assert list(of) == ["dense", *config.chains.others] and of["dense"]["share"] == 1
  for text, row in of.items():
    first, _, _last = text.rpartition(" + ")
    assert not first or row["bytes"] < of.get(first, of["dense"])["bytes"]
  # Two layers: the last one stays, the one before it is solved exactly.
  np.testing.assert_allclose([row["snlp"] for row in rows], [row["perplexity"] for row in rows], rtol=0.02)


def test_one_method_alone_is_read_off_between_its_sizes():
  row = lambda method, size, value: dict(method=method, bytes=size, perplexity=value)
  rows = [row("dense", 16, 2.0), row("gptq 4", 4, 8.0), row("gptq 3", 3, 16.0), row("lord 0.9", 15, 3.0)]
  assert np.isclose(compositions.alone_at(rows, "gptq", 3.5), np.sqrt(8 * 16))
  assert np.isclose(compositions.alone_at(rows, "gptq", 10), 4.0) and compositions.alone_at(rows, "gptq", 2) is None


def test_what_is_no_chain_is_named():
  assert chains.steps_of("lord 0.9 + gptq 4") == (("lord", 0.9), ("gptq", 4.0))
  for text, message in (("lord", "is not of the form"), ("lord 0.9 + zip 3", "zip"), ("", "is not of the form")):
    with pytest.raises(InputError, match=message):
      chains.steps_of(text)


def test_solved_layers_are_those_of_the_model(config, tmp_path):
  """All layers in as many steps as there are: the network itself."""
  (read,) = compressing.subjects(config, tmp_path).values()
  subject = read()
  solved = solved_perplexity(subject, subject.model, dict(layers=2, iterations=2))
  np.testing.assert_allclose(solved, compressing.perplexity(subject, subject.model), rtol=1e-4)
