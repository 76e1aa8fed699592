"""Every command of the README and every block of Python in it runs."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.common import ENVIRONMENT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
SHELL = [
  line.split("  #")[0].split("    #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()
]


def test_every_shell_line_is_of_a_kind_that_is_checked():
  assert any("configs/base.py" in line for line in SHELL) and any("configs/snlp.py" in line for line in SHELL)
  pip = ("pip install -e ", "pip install --no-deps ")
  # The server is started by tests/serving/test_smollm2.py.
  python = ("python -m experiments.run ", "python -m jaxlab.serving ")
  assert all(line.startswith(("make ", "git clone ", *pip, *python)) for line in SHELL)


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python -m experiments.run")])
def test_experiment_commands_run(line, tmp_path):
  """At test scale, into another folder; in an interpreter of its own, which has imported nothing."""
  words = shlex.split(line.replace(":cpu", ":test"))
  words = [f"--workdir={tmp_path}" if word.startswith("--workdir") else word for word in words]
  done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "results.json").read_text())["claims"] and "holds" in done.stdout


def test_make_targets_and_extras_exist():
  makefile = (ROOT / "Makefile").read_text()
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  for line in SHELL:
    if line.startswith("make "):
      assert re.search(rf"^{line.split()[1]}:", makefile, re.M), line
    for name in re.findall(r"\[(\w+)\]", line):
      assert name in extras


@pytest.mark.smollm2
def test_the_first_example_prints_what_it_says(capsys):
  (_, block), (_, printed) = [(kind, block) for kind, block in BLOCKS if kind in ("python", "text")][:2]
  assert '"smollm2"' in block
  exec(block, {})
  assert capsys.readouterr().out == printed


def test_python_blocks_run():
  scope = {}
  for kind, block in BLOCKS:
    if kind == "python" and "smollm2" not in block:
      exec(block, scope)
  assert scope["output"].shape == (64,)


def test_files_the_readme_points_to_exist():
  for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
    assert (ROOT / target).exists(), target
