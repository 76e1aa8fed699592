"""Small models and reference code that several test files share."""

import functools
import importlib
import inspect
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.console import Console
from jaxlab.models import (
  HNet,
  HNetConfig,
  LanguageModel,
  LanguageModelConfig,
  Mamba2,
  Mamba2Config,
  Transformer,
  TransformerConfig,
)
from jaxlab.models.config import Experts, HyperConnections, nanochat, qwen3
from tests.conftest import QUICK_COMPILATION

PARITY = "`make parity` installs transformers, with which the rest of this test compares"

HOPPER = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 1, "gpu"))

# For programs a test starts: one device, and the compilation settings of the tests themselves.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILATION}

# New processes that have imported all but what a test is about: importing takes seconds. Nothing has run in the one
# they are forked from.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["experiments.snlp", "experiments.base", "jaxlab.training.loop"])

INTERPRET = os.environ["JAX_PLATFORMS"] == "cpu"  # Pallas kernels, where there is no GPU to run them
interpreted = lambda implementation: implementation == "mosaic_tpu" or (implementation == "triton" and INTERPRET)
CLOSE = {"float32": 1e-4, "float64": 1e-9}  # where the same numbers are summed in another order
SHAPE = dict(depth=6, width=32, q_heads=4, kv_heads=2, head_dim=16, mlp_width=64, vocab_size=64)


def start(code, *arguments: str, **variables: str):
  """A process that runs `code`: a module's name, or the text of a program. `wait` gives its status and output.

  As `python -m NAME ARGUMENTS` or `python -c TEXT ARGUMENTS` would, with ENVIRONMENT and `variables`.
  """
  folder = Path(tempfile.mkdtemp())
  process = _FORKS.Process(target=_run, args=(code, arguments, ENVIRONMENT | variables, folder))
  process.folder = folder
  process.start()
  return process


def wait(process, timeout: float = 300) -> subprocess.CompletedProcess:
  """A process that takes longer is killed: its status is not 0."""
  process.join(timeout)
  process.kill()
  process.join()
  out, error = ((process.folder / name).read_text() if (process.folder / name).exists() else "" for name in "12")
  shutil.rmtree(process.folder)
  return subprocess.CompletedProcess(process.name, process.exitcode, out, error)


def _run(code, arguments, environment, folder):
  for stream in (1, 2):
    os.dup2(os.open(folder / str(stream), os.O_WRONLY | os.O_CREAT), stream)
  os.environ.clear()
  os.environ.update(environment)
  sys.argv = [code, *arguments]
  if "\n" in code:
    exec(code, {"__name__": "__main__"})
  else:
    runpy.run_module(code, run_name="__main__", alter_sys=True)


def configs() -> dict[str, TransformerConfig]:
  """One tiny config for every kind of model; the nanochat ones have a 128-token short window."""
  chat = dict(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512)
  return {
    "nanochat": nanochat(**chat),
    "nanochat_plain": nanochat(**chat, x0=False, value_embeddings=False, window_pattern="L"),
    "mhc": nanochat(**chat, hyper=HyperConnections()),
    "mhc_dynamic": nanochat(**chat, hyper=HyperConnections(dynamic=True, rounds=20)),
    "llama": TransformerConfig(**SHAPE),
    "qwen3": qwen3(**SHAPE, context=512),
    "qwen3_moe": TransformerConfig(**SHAPE, qk_norm="before_rope", experts=Experts(count=4, active=2, width=24)),
  }


def random_model(config: LanguageModelConfig, seed: int = 0, dtype="float32") -> LanguageModel:
  """Every parameter random: a zero-initialised projection would make tests pass for any code."""
  # New arrays, as tests may set parameters; float64 ones that float32 does not hold, or a lossy cast would go unseen.
  finer = 1 + 1e-9 if jnp.dtype(dtype) == "float64" else 1
  cast = lambda a: jnp.asarray(np.asarray(a).astype(jnp.dtype(dtype)) * np.asarray(finer, jnp.dtype(dtype)))
  return jax.tree.map(cast, _random_model(config, seed))


@functools.cache
def _random_model(config: LanguageModelConfig, seed: int) -> LanguageModel:
  """In float32: a program for every precision would take as long again to compile."""
  with jax.enable_x64(False):
    return jax.jit(functools.partial(_make_random_model, config, seed))()


def shape_of(config: TransformerConfig) -> Transformer:
  """Of nothing but zeros, for what is refused before it runs."""
  shapes = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
  return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)


def _make_random_model(config: LanguageModelConfig, seed: int) -> LanguageModel:
  kinds = {TransformerConfig: Transformer, Mamba2Config: Mamba2, HNetConfig: HNet}
  model = kinds[type(config)](config, jax.random.key(seed))
  leaves, structure = jax.tree_util.tree_flatten_with_path(model)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  largest = max(leaf.size for _, leaf in leaves)
  noises = jax.vmap(lambda key: jax.random.normal(key, (largest,)))(keys)  # one generator, not one a parameter

  def noisy(path, leaf, noise):
    noise = noise[: leaf.size].reshape(leaf.shape)
    if "_mixing.residual" in jax.tree_util.keystr(path):
      # Far from the near-identity they start at, or the streams would never mix.
      return 1.5 * noise * (1 if config.hyper.dynamic else config.hyper.temperature)
    return leaf + (0.15 if leaf.ndim < 2 else 0.1) * noise

  values = [noisy(path, leaf, noise) for (path, leaf), noise in zip(leaves, noises, strict=True)]
  return jax.tree.unflatten(structure, values)


def random_tokens(batch: int, time: int, vocab: int = 64, seed: int = 0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, time)), jnp.int32)


def own_losses(model, hidden, targets):
  """Losses of tokens, as the library never has them: cross-entropy and a share of the squared log-partition, also of
  targets of -1."""
  logits = model.logits(*hidden)
  total = jax.nn.logsumexp(logits, axis=-1)
  return total - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] + 0.01 * total**2


def lowered_for_hopper(function, *arrays) -> str:
  """The program for such a GPU, which this machine need not have."""
  with jax.sharding.use_abstract_mesh(HOPPER):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def plain_attention(q, k, v, *, window=None, start=0):
  """An `AttentionFn` written out; unlike jax.nn's its softmax keeps float64."""
  group = q.shape[2] // k.shape[2]
  query, key = (start + jnp.arange(q.shape[1]))[:, None], jnp.arange(k.shape[1])[None]
  mask = key <= query
  if window is not None:
    mask &= key >= query - window
  score = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, group, 2)) / q.shape[-1] ** 0.5
  weight = jax.nn.softmax(jnp.where(mask, score, -jnp.inf), axis=-1)
  return jnp.einsum("bhqk,bkhd->bqhd", weight, jnp.repeat(v, group, 2))


class Whole:
  """A module, or some functions of it, each compiled whole: operation by operation it is dozens of small compilations.

  Arguments that are no arrays are static. Checks of values, which read no traced array, want the module itself.
  """

  def __init__(self, module, *names: str):
    self._module, self._names = module, names

  def __getattr__(self, name):
    value = getattr(self._module, name)
    if inspect.isfunction(value) and (not self._names or name in self._names):
      value = whole(value)
    setattr(self, name, value)
    return value


def whole(function):
  @functools.partial(jax.jit, static_argnums=(0, 1))
  def compiled(structure, leaves, arrays):
    arrays = iter(arrays)
    leaves = [next(arrays) if kind is None else leaf for kind, leaf in leaves]
    args, options = jax.tree.unflatten(structure, leaves)
    return function(*args, **options)

  def call(*args, **options):
    leaves, structure = jax.tree.flatten((args, options))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    static = tuple((None, None) if a else (type(leaf), leaf) for a, leaf in zip(is_array, leaves, strict=True))
    return compiled(structure, static, [leaf for a, leaf in zip(is_array, leaves, strict=True) if a])

  return call


def run_and_continue(name: str, workdir, monkeypatch, *measures: str, config=None):
  """The report of an experiment at test scale. Its figures are there, and a second run measures none of `measures`."""
  config = config or importlib.import_module(f"configs.{name}").get_config("test")
  experiment = importlib.import_module(f"experiments.{name}")
  report = results.evaluate(experiment, config, workdir, workdir, Console())
  assert report.claims and all((workdir / file).read_bytes().startswith(b"\x89PNG") for file in report.figures)
  results.require_finite(report)
  for measure in measures:
    monkeypatch.setattr(f"experiments.{name}.{measure}", None)
  again = results.evaluate(experiment, config, workdir, workdir, Console())
  # Not equal: the note of a claim may hold NaN.
  assert [repr(claim) for claim in again.claims] == [repr(claim) for claim in report.claims]
  return report
