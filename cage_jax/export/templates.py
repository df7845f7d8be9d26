"""Folders of transformers models as templates: their tensors, and copies of them.

A template is never loaded: its headers say which tensors it has, and what is not
replaced is copied from file to file.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cage_jax.export.copying import copy_range, mapped_place
from cage_jax.export.files import (
    Path,
    as_path,
    has,
    inside,
    read_json,
    write_json,
)
from cage_jax.export.gguf_templates import read_gguf_tensors
from cage_jax.export.safetensors_files import (
    INDEX,
    Header,
    Like,
    layout,
    read_shards,
    shards,
)
from cage_jax.export.writing import MARKER

# The files of a folder that are no weights: settings, tokenizers, templates, code.
_COPIED = (".json", ".jinja", ".model", ".py", ".txt")


@dataclasses.dataclass(frozen=True)
class Template:
    """The folder of a transformers model.

    Attributes:
      folder: its path.
      config: the content of config.json.
      shards: the header of each file of weights by its name.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    shards: dict[str, Header]

    @functools.cached_property
    def tensors(self) -> dict[str, Like]:
        """The dtype and shape of each tensor by its name in the files."""
        return {
            entry.name: Like(entry.dtype, entry.shape)
            for header in self.shards.values()
            for entry in header.entries
        }

    def holds(self, name: str, array: Any) -> bool:
        """Tells whether an array is a tensor's own bytes, mapped by `read_tensors`."""
        shard, begin = self._places[name]
        place = (self.folder / shard).resolve(), begin
        return (
            mapped_place(array) == place
            and Like(array.dtype, array.shape) == self.tensors[name]
        )

    @functools.cached_property
    def _places(self):
        """The file and the first byte of each tensor."""
        return {
            entry.name: (shard, header.start + entry.begin)
            for shard, header in self.shards.items()
            for entry in header.entries
        }

    @property
    def dtype(self) -> str:
        """The dtype in which readers compute, as config.json or the tensors say."""
        configs = (self.config, self.config.get("text_config"))
        for config in configs:
            for key in ("dtype", "torch_dtype"):
                if isinstance(config, dict) and isinstance(config.get(key), str):
                    return config[key].removeprefix("torch.")
        dtypes = [str(tensor.dtype) for tensor in self.tensors.values()]
        return next((dtype for dtype in dtypes if "float" in dtype), "float32")


def read_template(folder: Path, argument: str = "config") -> Template:
    """Reads the config and the headers of a folder.

    Raises:
      FileNotFoundError: if there is no such folder.
      MalformedFileError: if its files are damaged, or lead out of it.
      TypeError, ValueError: if `folder` is not a folder with weights in safetensors, or
        if its model is quantized already.
    """
    path = as_path(folder, argument)
    if not path.exists():
        raise FileNotFoundError(
            f"`{argument}` must be the folder of a transformers model; got "
            f"{str(folder)!r}, which does not exist. Use a folder that save_pretrained "
            f"wrote, or huggingface_hub.snapshot_download(name)."
        )
    if not path.is_dir() or not has(path, "config.json"):
        raise ValueError(
            f"`{argument}` must be the folder of a transformers model, with its "
            f"config.json; got {path}. Use a folder that save_pretrained wrote."
        )
    if not has(path, "model.safetensors") and not has(path, INDEX):
        raise ValueError(
            f"`{argument}` must have its weights in model.safetensors, or in the files "
            f"of {INDEX}; got {sorted(os.listdir(path))[:6]}. Load it with "
            f"transformers, and write it with save_pretrained."
        )
    config = read_json(inside(path, "config.json"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            method = part["quantization_config"]
            if isinstance(method, dict):
                method = method.get("quant_method")
            raise ValueError(
                f"`{argument}` must be a model of floats; got one whose "
                f"quantization_config is of {str(method)[:40]!r}. Use the model from "
                f"which it was quantized."
            )
    return Template(path, config, shards(path))


def read_tensors(folder: Path) -> dict[str, Any]:
    r"""Reads the tensors of a model of any architecture.

    They are the parameters of a training in any framework, by the names of the files:
    no code of the model is needed. What is trained and quantized goes back with
    `compressed_tensors(codes, folder, path)`, or `gguf(codes, file, path)`. The weight
    of a linear layer is (out, in), so that quantizers have axis=-1.

    Args:
      folder: path of the folder of a transformers model, with config.json, and weights
        of floats in safetensors, in one file or several; or of a GGUF file.

    Returns:
      A dict of arrays in the dtypes of the files. They are read-only and mapped from
      the files, so they take memory only when they are used. Blocks of a GGUF are
      `QuantizedArray`s; their floats are `dequantize(tensors)`.

    Raises:
      FileNotFoundError: if there is no such folder or file.
      MalformedFileError: if its files are damaged, or lead out of it.
      TypeError, ValueError: if `folder` is not a folder with weights in safetensors, or
        if its model is quantized already. If a GGUF has blocks other than Q4_0, Q4_1,
        Q8_0, MXFP4 and TQ2_0, or is a part of a model.

    Example:
      >>> import json, pathlib, tempfile
      >>> import cage_jax as cage
      >>> import numpy as np
      >>> from cage_jax.export import safetensors_files
      >>> folder = pathlib.Path(tempfile.mkdtemp())  # what save_pretrained writes
      >>> _ = (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
      >>> weight = np.ones((4, 32), np.float32)
      >>> safetensors_files.write(folder / "model.safetensors", {"up.weight": weight})
      >>> tensors = cage.export.read_tensors(folder)
      >>> tensors["up.weight"].shape
      (4, 32)
      >>> rules = cage.Rules([(r"up\.weight", cage.int4(axis=-1)), (".*", None)])
      >>> codes = cage.quantize(tensors, rules)
      >>> cage.export.compressed_tensors(codes, folder, folder / "int4")
    """
    if as_path(folder, "folder").is_file():
        return read_gguf_tensors(folder)
    return read_shards(read_template(folder, "folder").folder)


def write_like(
    template: Template,
    folder: pathlib.Path,
    replaced: Mapping[str, Mapping[str, Like]],
    arrays_of: Callable[[str], Mapping[str, np.ndarray]],
) -> None:
    """Writes the weights of a template with some of its tensors replaced.

    Each file of the template becomes one of the same name. What is not replaced is
    copied as bytes, and the arrays of one replaced tensor are in memory at a time.

    Args:
      template: the template.
      folder: the folder to write to.
      replaced: by the name of a replaced tensor, what takes its place, by name.
      arrays_of: returns the arrays that take the place of a tensor.
    """
    places: dict[str, str] = {}
    total = 0
    for name, header in template.shards.items():
        like: dict[str, Like] = {}
        for entry in header.entries:
            kept = {entry.name: Like(entry.dtype, entry.shape)}
            like |= replaced.get(entry.name, kept)
        places |= dict.fromkeys(like, name)
        total += sum(each.nbytes for each in like.values())
        source = inside(template.folder, name)
        _write_shard(source, header, folder / name, like, replaced.keys(), arrays_of)
    if has(template.folder, INDEX):
        index = read_json(inside(template.folder, INDEX))
        metadata = index.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        index["metadata"] = metadata | {"total_size": total}
        write_json(folder / INDEX, index | {"weight_map": places})


def _write_shard(source, header, path, like, replaced, arrays_of):
    start, places = layout(like, header.metadata)
    with source.open("rb") as old, path.open("wb") as new:
        new.write(start)
        new.flush()
        for entry in header.entries:
            if entry.name not in replaced:
                begin, length = header.start + entry.begin, entry.end - entry.begin
                copy_range(
                    old.fileno(), new.fileno(), begin, length, places[entry.name]
                )
        for entry in header.entries:
            if entry.name in replaced:
                for name, array in arrays_of(entry.name).items():
                    assert Like(array.dtype, array.shape) == like[name], name
                    new.seek(places[name])
                    new.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def copy_settings(template: Template, folder: pathlib.Path) -> None:
    """Copies the tokenizer, the settings and the code of a template, but no config.

    Raises:
      MalformedFileError: if one is no regular file, or a link out of the template.
    """
    for name in sorted(os.listdir(template.folder)):
        is_index = name.endswith(".index.json")
        if not name.endswith(_COPIED) or is_index or name in ("config.json", MARKER):
            continue
        source = inside(template.folder, name)
        with source.open("rb") as old, (folder / name).open("wb") as new:
            length = os.fstat(old.fileno()).st_size
            copy_range(old.fileno(), new.fileno(), 0, length, 0)
