"""What a command line gives is checked when it starts, before jax is imported."""

import subprocess
import sys

import ml_collections
import pytest

from experiments import overrides
from jaxlab.core.checks import InputError
from tests.common import ENVIRONMENT

# Importing jax fails in this program.
PROGRAM = "import sys; sys.modules['jax'] = None; from experiments import run; sys.exit(run.main(sys.argv))"


def config(scale: str):
  large = scale == "cpu"
  return ml_collections.ConfigDict(
    dict(
      scale=scale,
      seed=0,
      parts=("speed", "memory") if large else ("speed", "quality"),
      lengths=(8, 16) if large else (8,),
      checkpoints=("base",) if large else (),
      train=dict(steps=2, warmup=3, rate=0.1, recall=0.5, dtype="float32", sampled=False),
      cases=[dict(tokens=16)],
      shapes={f"d{4 + large}": dict(depth=4)},
      mesh=dict(data=-1),
    )
  )


CONFIGS = [config("cpu"), config("test")]


@pytest.mark.parametrize(
  "path, value, message",
  [
    ("train.steps", 0, r"config\.train\.steps is 0; it must be at least 1"),
    ("train.steps", True, "must be of type int"),
    ("train.steps", 2**70, "must fit 64 bits"),
    ("seed", -1, "config.seed is -1; it must not be negative"),
    ("train.rate", float("nan"), "config.train.rate is nan; it must be finite"),
    ("train.rate", float("inf"), "it must be finite"),
    ("train.rate", -0.1, "must not be negative"),
    ("train.recall", 1.5, "a share lies in 0..1"),
    ("train.dtype", "float33", "must be one of float32, bfloat16, float16, float64"),
    ("parts", ("speed", "nothing"), r"config\.parts\[1\] is 'nothing'; it must be one of speed, memory, quality"),
    ("lengths", (1, "x"), r"config\.lengths\[1\] is 'x'; it must be of type int"),
    ("lengths", (1, 0), r"config\.lengths\[1\] is 0; it must be at least 1"),
    ("lengths", (1.5,), "must be of type int"),
    ("lengths", (), "config.lengths is empty"),
    ("checkpoints", (3,), r"config\.checkpoints\[0\] is 3; it must be of type str"),
    ("cases[0].tokens", 0, r"config\.cases\[0\]\.tokens is 0"),
    ("shapes.d5.depth", -1, "must be at least 1"),
    ("scale", "test", "follows from --config"),
  ],
)
def test_what_a_field_cannot_hold_is_refused(path, value, message):
  with pytest.raises(InputError, match=message):
    overrides.check({path: value}, CONFIGS)


@pytest.mark.parametrize(
  "path, value",
  [
    ("train.warmup", 0),
    ("train.rate", 0.0),
    ("train.recall", 1),
    ("train.sampled", True),
    ("train.dtype", "bfloat16"),
    ("seed", 3),
    ("parts", ("quality", "memory")),
    ("lengths", (4, 5, 6)),
    ("checkpoints", ()),
    ("checkpoints", ("hf:a", "base")),
    ("mesh.data", 2),
    ("shapes.d4.depth", 2),
  ],
)
def test_what_a_field_can_hold_passes(path, value):
  overrides.check({path: value}, CONFIGS)


@pytest.mark.parametrize(
  "override, message",
  [
    ("config.parts=('hcnx',)", "config.parts[0] is 'hcnx'; it must be one of quality, speculation"),
    ("config.reg.layers=(1,'x')", "config.reg.layers[1] is 'x'; it must be of type int"),
    ("config.reg.stridez=1", "the config has no field 'stridez'"),
    ("config.train.recall=nan", "config.train.recall is nan"),
  ],
)
def test_a_mistake_is_one_line_and_status_2_before_jax_is_imported(override, message, tmp_path):
  command = [sys.executable, "-c", PROGRAM, "--config=configs/snlp.py:test", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run([*command, f"--{override}"], capture_output=True, text=True, env=ENVIRONMENT)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "run").exists()
