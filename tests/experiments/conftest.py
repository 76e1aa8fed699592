import pytest

from tests.common import save_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A random checkpoint of two layers with text of its own (`save_checkpoint`)."""
  return save_checkpoint(tmp_path_factory.mktemp("tiny"), depth=2)
