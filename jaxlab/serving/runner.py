"""The engine in a thread of its own: others hand requests in and are called with what comes of them."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from jaxlab.core.checks import InputError
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Event, Request, Served

_log = logging.getLogger(__name__)


class Full(Exception):
  """As many requests wait as may."""


class Stopped(Exception):
  """The engine has failed, or takes nothing new; says which."""


class Runner:
  """Runs an engine; all of its methods may be called from any thread.

  Args:
    queue_length: requests that may wait beside those that run.
    ended: called in the engine's thread with what ended, for metrics.
  """

  def __init__(self, engine: Engine, *, queue_length: int = 256, ended: Callable[[Served], None] = lambda served: None):
    self.engine, self.queue_length, self._ended = engine, queue_length, ended
    self._commands: queue.SimpleQueue = queue.SimpleQueue()
    self._receivers: dict[str, Callable[[Event], None]] = {}
    self._lock = threading.Lock()
    self._open = 0  # requests handed in that have not ended
    self._closing = False
    self.failed: str | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  @property
  def capacity(self) -> int:
    """Requests that may be open at once."""
    return self.engine.rows + self.queue_length

  def submit(self, request: Request, receive: Callable[[Event], None]) -> None:
    """Hands a request in; `receive` is called in the engine's thread with every event, the last one with its finish.

    Raises:
      Full: too many wait. Stopped: the engine serves nobody any more.
    """
    with self._lock:
      if self.failed or self._closing:
        raise Stopped(self.failed or "the server is shutting down; ask another one")
      if self._open >= self.capacity:
        raise Full
      self._open += 1
    self._commands.put(lambda: self._add(request, receive))

  def abort(self, id: str, finish: str = "abort") -> None:
    """Ends a request without a further event; its pages are free before the next step."""
    self._commands.put(lambda: self._abort(id, finish))

  def begin_close(self, seconds: float) -> None:
    """Takes nothing new, lets what runs go on for so long, and then ends the rest with an error; returns at once."""
    with self._lock:
      self._closing = True
    timer = threading.Timer(seconds, self._commands.put, (lambda: self._fail("the server is shutting down"),))
    timer.daemon = True
    timer.start()

  def close(self, seconds: float = 0.0) -> None:
    """`begin_close`, and the thread ended."""
    with self._lock:
      self._closing = True
    end = time.monotonic() + seconds
    while self._open and time.monotonic() < end and self._thread.is_alive():
      time.sleep(0.02)
    self._commands.put(lambda: self._fail("the server is shutting down"))
    self._commands.put(None)
    self._thread.join()

  @property
  def open(self) -> int:
    """Requests that have not ended."""
    return self._open

  def _run(self) -> None:
    while True:
      while not (self.engine.busy and self._commands.empty()):
        command = self._commands.get()
        if command is None:
          return
        command()
        self._report()
      try:
        for event in self.engine.step():
          self._tell(event)
      except Exception as error:  # whatever it is, nobody must wait for ever
        _log.exception("a step failed")
        self.failed = f"the engine stopped: {type(error).__name__}"
        self._fail(self.failed)
      self._report()

  def _report(self) -> None:
    for served in self.engine.take_ended():
      self._ended(served)

  def _add(self, request: Request, receive) -> None:
    try:
      if self.failed:  # it was handed in before anybody knew
        raise InputError(self.failed)
      self.engine.add(request)
    except InputError as error:
      self._close_one()
      receive(Event(request.id, None, None, None, f"error: {error}"))
      return
    self._receivers[request.id] = receive

  def _abort(self, id: str, finish: str = "abort") -> None:
    if self._receivers.pop(id, None) is not None:
      self.engine.abort(id, finish)
      self._close_one()

  def _tell(self, event: Event) -> None:
    receive = self._receivers[event.id]
    if event.finish:
      del self._receivers[event.id]
      self._close_one()
    receive(event)

  def _fail(self, why: str) -> None:
    for id, receive in list(self._receivers.items()):
      self._abort(id)
      receive(Event(id, None, None, None, f"error: {why}"))

  def _close_one(self) -> None:
    with self._lock:
      self._open -= 1
