from pathlib import Path

import pytest

from jaxlab.data import tokenizer
from jaxlab.models import hub
from jaxlab.models.config import qwen3
from tests.common import random_model

ROOT = Path(__file__).parents[2]
SHAPE = dict(depth=2, width=32, q_heads=4, kv_heads=2, head_dim=16, mlp_width=32, context=512, tied_embeddings=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A random Qwen3 of two layers with a vocabulary of this project's documents: what config.model=hf:DIR takes."""
  folder = tmp_path_factory.mktemp("tiny")
  bpe = tokenizer.train([file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))], 512)
  hub.save(random_model(qwen3(vocab_size=bpe.get_vocab_size(), **SHAPE)), folder)
  (folder / "tokenizer.json").write_text(bpe.to_str())
  return folder
