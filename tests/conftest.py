import ctypes
import gc
import inspect
import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported: the CPU, as eight devices, a compilation cache that outlives the process (of small
# programs too: another worker needs the same ones), and quick compilation: the tests compile a great deal and compute
# next to nothing.
QUICK_COMPILATION = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
  "--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_enable_noalias_metadata=false "
  "--xla_llvm_enable_alias_scope_metadata=false --xla_llvm_enable_invariant_load_metadata=false"
)
if version("jaxlib").startswith("0.10."):  # later ones end a process that sets it
  QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices share what cores there are: on a busy machine one may be late, and the process would be ended.
PATIENCE = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# A loop that holds a collective can run beside what comes after it, and a device that comes to another collective first
# waits for ever: seen in 9 of 9 runs of one training step, in none of 15 with operations that take one thread each.
IN_ORDER = "--xla_cpu_multi_thread_eigen=false"
_CPU = os.environ["JAX_PLATFORMS"] == "cpu"  # else `make test-gpu`: kernels run as they are, by full float32 products
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    *[QUICK_COMPILATION, PATIENCE, IN_ORDER] * _CPU,
    "--xla_force_host_platform_device_count=8",
  ]
)
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "default" if _CPU else "highest")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # an operation's source line is for profiles

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

CHECKED = ("core", "models", "depth", "training")
jaxtyping.install_import_hook([f"jaxlab.{family}" for family in CHECKED], "beartype.beartype")
jaxtyping.config.update("jaxtyping_disable", True)

hypothesis.settings.register_profile("jaxlab", deadline=None, max_examples=8, derandomize=True)
hypothesis.settings.load_profile("jaxlab")

_MAPPINGS = 40_000
_GROWTH = 2e9  # bytes
_released, _counted = [0.0], [0.0]  # resident bytes when caches were last released, and mappings last counted


def pytest_collection_finish():
  """Tracing makes many objects and next to no garbage: looking for some takes a tenth of the time."""
  gc.freeze()
  gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
  """The longest first: a worker whose last test takes half a minute keeps the other waiting."""
  items.sort(key=lambda item: not any(word in item.nodeid for word in ("experiment", "notebook", "killed", "hosts")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  """These families' own tests run with annotations checked, but for those that may hand over wrong types on purpose."""
  checked = item.path.parent.name in CHECKED and "raises(" not in inspect.getsource(item.function)
  jaxtyping.config.update("jaxtyping_disable", not checked)
  return (yield)


@pytest.fixture(autouse=True)
def release_compiled_programs():
  """Compiled programs hold memory mappings, of which Linux gives a process 65,530 (past them compilation crashes), and
  gigabytes of a machine's memory."""
  yield
  if _resident() < _counted[0] + _GROWTH / 8:  # counting tens of thousands of mappings takes a while
    return
  _counted[0] = _resident()
  maps = Path("/proc/self/maps")
  if maps.exists() and (maps.read_text().count("\n") > _MAPPINGS or _counted[0] > _released[0] + _GROWTH):
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed: three quarters of all
    if trim:
      trim(0)
    _released[0] = _counted[0] = _resident()


def _resident() -> float:
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  """Both precisions, one after the other."""
  with jax.enable_x64(request.param == "float64"):
    yield request.param


@pytest.fixture(scope="session")
def smollm2():
  """(SmolLM2-135M-Instruct in float32, its vocabulary); tests that use it carry the mark `smollm2`."""
  from jaxlab.models import hub

  return hub.load("smollm2"), hub.load_vocabulary("smollm2")
