"""Any file or folder with a model, back as codes."""

import importlib.util
import os
import pathlib
import re

from cage_jax.export import native, trees
from cage_jax.export.compressed_tensors import read as read_compressed_tensors
from cage_jax.export.files import MalformedFileError, Path
from cage_jax.export.gguf import read as read_gguf
from cage_jax.export.stablehlo import is_folder as is_program
from cage_jax.export.stablehlo import read_codes
from cage_jax.llama.loaded import Model

_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors")


def load(path: Path) -> Model:
    """A model from disk: its codes as they were trained, or its floats.

    A file is taken for hostile: what is damaged, or made to do harm, is an error; and
    nothing in it is executed.

    Args:
      path: one of

        - a folder of transformers, of floats or as `export.compressed_tensors` writes
          it: a Llama, safetensors in one file or several;
        - a GGUF, as `export.gguf` writes it, or of floats;
        - a folder that `cage-jax quantize` or `export.native.save` wrote;
        - a `.safetensors` file or Orbax folder of `export.save`, of any model;
        - the folder of `export.stablehlo` with weights as arguments;
        - the name of a Llama on the Hugging Face hub.

    Returns:
      A `Model` of `params`, `config` and `tokenizer`. `config` is None, and there is no
      tokenizer, where the file is not of a Llama but of any tree.

    Raises:
      FileNotFoundError: where there is nothing.
      ImportError: for a GGUF, and for a name on the hub, without the package that reads
        it.
      MalformedFileError: for what is damaged.
      TypeError: for a path that is none.
      ValueError: for what is no model, or not a Llama's.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> codes = {"kernel": cage.quantize(jnp.ones((32, 2)), cage.int4())}
      >>> cage.export.save(codes, folder / "codes.safetensors")
      >>> params, config, tokenizer = cage.load(folder / "codes.safetensors")
      >>> params["kernel"].codes.dtype
      dtype(int4)
    """
    place = find(path)
    if place is None:
        return _folder(_from_hub(path))
    if place.is_dir():
        return _folder(place)
    with place.open("rb") as file:
        begin = file.read(4)
    if begin == b"GGUF":
        _need("gguf", "A GGUF")
        return read_gguf(place)
    if place.suffix == ".safetensors":
        _need("safetensors", "A .safetensors file")
        return Model(trees.load(place), None, {})
    raise MalformedFileError(
        f"`path` must be a model; got {place.name}, which is neither a GGUF nor a "
        f".safetensors file. Give one of those, or the folder of the model."
    )


def find(path: Path) -> pathlib.Path | None:
    """Where a model is on this disk; None for a name on the hub.

    Raises:
      FileNotFoundError: where there is nothing, and it cannot be such a name.
      TypeError: for a path that is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` must be a path; got {type(path).__name__}. Give that of a file or "
            f"a folder, or a name on the hub."
        )
    place = pathlib.Path(path)
    if place.exists():
        return place
    if (
        not isinstance(path, str)
        or not _ON_THE_HUB.fullmatch(path)
        or place.suffix in _FILES
        or place.parent.exists()
    ):
        raise FileNotFoundError(
            f"`path` must be a file or a folder; got {str(path)!r}, which is not "
            f"there. Check the path, or give a name on the hub such as "
            f"HuggingFaceTB/SmolLM2-135M."
        )
    return None


def _folder(place):
    if (place / native.CODES).is_file() and (place / native.CONFIG).is_file():
        return native.read(place)
    if trees.is_folder(place):
        return Model(trees.load(place), None, {})
    if is_program(place):
        return Model(read_codes(place), None, {})
    if (place / "config.json").is_file():
        return read_compressed_tensors(place)
    names = sorted(file.name for file in place.iterdir())[:4]
    raise ValueError(
        f"`path` must be the folder of a model, with a config.json; got {place}, which "
        f"has {names}. Give the folder that holds config.json, or the GGUF itself."
    )


def _from_hub(name):
    """The folder of a model on the hub, once it is here."""
    _need("huggingface_hub", "A name on the hub")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.jinja"]
        )
    except Exception as error:  # of several libraries, with no class in common
        reason = str(error).strip().splitlines()[0] if str(error) else type(error)
        raise ValueError(
            f"`path` must be a file, a folder, or a name on the Hugging Face hub that "
            f"can be reached; got {name!r} ({reason}). Download it elsewhere, and give "
            f"the folder."
        ) from error
    return pathlib.Path(folder)


def _need(package, what):
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{what} cannot be read without the package {package}, which is not "
            f'installed. Run pip install "cage_jax[export]", or in a clone '
            f"pip install -e '.[export]'."
        )
