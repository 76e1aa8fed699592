import threading
import time

import jax
import pytest
import uvicorn

from jaxlab.models import inference
from jaxlab.models.config import qwen3
from jaxlab.models.vocabulary import Vocabulary, load_vocabulary
from jaxlab.serving.engine import Engine
from jaxlab.serving.runner import Runner
from jaxlab.serving.server import Metrics, app
from tests.common import SHAPE, random_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


class Running:
  """A server in this process, and what is in it."""

  def __init__(self, network, vocabulary, *, queue_length=64, token=None, timeout=60.0, **options):
    self.network, self.vocabulary = network, vocabulary
    engine = Engine(network, **dict(pages=80, page=8, rows=4, budget=32, chunks=2, steps=4, length=128) | options)
    metrics = Metrics()
    self.runner = Runner(engine, queue_length=queue_length, ended=metrics.ended)
    served = app(self.runner, vocabulary, "tiny", metrics=metrics, token=token, timeout=timeout)
    config = uvicorn.Config(served, port=0, log_level="error", timeout_keep_alive=75)
    socket = config.bind_socket()
    self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    self._server = uvicorn.Server(config)
    self._thread = threading.Thread(target=self._server.run, args=([socket],), daemon=True)
    self._thread.start()
    until(lambda: self._server.started)

  def idle(self) -> bool:
    engine = self.runner.engine
    return self.runner.open == 0 and not engine.busy and engine.pages.held == 0

  def close(self):
    self._server.should_exit = True
    self._thread.join(20)
    self.runner.close()


def until(condition, seconds: float = 60):
  """Waits for something that happens in another thread."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.01)


@pytest.fixture(scope="session")
def network():
  return jax.jit(inference.take_apart)(random_model(qwen3(**SHAPE | dict(depth=2, vocab_size=8192), context=512)))


@pytest.fixture(scope="session")
def vocabulary():
  base = load_vocabulary("base")
  return Vocabulary(base.tokenizer, base.bos, (7,), TEMPLATE)


@pytest.fixture(scope="session")
def running(network, vocabulary):
  server = Running(network, vocabulary)
  yield server
  server.close()
