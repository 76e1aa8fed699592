import pytest

from configs import bitstack as config_file
from experiments import bitstack, results
from experiments.console import Console
from jaxlab.core.checks import InputError
from jaxlab.models import hub, maps
from tests.common import run_and_continue


@pytest.fixture
def config(tiny_checkpoint):
  made = config_file.get_config("test")
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  made.subjects = (f"hf:{tiny_checkpoint}",)
  made.rivals.others, made.orders.others = made.rivals.base, made.orders.base
  return made


def test_everything_is_measured_once(config, tiny_checkpoint, tmp_path, monkeypatch):
  parts = ("quality.frontier", "quality.sizes_of", "quality.ablations")
  report = run_and_continue("bitstack", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 12
  (sizes,), (rows,) = (report.metrics[part].values() for part in ("sizes", "ablations"))
  assert sizes["programs"] == 1 and sizes["same"]
  found = [row["bytes"] for row in sizes["rows"]]
  assert found == sorted(set(found)) and len(found) == 2 * config.steps
  at_two = {row["method"]: row["bytes"] for row in rows if row["budget"] == 2}
  assert set(at_two) == {*("bitstack", "greedy", "random", "unscaled", "folded", "published", "svd", "svd unscaled")}
  assert max(at_two.values()) <= next(
    row["bytes"] for row in report.metrics["frontier"][tiny_checkpoint.name]["rows"] if row["method"] == "rtn"
  )


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_ones_own_model_becomes_a_folder(config, tiny_checkpoint, tmp_path, monkeypatch, budget):
  """Which fills the budget, whatever the number of blocks that other parts take."""
  config.model, config.budget = f"hf:{tiny_checkpoint}", budget
  report = run_and_continue("bitstack", tmp_path, monkeypatch, "quality.within", config=config)
  (found,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  assert {one.kind for one in maps.named(small.blocks).values()} == {"sign_stack"}
  assert maps.bytes_of(small) == found["bytes"]["compressed"] < found["bytes"]["original"]
  blocks = maps.bytes_of(maps.named(hub.load(tiny_checkpoint, dtype="bfloat16").blocks))
  share = 1 - (found["bytes"]["original"] - maps.bytes_of(small)) / blocks
  assert budget - 0.02 < share <= budget


@pytest.mark.parametrize("budget, message", [(1.5, "budget is 1.5"), (0.01, r"one block of every map takes \d+")])
def test_a_budget_that_cannot_be_filled_is_refused_before_anything_is_decomposed(
  config, tiny_checkpoint, tmp_path, monkeypatch, budget, message
):
  config.model, config.budget = f"hf:{tiny_checkpoint}", budget
  monkeypatch.delattr("jaxlab.weights.bitstack.decompose")
  with pytest.raises(InputError, match=message):
    bitstack.measure(config, tmp_path, tmp_path, Console(quiet=True))
