"""The rules that keep the tree small and alike, as 48 papers come in."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from configs.scales import SCALES, picker
from experiments import report, results
from jaxlab.core.checks import InputError

ROOT = Path(__file__).parents[1]
TRACKED = [
  Path(name)
  for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
    "\n"
  )
  if name and (ROOT / name).is_file()
]
PAPERS = sorted(f.stem for f in TRACKED if f.parent == Path("configs") and f.stem not in ("__init__", "scales"))
OPEN = {"contexts"}  # not yet measured on a GPU; README's table says so
RUNS = {f"{run['paper']}.{report.name_of(run)}": run for run in report.load()}
# Larger means less work, or none, for these.
INVERSE = ("rate", "checkpoint_every", "lengthscale", "share", "ridge", "ratio")


@pytest.mark.parametrize("paper", PAPERS)
def test_a_config_says_what_it_is_and_in_few_lines(paper):
  module = importlib.import_module(f"configs.{paper}")
  assert len(module.__doc__.splitlines()) <= 25 and f"configs/{paper}.py" in module.__doc__
  assert module.ABOUT.family in report.FAMILIES and module.ABOUT.link
  # The folder may be on the path: `compression` is a module of Python 3.14, which jax asks for.
  assert paper not in {*sys.stdlib_module_names, "compression"}
  for scale in SCALES:
    assert module.get_config(scale).scale == scale and module.get_config(scale).paper == paper
  with pytest.raises(InputError, match=r"config\.scale is 'huge'"):
    module.get_config("huge")


@pytest.mark.parametrize("paper", PAPERS)
def test_the_papers_own_scale_is_no_smaller_than_gpu(paper):
  make = importlib.import_module(f"configs.{paper}").get_config
  gpu, own = (dict(_leaves(make(scale).to_dict())) for scale in ("gpu", "paper"))
  for name in gpu.keys() & own.keys():
    if not name.split(".")[-1].endswith(INVERSE) and ".rate." not in name:
      assert _size(own[name]) >= _size(gpu[name]), name


def _leaves(tree: dict, prefix: str = ""):
  for name, value in tree.items():
    yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def _size(value):
  """A number, or the largest of a sweep; 0 of anything else."""
  if isinstance(value, tuple | list):
    return max(map(_size, value), default=0)
  return value if isinstance(value, int | float) else 0


def test_a_scale_falls_back_but_never_past_a_given_one():
  assert picker("paper")(test=1, cpu=2, gpu=3) == 3 and picker("gpu")(cpu=2, paper=4) == 2
  assert picker("test")(cpu=2, gpu=3) == 2
  with pytest.raises(InputError, match="no value for scale cpu"):
    picker("cpu")(gpu=3)
  with pytest.raises(InputError, match="a scale is 'h100'"):
    picker("cpu")(cpu=1, h100=2)


@pytest.mark.parametrize("paper", PAPERS)
def test_an_experiment_is_one_short_file_or_a_package_of_parts(paper):
  name = importlib.import_module(f"configs.{paper}").get_config("test").experiment
  files = [f for f in TRACKED if f.parent in (Path("experiments") / name, Path("experiments")) and f.suffix == ".py"]
  own = [f for f in files if f.parent.name == name or f.stem == name]
  assert own and all(len((ROOT / f).read_text().splitlines()) <= 350 for f in own)
  assert not {f.stem for f in own} & {"claims", "figures", "cost"}
  module = importlib.import_module(f"experiments.{name}")
  assert all(callable(getattr(module, function)) for function in ("measure", "claims", "finding", "draw"))


def test_the_folders_of_a_paper_carry_its_name():
  for paper in PAPERS:
    assert any(paper in f.stem for f in TRACKED if f.parts[0] == "tests"), f"no test file names {paper}"
    about = importlib.import_module(f"configs.{paper}").ABOUT
    assert about.family == "foundation" or Path(f"docs/methods/{paper}.md") in TRACKED


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_committed_result_is_small_and_what_its_metrics_say(run):
  """Claims and finding follow from the metrics beside them: no number was typed."""
  folder = report.RESULTS / run["paper"]
  name = report.name_of(run)
  assert (folder / f"{name}.json").stat().st_size <= report.JSON_BYTES
  assert sum(f.stat().st_size for f in folder.glob("*.png")) <= report.FIGURE_BYTES
  assert {f.name for f in folder.glob(f"{name}.*.png")} == set(run["figures"]) and run["figures"]
  assert report.evaluated(run) == run and len(run["claims"]) <= results.MOST_CLAIMS


def test_every_paper_has_results_at_cpu_and_gpu():
  done = {(run["paper"], run["scale"]) for run in RUNS.values()}
  for paper in PAPERS:
    assert (paper, "cpu") in done and ((paper, "gpu") in done) != (paper in OPEN)


def test_the_tree_stays_small():
  """All 48 papers fit into 60 MB: what each may add is limited above."""
  assert sum((ROOT / f).stat().st_size for f in TRACKED) < 60e6
  assert not [f for f in TRACKED if f.parts[0] != "checkpoints" and (ROOT / f).stat().st_size > 1e6]


ORDER = ("core", "data", "models", "training", "evaluation")  # below the families; `kernels` beside them
FAMILIES = [f for f in report.FAMILIES if (ROOT / "jaxlab" / f).is_dir()]


def test_dependencies_point_one_way():
  """core <- models, kernels <- families; a family never imports another; nothing in the library imports the rest."""
  for file in TRACKED:
    if file.parts[0] not in ("jaxlab", "kernels") or file.suffix != ".py":
      continue
    mine = file.parts[1] if file.parts[0] == "jaxlab" else "kernels"
    for name in _imports(file):
      top, *rest = name.split(".")
      assert top not in ("kernels", "experiments", "configs", "tests"), f"{file} imports {name}"
      if top == "jaxlab" and rest and rest[0] in FAMILIES:
        assert mine == rest[0] or mine not in (*FAMILIES, *ORDER[:4], "kernels"), f"{file} imports {name}"
      if mine == "core":
        assert not (top == "jaxlab" and rest and rest[0] != "core"), f"{file} imports {name}"


def _imports(file: Path):
  for node in ast.walk(ast.parse((ROOT / file).read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
