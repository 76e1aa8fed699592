"""A small trained module in a file of its own: its arrays, and the options it was made with.

modules.save(Path("gate.npz"), gate, dict(width=128))
gate = modules.load("gate.npz", functools.partial(SeerGate, config, key))
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core.checks import require
from jaxlab.core.files import write_files
from jaxlab.core.foreign import foreign

_REMEDY = "give the file of a module that was trained for this model, or train one anew"


def save(file: Path, module, options: Mapping[str, object], **beside: np.ndarray) -> None:
  """Writes an npz file: the arrays of the tree `module`, the options as JSON, and what lies beside them by its name."""
  arrays = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(module))} | beside
  arrays["options"] = np.frombuffer(json.dumps(dict(options)).encode(), np.uint8)
  write_files(file.parent, {file.name: lambda stream: np.savez(stream, **arrays)})


def load(file: Path | str, make: Callable):
  """`make(**options)` of a module's file with the arrays that lie there.

  Raises:
    InputError: no such file, a damaged one, or a module of other shapes.
  """
  with foreign(file, _REMEDY), np.load(file) as kept:
    options = json.loads(kept["options"].tobytes())
    like = jax.eval_shape(lambda: make(**options))
    leaves, structure = jax.tree.flatten(like)
    found = [kept[f"{i}"] for i in range(len(leaves))]
  for a, b in zip(found, leaves, strict=True):
    require(
      a.shape == b.shape, f"{file} holds an array of shape {a.shape} where the model asks for {b.shape}; {_REMEDY}"
    )
  return jax.tree.unflatten(structure, map(jnp.asarray, found))


def beside(file: Path, name: str) -> np.ndarray:
  """What `save` was given beside the module."""
  with foreign(file, _REMEDY), np.load(file) as kept:
    return kept[name]
