"""A server for a checkpoint: python -m jaxlab.serving --model=smollm2 --port=8000

Clients of OpenAI's API find it at http://127.0.0.1:8000/v1. SIGTERM or Ctrl-C: nothing new is taken, what runs may end
within --drain seconds; a second one stops at once.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import sys
from pathlib import Path

import jax

from jaxlab.core.checks import InputError, require, require_choice, require_counts
from jaxlab.core.command import Parser, cache_folder
from jaxlab.core.mesh import make_mesh
from jaxlab.evaluation.methods import cache_method, named
from jaxlab.models import hub, paged
from jaxlab.models.vocabulary import load_vocabulary
from jaxlab.serving.engine import Engine
from jaxlab.serving.policies import POLICIES

try:
  import uvicorn

  from jaxlab.serving.runner import Runner
  from jaxlab.serving.server import Metrics, app
except ImportError as missing:
  sys.exit(f"error: {missing.name} is not installed; pip install 'jaxlab[serve]'")

_PORTS = range(65536)


class _Server(uvicorn.Server):
  """Ends with status 0 when asked to."""

  def __init__(self, config: uvicorn.Config, drain):
    super().__init__(config)
    self._drain = drain

  @contextlib.contextmanager
  def capture_signals(self):
    before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def handle_exit(self, sig, frame) -> None:
    if self.should_exit:
      os._exit(1)
    self.should_exit = True
    self._drain()


def main(arguments: list[str] | None = None) -> int:
  """Serves until it is told to stop. Returns the exit status."""
  try:
    _serve(_parse(arguments))
    return 0
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = Parser("python -m jaxlab.serving", description=__doc__.partition("\n\n")[2], allow_abbrev=False)
  add = parser.add_argument
  add("--model", default="smollm2", help='"smollm2", "base", a folder, a .gguf file, or owner/name (%(default)s)')
  add("--host", default="127.0.0.1", help="0.0.0.0 lets others in (%(default)s)")
  add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
  add("--dtype", choices=("float32", "bfloat16"), help="of the parameters (bfloat16; on a CPU float32)")
  add(
    "--cache-gb",
    type=float,
    help="memory of a device's keys and values (half of what a GPU has free; on a CPU 0.5)",
  )
  add("--page", type=int, default=32, help="tokens of a page (%(default)s)")
  add("--tensor", type=int, default=1, help="devices that share the heads and neurons of every layer (%(default)s)")
  add("--rows", type=int, default=32, help="sequences that run at once (%(default)s)")
  add("--budget", type=int, help="tokens of a step, more than --rows (256, or twice --rows where that is more)")
  add("--length", type=int, help="tokens of a request, prompt and answer (the model's context)")
  add("--method", metavar="NAME,OPTION=VALUE,...", help="make caches smaller by a method: chelsea,keep=0.25,chunk=64")
  add("--queue", type=int, default=256, help="sequences that may wait (%(default)s)")
  add("--policy", default="sarathi", help=f"{', '.join(POLICIES)} (%(default)s)")
  add("--timeout", type=float, default=600, help="seconds that a request may take (%(default)s)")
  add("--drain", type=float, default=30, help="seconds that requests may go on after SIGTERM (%(default)s)")
  warm = "compile all programs before the first request, which takes minutes on a CPU (there only where asked for)"
  add("--warm-up", action=argparse.BooleanOptionalAction, help=warm)
  return parser.parse_args(arguments)


def _serve(options: argparse.Namespace) -> None:
  cache_folder()
  require(options.port in _PORTS, f"--port is {options.port}; it must lie in 0 .. 65535")
  require(options.timeout > 0 and options.drain >= 0, "--timeout must be positive, and --drain not negative")
  require_choice("--policy", options.policy, POLICIES)
  require_counts(**{"--page": options.page, "--rows": options.rows})
  budget = max(256, 2 * options.rows) if options.budget is None else options.budget
  require(
    budget > options.rows, f"--budget is {budget}; it must be above --rows, {options.rows}: steps read prompts too"
  )
  require(
    1 <= options.tensor <= jax.device_count(), f"--tensor is {options.tensor}; there are {jax.device_count()} devices"
  )
  require(options.queue >= 0, f"--queue is {options.queue}; it must be at least 0")
  method = paged.DENSE if options.method is None else _method(options.method)
  listening = _listen(options.host, options.port)  # before minutes of loading and compiling
  vocabulary = load_vocabulary(options.model)
  dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  model = hub.load(options.model, dtype=dtype)
  engine = Engine(
    model,
    pages=_pages(model, options, sized=method is not paged.DENSE),
    page=options.page,
    length=options.length,
    rows=options.rows,
    budget=budget,
    policy=options.policy,
    method=method,
    salt=f"{options.model}, {dtype}",
    mesh=make_mesh({"tensor": options.tensor}, jax.devices()[: options.tensor]) if options.tensor > 1 else None,
  )
  if options.warm_up if options.warm_up is not None else jax.default_backend() != "cpu":
    print("compiling", flush=True)
    print(f"{engine.warm_up()} programs", flush=True)
  name = Path(options.model).name
  metrics = Metrics()
  runner = Runner(engine, queue_length=options.queue, ended=metrics.ended)
  token = os.environ.get("JAXLAB_SERVING_TOKEN")
  served = app(runner, vocabulary, name, metrics=metrics, token=token, timeout=options.timeout)
  config = uvicorn.Config(
    served,
    host=options.host,
    port=options.port,
    log_level="warning",
    timeout_graceful_shutdown=max(1, int(options.drain) + 5),
  )
  server = _Server(config, lambda: runner.begin_close(options.drain))
  print(f"serving {name} at http://{options.host}:{listening.getsockname()[1]}/v1", flush=True)
  server.run(sockets=[listening])
  runner.close(0)


def _listen(host: str, port: int) -> socket.socket:
  try:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
  except OSError as error:
    raise InputError(f"cannot listen at {host}:{port}: {error.strerror or error}; take another --port") from None


def _method(text: str) -> paged.Method:
  name, options = named(text)
  return cache_method(name, **options)


def _pages(model, options: argparse.Namespace, *, sized: bool) -> int:
  """How many pages, of entries that have sizes or not, fit into the memory of a device that is given, or that there
  is."""
  c = model.config
  heads = -(-c.kv_heads // options.tensor)
  entry = 2 * c.head_dim * jax.numpy.dtype(model.dtype).itemsize + 4 * sized
  each = model.depth * heads * options.page * entry
  size = None if options.cache_gb is None else options.cache_gb * 1e9
  require(size is None or math.isfinite(size), f"--cache-gb is {options.cache_gb}; it must be a number")
  if size is None:
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    size = free / 2 if free > 0 else 5e8
  require(size >= 2 * each, f"--cache-gb has no room for two pages of {each} bytes; raise it")
  return int(size // each)


if __name__ == "__main__":
  sys.exit(main())
