import pytest

from tests.common import save_checkpoint


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory):
  """A random checkpoint of two layers with text of its own (`save_checkpoint`)."""
  return save_checkpoint(tmp_path_factory.mktemp("two_layers"), depth=2)
