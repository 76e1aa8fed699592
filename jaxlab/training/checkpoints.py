"""Checkpoints of a training run: asynchronous, atomic, the newest two kept (orbax)."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxlab.core.checks import InputError
from jaxlab.core.foreign import foreign, reason


class Checkpoints:
  """Checkpoints under a folder. A context manager: leaving it waits for the save in flight.

  orbax writes each one under a temporary name and renames it when whole, so a killed run leaves no half one behind.
  """

  def __init__(self, folder: Path, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._manager.close()

  def latest(self) -> int | None:
    """The newest whole checkpoint's step."""
    return self._manager.latest_step()

  def save(self, step: int, state, iterator: dict) -> None:
    """Starts saving `state` (any pytree of arrays) and `iterator` (JSON).

    Raises:
      InputError: this save or the one before it could not be written.
    """
    arrays = ocp.args.StandardSave(_flat(state))
    try:
      hosts = ocp.args.JsonSave({"hosts": _of_every_host(iterator)})
      self._manager.save(step, args=ocp.args.Composite(state=arrays, iterator=hosts))
    except (OSError, ValueError, RuntimeError) as error:
      raise _failed(step, error) from error

  def wait(self, step: int) -> None:
    """Waits until the last save is on disk."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      raise _failed(step, error) from error

  def restore(self, step: int, like):
    """(state with the structure, dtypes and shardings of `like`, iterator state).

    Raises:
      InputError: the checkpoint holds other arrays than `like`.
    """
    wanted = _flat(like)
    abstract = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in wanted.items()}
    where = f"checkpoint {step} in {self._manager.directory}"
    with foreign(f"{where} is damaged or does not fit this config", "use another --workdir"):
      found = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), iterator=ocp.args.JsonRestore())
      )
    for name, leaf in wanted.items():
      if found["state"][name].shape != leaf.shape:
        raise InputError(
          f"{where} holds {name} as {found['state'][name].shape}, this config makes it {leaf.shape}; use another "
          "--workdir"
        )
    state = jax.tree.unflatten(jax.tree.structure(like), [found["state"][name] for name in wanted])
    hosts = found["iterator"]["hosts"]
    if len(hosts) != jax.process_count():
      raise InputError(
        f"{where} was written by {len(hosts)} hosts, this run has {jax.process_count()}; start it on as many"
      )
    return state, hosts[jax.process_index()]


def _flat(tree) -> dict:
  """Leaves by path: readable on disk, and independent of the classes that hold them."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _of_every_host(value: dict) -> list[dict]:
  """The JSON values of all hosts, in order; each reads other data and so stands at another place."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(text)))
  rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - len(text))))
  return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def _failed(step, error) -> InputError:
  full = "No space left on device"
  why = full if full in str(error) else reason(error)
  return InputError(f"could not save checkpoint {step}: {why}; free some disk space and run the same command again")
