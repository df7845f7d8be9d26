"""Targets: the kinds of files and folders that models are written to and read from.

A new target is a module with a `TARGET`, and its line in `MODULES`. `cage_jax.load`
and the commands read this registry, and a test compares the table in docs/export.md
with it. The modules are imported when a target is first needed.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from cage_jax.export.writing import IsExport
from cage_jax.llama.loaded import Model

MODULES = {
    "gguf": "cage_jax.export.gguf",
    "native": "cage_jax.export.native",
    "compressed-tensors": "cage_jax.export.compressed_tensors",
    "stablehlo": "cage_jax.export.stablehlo",
    "safetensors": "cage_jax.export.trees",
    "orbax": "cage_jax.export.orbax_folders",
}
"""The module of each target. The first target that recognises a path reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file or folder.

    Attributes:
      written_by: the call that writes it, for the docs, such as "export.gguf".
      read_by: the programs that read it.
      holds: the quantizers and models that it holds, for the docs.
      recognises: tells whether an existing path is of this kind.
      read: reads the model at a path; raises `MalformedFileError` if it is damaged.
      write: writes a Llama, called with (codes, config, path, tokenizer=, overwrite=);
        raises ValueError for what the target cannot hold. None if only Python programs
        can write it.
      takes_template: whether `write` takes a model's own file or folder in place of
        the config, and `names=` in place of the tokenizer.
      suffix: ending of a file, such as ".gguf"; "" for a folder.
      is_export: tells whether `write` wrote an existing file, which only then is
        replaced. A folder is known by its marker.
      presets: the choices of `cage-jax quantize --weights` that it holds.
      packages: packages that reading needs, in the extra "export".
      lacks: says what the file of the given codes lacks, in a sentence; "" for nothing.
    """

    written_by: str
    read_by: str
    holds: str
    recognises: Callable[[pathlib.Path], bool]
    read: Callable[[pathlib.Path], Model]
    write: Callable[..., None] | None = None
    takes_template: bool = False
    suffix: str = ""
    is_export: IsExport = lambda path: False
    presets: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    lacks: Callable[[Any], str] = lambda codes: ""


def suffixes() -> list[str]:
    """Returns the endings of all targets that are files."""
    return [target.suffix for target in targets().values() if target.suffix]


def targets() -> dict[str, Target]:
    """Returns all targets by name."""
    modules = {name: importlib.import_module(path) for name, path in MODULES.items()}
    return {name: module.TARGET for name, module in modules.items()}
