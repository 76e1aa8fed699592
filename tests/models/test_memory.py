"""Serving-size check: what a checkpoint takes in host memory while it is loaded. By itself (no test framework around):

python -m tests.models.test_memory FOLDER [AXIS=SIZE ...]
"""

import os
import sys
from pathlib import Path

import jax
import pytest

from jaxlab.core.mesh import make_mesh
from jaxlab.models import Transformer, TransformerConfig, hub
from tests.common import start, wait

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama"


def peak() -> int:
  """Largest resident size of this process so far, bytes. Not of `getrusage`: that one remembers the parent's."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(folder: str, *axes: str) -> None:
  mesh = make_mesh({axis: int(size) for axis, size in (text.split("=") for text in axes)}) if axes else None
  hub.load(FIXTURE, mesh=mesh)  # imports, backends
  before = peak()
  model = hub.load(folder, mesh=mesh)
  jax.block_until_ready(jax.tree.leaves(model))
  size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
  print(f"{(peak() - before) / size:.3f} of {size} bytes")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 40])
@pytest.mark.parametrize("axes", [(), ("fsdp=2", "tensor=2")])
def test_loading_takes_little_more_memory_than_the_checkpoint(shards, axes, tmp_path, monkeypatch):
  """1.3 times its bytes; two copies would be 2."""
  config = TransformerConfig(
    vocab_size=16384, depth=16, width=768, q_heads=12, kv_heads=4, head_dim=64, mlp_width=2304, tied_embeddings=True
  )
  model = Transformer(config, jax.random.key(0))
  monkeypatch.setattr(hub, "_SHARD_BYTES", 2**40 if shards == 1 else 2**23)
  hub.save(model, tmp_path)
  assert len(list(tmp_path.glob("*.safetensors"))) >= shards
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
  process = wait(start("tests.models.test_memory", str(tmp_path), *axes, XLA_FLAGS=flags))
  assert process.returncode == 0, process.stderr
  ratio, size = float(process.stdout.split()[0]), int(process.stdout.split()[2])
  assert size > 250e6 and 0.9 < ratio <= 1.3, process.stdout


if __name__ == "__main__":
  main(*sys.argv[1:])
