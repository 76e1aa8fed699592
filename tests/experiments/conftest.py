from pathlib import Path

import pytest

from jaxlab.data import tokenizer
from jaxlab.models import hub
from jaxlab.models.config import qwen3
from tests.common import random_model

ROOT = Path(__file__).parents[2]
SHAPE = dict(width=32, q_heads=4, kv_heads=2, head_dim=16, mlp_width=32, context=512, tied_embeddings=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A random Qwen3 of one layer with a vocabulary of this project's documents: what config.model=hf:DIR takes."""
  return _checkpoint(tmp_path_factory.mktemp("tiny"), depth=1)


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory):
  """As `tiny_checkpoint`, for methods whose second layer reads what the first one chose."""
  return _checkpoint(tmp_path_factory.mktemp("tiny"), depth=2)


def _checkpoint(folder: Path, depth: int) -> Path:
  bpe = tokenizer.train([file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))], 512)
  hub.save(random_model(qwen3(vocab_size=bpe.get_vocab_size(), depth=depth, **SHAPE)), folder)
  (folder / "tokenizer.json").write_text(bpe.to_str())
  return folder
