"""What `pip install` puts into site-packages: the package jaxlab with its kernels, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.common import ENVIRONMENT

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder as `pip install` would leave it, from a wheel of this tree."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"  # a build inside the tree would find what earlier builds left there
  for name in ("jaxlab", "kernels"):
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, str(source)]
  subprocess.run(build, check=True, capture_output=True, cwd=folder)
  (wheel,) = folder.glob("*.whl")
  site = folder / "site"
  zipfile.ZipFile(wheel).extractall(site)
  return site


def python(code: str, site: Path):
  environment = ENVIRONMENT | {"PYTHONPATH": str(site)}
  return subprocess.run([sys.executable, "-c", code], cwd=site.parent, env=environment, capture_output=True, text=True)


def test_only_jaxlab_is_installed_and_all_of_it(installed):
  assert [p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")] == ["jaxlab"]
  here = {p.relative_to(ROOT / "jaxlab") for p in (ROOT / "jaxlab").rglob("*.py")}
  here |= {Path("kernels") / p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py")}
  assert {p.relative_to(installed / "jaxlab") for p in (installed / "jaxlab").rglob("*.py")} == here
  assert (installed / "jaxlab" / "py.typed").exists()


def test_other_peoples_kernels_are_left_alone(installed):
  """transformers imports a package `kernels` where there is one; ours must not stand in its place."""
  (installed / "kernels").mkdir(exist_ok=True)
  (installed / "kernels" / "__init__.py").write_text("THEIRS = True")
  code = "import kernels, jaxlab.kernels.decode_attention as ours; assert kernels.THEIRS; print(ours.__file__)"
  done = python(code, installed)
  assert done.returncode == 0, done.stderr
  assert Path(done.stdout.strip()).is_relative_to(installed / "jaxlab")


def test_importing_jaxlab_imports_nothing_heavy(installed):
  done = python("import sys, jaxlab; print(sorted(m for m in ('jax', 'numpy', 'flax') if m in sys.modules))", installed)
  assert done.stdout.strip() == "[]", done.stderr


def test_the_base_model_is_found_or_its_place_is_named(installed):
  done = python("from jaxlab.models import hub\ntry: hub.load('base')\nexcept ValueError as e: print(e)", installed)
  assert "base" in done.stdout and "clone" in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr
