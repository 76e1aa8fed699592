"""Checkpoints from elsewhere and back: Hugging Face safetensors folders, GGUF files, nanochat's torch files.

One table per architecture says which tensor of the file is which parameter; loading and saving both walk it. The
folder's config.json names the architecture: LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM,
NanoChatForCausalLM, or JaxlabTransformer, JaxlabMamba2 and JaxlabHNet for models that have no Hugging Face counterpart
(parameters stacked, under their own names). A folder with `model_*.pt` and `meta_*.json` is a checkpoint of
karpathy/nanochat.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from jaxlab.core.checks import InputError, plain, require, require_choice
from jaxlab.core.files import write_files
from jaxlab.core.foreign import foreign
from jaxlab.core.mesh import shardings
from jaxlab.models import config_json, formats, gguf, maps
from jaxlab.models.config import TransformerConfig
from jaxlab.models.files import INDEX, SINGLE, find, gguf_file, read_json, read_tensor, saved_files, tensor_files
from jaxlab.models.hnet import HNet
from jaxlab.models.hnet_config import HNetConfig
from jaxlab.models.layers import rope_frequencies
from jaxlab.models.mamba2 import Mamba2, Mamba2Config
from jaxlab.models.packed_maps import SignStack
from jaxlab.models.transformer import Transformer
from jaxlab.models.vocabulary import Vocabulary, load_vocabulary

__all__ = [
  "Vocabulary",
  "find",
  "from_tensors",
  "kind_of",
  "load",
  "load_vocabulary",
  "read_config",
  "save",
  "to_tensors",
]

_SHARD_BYTES = 16 * 2**20
_Config = TransformerConfig | Mamba2Config | HNetConfig
_CONFIGS = {Transformer: TransformerConfig, Mamba2: Mamba2Config, HNet: HNetConfig}


def kind_of(path_or_name: str | os.PathLike) -> type:
  """What `load` expects as `kind` for a checkpoint: `Transformer`, `Mamba2` or `HNet`.

  Raises:
    InputError: there is no such checkpoint, or its config.json is missing, damaged or of an unknown architecture.
  """
  path = find(path_or_name)
  if gguf_file(path) is not None or any(path.glob("model_*.pt")):
    return Transformer
  return _kind(read_config(path)[0])


def _kind(config: _Config) -> type:
  return next(model for model, shape in _CONFIGS.items() if isinstance(config, shape))


def load(path_or_name: str | os.PathLike, *, dtype=None, mesh: Mesh | None = None, kind: type = Transformer):
  """Loads a checkpoint (`files.find` says which): a Hugging Face folder, a nanochat one, or a GGUF file.

  One parameter is in host memory at a time, read tensor by tensor, before it goes to the device.

  Args:
    dtype: of every parameter; None keeps what the files hold (float32 for GGUF).
    mesh: parameters are sharded over it by the rules of `core.mesh`; None puts them on the default device.
    kind: `Transformer`, `Mamba2` or `HNet`, what is expected there and returned.

  Raises:
    InputError: another kind of model, unknown architecture or option, or a tensor that is missing, superfluous,
      truncated or of another shape.
  """
  path = find(path_or_name)
  options = dict(dtype=dtype, mesh=mesh, where=str(path))
  if (file := gguf_file(path)) is not None:
    fields, stored = gguf.read(file)
    raw = gguf.read_config(file, fields, stored)
    config, arch = config_json.read(raw, str(file))
    names = gguf.names(stored)
    read = lambda name: gguf.dequantise(file, stored[names[name]], raw)
    return from_tensors(config, formats.TABLES[arch], read, names, **options)
  if any(path.glob("model_*.pt")):
    config, tensors = _read_karpathy(path)
    return from_tensors(config, formats.KARPATHY, tensors.__getitem__, tensors, **options)
  config, table = read_config(path)
  found = _kind(config)
  require(found is kind, f"{path} holds a {found.__name__}, not a {kind.__name__}; load it by kind={found.__name__}")
  places = tensor_files(path)
  options["compression"] = read_json(path / "config.json").get("compression")
  return from_tensors(config, table, lambda name: read_tensor(places[name], name), places, **options)


def from_tensors(
  config: _Config,
  table: Mapping[str, tuple[str, bool]] | None,
  read: Callable[[str], np.ndarray],
  names: Collection[str],
  *,
  dtype=None,
  mesh: Mesh | None = None,
  where: str = "checkpoint",
  compression: Mapping[str, Mapping] | None = None,
) -> Transformer | Mamba2 | HNet:
  """Builds a model from named tensors; `table` maps parameters to names (None: the parameters' own names).

  Args:
    compression: the forms of maps that are not one matrix (`maps.spec_of`); their arrays keep the dtypes of the file.
  """
  forms = compression or {}
  require(isinstance(forms, Mapping), f"{where}: compression is {forms!r:.80}; it must be an object of maps")
  make = _kind(config)
  abstract = jax.eval_shape(lambda: make(config, jax.random.key(0)))
  if forms:
    require(make is Transformer, f"{where}: compression is of a Transformer's maps; remove it from config.json")
    abstract = jax.eval_shape(lambda: maps.shaped(Transformer(config, jax.random.key(0)), forms))
  parameters = list(_leaves(abstract))
  parts, used = _parts(abstract), set()
  most = _most_in_use(abstract) if forms else {}
  for parameter, leaf in parameters:
    for _, name, _ in _places(config, table, parameter, leaf.shape, parts):
      require(name in names, f"{where} lacks tensor {name}; its config.json promises one")
      used.add(name)
  _refuse_surplus(config, read, set(names) - used, where)
  sharding = [None] * len(parameters) if mesh is None else jax.tree.leaves(shardings(abstract, mesh))
  leaves = []
  for (parameter, leaf), place in zip(parameters, sharding, strict=True):
    value = None
    for index, name, transpose in _places(config, table, parameter, leaf.shape, parts):
      tensor = np.asarray(read(name))
      tensor = tensor.T if transpose and tensor.ndim == 2 else tensor
      expected = np.broadcast_to(np.uint8(0), leaf.shape)[index].shape
      if tensor.size == 1 and expected == ():
        tensor = tensor.reshape(())
      elif table is formats.KARPATHY:  # vocabularies are padded to a multiple of 64 there
        tensor = tensor[tuple(slice(0, n) if n == config.vocab_size else slice(None) for n in expected)]
      require(tensor.shape == expected, f"{where}: {name} has shape {tensor.shape}; config.json makes it {expected}")
      floating = jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype.itemsize > 1
      stored = jnp.issubdtype(leaf.dtype, jnp.integer)
      wanted = str(leaf.dtype) if stored else "16, 32 and 64 bit floats"
      fits = tensor.dtype == leaf.dtype if stored else floating
      require(fits, f"{where}: {name} holds {tensor.dtype}; only {wanted} can be loaded")
      keep = any(parameter.startswith(f"blocks.{form}.") for form in forms if form in maps.NAMES)
      if value is None:
        kept = keep or stored or dtype is None
        value = _aligned(leaf.shape, np.dtype(tensor.dtype if kept else dtype))
        if parameter in parts or _ragged(config):
          value[...] = 0
      same = dtype is not None or tensor.dtype == value.dtype
      require(same, f"{where}: {name} is {tensor.dtype}, the layers before {value.dtype}; pass dtype= to convert them")
      value[index] = tensor
    fits = parameter not in most or bool(((value >= 0) & (value <= most[parameter])).all())
    require(fits, f"{where}: {parameter} is {value}; the layers hold {most.get(parameter)} blocks")
    if place is None:
      leaves.append(jax.device_put(value))
    else:
      leaves.append(jax.make_array_from_callback(value.shape, place, value.__getitem__))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An uninitialised array that the CPU backend takes over as it is; one off the 64-byte grid it would copy."""
  size = math.prod(shape) * dtype.itemsize
  buffer = np.empty(size + 64, np.uint8)
  first = -buffer.ctypes.data % 64
  return buffer[first : first + size].view(dtype).reshape(shape)


def _refuse_surplus(config: _Config, read, names: Collection[str], where: str) -> None:
  """A tensor that no parameter is made of may only repeat what the model has: a tied head, the rotary frequencies."""
  unknown = []
  for name in sorted(names):
    if name == "lm_head.weight" and config.tied_embeddings:
      same = np.array_equal(read(name), read("model.embed_tokens.weight"))
      require(same, f"{where}: lm_head.weight is not the embedding, but config.json sets tie_word_embeddings; unset it")
    elif name.endswith("rotary_emb.inv_freq"):
      tensor, expected = read(name), np.asarray(rope_frequencies(config))
      precision = 4 * float(jnp.finfo(tensor.dtype).eps)
      same = tensor.shape == expected.shape and np.allclose(tensor.astype(np.float32), expected, precision, 1e-7)
      require(same, f"{where}: {plain(name)} holds other frequencies than config.json gives; correct its rope_theta")
    else:
      unknown.append(name)
  require(not unknown, f"{where} has tensors this architecture does not have: {plain(*unknown)}")


def save(model: Transformer | Mamba2 | HNet, path: str | os.PathLike, *, layout: str | None = None) -> None:
  """Writes the model as a folder that `load` reads, in its own dtype, in shards of at most 16 MiB.

  Every file is written under a temporary name and synced before the first one is renamed, so a folder that held a
  checkpoint holds a whole one after a failure too. Of what was there only the weights that these replace are deleted.

  Args:
    layout: None picks the Hugging Face architecture that computes the same function, so that transformers loads it
      too, and an own one where there is none. "nanochat" writes karpathy/nanochat's torch file (needs torch).

  Raises:
    InputError: the model has no such layout, or the disk is full.
  """
  require_choice("layout", layout, (None, "nanochat"))
  folder, config = Path(path), model.config
  forms = maps.spec_of(model) if isinstance(model, Transformer) else {}
  other = "compressed model" if forms else type(model).__name__
  plain_one = isinstance(model, Transformer) and not forms
  require(plain_one or layout is None, f"a {other} has no {layout} layout; save it without layout=")
  arch = formats.OWN if forms else config_json.architecture(config)
  table = formats.KARPATHY if layout else formats.TABLES.get(arch)
  tensors = to_tensors(model, table)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if layout:
      return _write_karpathy(folder, config, tensors)
    replaced = saved_files(folder)
    shards = _shards(tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    files = {}
    for name, shard in zip(names, shards, strict=True):
      files[name] = lambda file, shard=shard: file.write(safetensors.numpy.save(shard, metadata={"format": "pt"}))
    if len(shards) > 1:
      weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
      index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
      files[INDEX] = _json(index)
    description = (
      config_json.describe(config, arch)
      | ({"compression": forms} if forms else {})
      | {"dtype": str(model.dtype), "torch_dtype": str(model.dtype)}
    )
    files["config.json"] = _json(description)
    write_files(folder, files)
    for old in replaced:
      if old not in files:
        (folder / old).unlink(missing_ok=True)
  except OSError as error:
    raise InputError(
      f"could not write {folder}: {error.strerror or error}; free some space or choose another"
    ) from None


def to_tensors(
  model: Transformer | Mamba2 | HNet, table: Mapping[str, tuple[str, bool]] | None
) -> dict[str, np.ndarray]:
  """The model's parameters under the names of `table`, in the orientation of the files."""
  tensors, parts = {}, _parts(model)
  for parameter, leaf in _leaves(model):
    value = np.asarray(leaf)
    for index, name, transpose in _places(model.config, table, parameter, value.shape, parts):
      tensor = value[index]
      tensors[name] = np.ascontiguousarray(tensor.T if transpose and tensor.ndim == 2 else tensor)
  return tensors


def _json(content: Mapping) -> Callable[[IO[bytes]], object]:
  return lambda file: file.write(json.dumps(content, indent=2).encode())


def read_config(path: Path) -> tuple[_Config, Mapping | None]:
  """(config, tensor table) of a Hugging Face folder or a GGUF file."""
  if (file := gguf_file(path)) is not None:
    config, arch = config_json.read(gguf.read_config(file, *gguf.read(file)), str(file))
    return config, formats.TABLES[arch]
  file = path / "config.json"
  require(file.is_file(), f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
  config, arch = config_json.read(read_json(file), str(file))
  return config, formats.TABLES.get(arch)


def _leaves(model):
  """(dotted name, array) of every parameter."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    yield jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf


def _parts(model) -> dict[str, list[tuple[int, str]]]:
  """{parameter: how much of every layer's part files hold, and where}; other parameters are held whole."""
  parts = maps.stored_parts(model.blocks) if isinstance(model, Transformer) else {}
  return {f"blocks.{name}": own for name, own in parts.items()}


def _most_in_use(model: Transformer) -> dict[str, np.ndarray]:
  """{parameter: the blocks that each layer holds} of every count of blocks in use."""
  stacks = {name: one for name, one in maps.parts(model.blocks).items() if isinstance(one, SignStack)}
  return {f"blocks.{name}.count": np.array(one.held or one.u.shape[-3]) for name, one in stacks.items()}


def _places(config: _Config, table, parameter: str, shape, parts: Mapping[str, list[tuple[int, str]]]):
  """(index into the parameter, tensor name, transposed) of each tensor that holds a part of it."""
  if parameter in parts:
    yield from (((i, slice(size)), name, False) for i, (size, name) in enumerate(parts[parameter]) if size)
    return
  if table is None:
    yield from _own_places(config, parameter)
    return
  require(parameter in table, f"this checkpoint layout has no place for {parameter}; save without layout=")
  template, transpose = table[parameter]
  layers, experts = [(None, None)], (None,)
  if "{layer}" in template:
    layers = zip(range(config.depth), range(config.depth), strict=True)
  if "{value_layer}" in template:
    # The gate is stacked over all layers, the tables over those that have one.
    rows = config.value_layers if shape[0] == config.depth else range(len(config.value_layers))
    layers = zip(rows, config.value_layers, strict=True)
  if "{expert}" in template:
    experts = range(config.experts.count)
  for row, layer in layers:
    for expert in experts:
      index = tuple(i for i in (row, expert) if i is not None)
      yield index, template.format(layer=layer, value_layer=layer, expert=expert), transpose


def _own_places(config: _Config, parameter: str):
  """A parameter under its own name; a map's matrix layer by layer where layers differ, without the zeros."""
  name, _, leaf = parameter.removeprefix("blocks.").rpartition(".")
  side = "inputs" if name in ("o", "mlp.down") else "outputs"
  cut = leaf == "weight" or leaf == ("down" if side == "inputs" else "up")
  if not (_ragged(config) and name in maps.NAMES and parameter.startswith("blocks.") and cut):
    yield (), parameter, False
    return
  for layer in range(config.depth):
    size = slice(maps.sizes_of(config, name, layer)[side])
    yield (layer, size) if side == "inputs" else (layer, slice(None), size), f"{parameter}.{layer}", False


def _ragged(config) -> bool:
  return isinstance(config, TransformerConfig) and config.ragged


def _shards(tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  """Tensors in order, a new shard where the next one would not fit."""
  shards, size = [{}], 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > _SHARD_BYTES - 2**16:  # room for the header
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  return shards


def _torch(why: str):
  try:
    import torch
  except ImportError:
    raise InputError(f"{why} needs torch; pip install torch") from None
  return torch


def _read_karpathy(folder: Path):
  """The newest nanochat checkpoint in a folder: (config, tensors). Opened with weights_only: no code is unpickled."""
  torch = _torch("reading a nanochat checkpoint (model_*.pt)")
  file = max(folder.glob("model_*.pt"))
  meta = folder / file.name.replace("model_", "meta_").replace(".pt", ".json")
  require(meta.is_file(), f"{meta} is missing; a nanochat checkpoint is a model_*.pt with its meta_*.json")
  with foreign(file, "copy it again"):
    stored = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {k.removeprefix("_orig_mod."): v.float().numpy() for k, v in stored.items()}
  with foreign(meta, "copy it again"):
    return formats.karpathy_config(read_json(meta)["model_config"], tensors), tensors


def _write_karpathy(folder: Path, c: TransformerConfig, tensors: dict[str, np.ndarray]) -> None:
  torch = _torch("writing a nanochat checkpoint")
  vocab = -(-c.vocab_size // 64) * 64
  wide = lambda t: np.pad(t, [(0, vocab - c.vocab_size if n == c.vocab_size else 0) for n in t.shape[:1]] + [(0, 0)])
  vocabulary = ("transformer.wte.weight", "lm_head.weight")
  state = {}
  for name, tensor in tensors.items():
    tensor = tensor.astype(np.float32)
    tensor = wide(tensor) if name in vocabulary or name.startswith("value_embeds.") else np.atleast_1d(tensor)
    state[name] = torch.from_numpy(np.ascontiguousarray(tensor))
  config = dict(
    sequence_len=c.context,
    vocab_size=c.vocab_size,
    n_layer=c.depth,
    n_head=c.q_heads,
    n_kv_head=c.kv_heads,
    n_embd=c.width,
    window_pattern=c.window_pattern,
  )

  meta = {"model_config": config, "step": 0}
  weights = lambda file: torch.save(state, file)
  write_files(folder, {"meta_000000.json": _json(meta), "model_000000.pt": weights})
