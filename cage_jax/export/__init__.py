"""Export to files for other programs, with the trained codes bit for bit.

`compressed_tensors` writes a folder for transformers and vLLM, and `gguf` a file for
llama.cpp, of a Llama or, with `read_tensors`, of any model in such a folder or file.
`stablehlo` writes a program that runs without this library. `save` and `save_orbax`
store a tree of codes of any model. `cage_jax.load` reads all of them, by the registry
in `target`. `rules_to_json` stores a table of rules. `cage_jax.audit` compares a file
with its training, and `recovered_grid` finds the grid of floats that were trained on
one.
"""

from cage_jax.core.on_grid import recovered_grid
from cage_jax.export.compressed_tensors import compressed_tensors
from cage_jax.export.files import MalformedFileError
from cage_jax.export.gguf import gguf
from cage_jax.export.orbax_folders import save_orbax
from cage_jax.export.rules_json import rules_from_json, rules_to_json
from cage_jax.export.stablehlo import stablehlo
from cage_jax.export.template_names import TensorName
from cage_jax.export.templates import read_tensors
from cage_jax.export.trees import save

__all__ = [
    "MalformedFileError",
    "TensorName",
    "compressed_tensors",
    "gguf",
    "read_tensors",
    "recovered_grid",
    "rules_from_json",
    "rules_to_json",
    "save",
    "save_orbax",
    "stablehlo",
]
