"""Loading of models from any supported file or folder."""

import fnmatch
import pathlib
import re

from cage_jax.arrays.names import names_checked
from cage_jax.export.files import Path, as_path, check_installed, malformed
from cage_jax.export.target import Target, suffixes, targets
from cage_jax.llama.loaded import Model

_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONVERT = "AutoModelForCausalLM.from_pretrained({0}).save_pretrained('converted')"
_STATE = "safetensors.torch.save_file(torch.load({1}), 'converted/model.safetensors')"
# Files of weights in other formats, and the Python that converts {1} in the folder {0}.
_OF_OTHERS = {
    "consolidated*.pth": "its script convert_llama_weights_to_hf.py, of version 4",
    "*.pth": _STATE,
    "*.pt": _STATE,
    "*model*.bin": _CONVERT,
    "*.ckpt*": _CONVERT.replace("{0}", "{0}, from_tf=True") + " of version 4",
    "*.h5": _CONVERT.replace("{0}", "{0}, from_tf=True") + " of version 4",
    "*.msgpack": _CONVERT.replace("{0}", "{0}, from_flax=True") + " of version 4",
}
# Endings of paths that are no names on the hub, beside those of the targets.
_SUFFIXES = (".bin", ".json", ".pt", ".pth")


@names_checked
def load(path: Path) -> Model:
    """Loads a model from disk, with its trained codes or its floats.

    Files are not trusted: a damaged or malicious file raises an error, and nothing in
    it is executed.

    Args:
      path: one of

        - a transformers folder of a Llama, with floats or from
          `export.compressed_tensors`, as one safetensors file or several;
        - a GGUF file, from `export.gguf` or with floats;
        - a folder from `cage-jax quantize` or `export.native.save`;
        - a `.safetensors` file or Orbax folder from `export.save`, of any model;
        - a folder from `export.stablehlo` with weights as arguments;
        - the name of a Llama on the Hugging Face hub.

    Returns:
      A `Model` of `params`, `config` and `tokenizer`. If the file holds a tree that is
      not a Llama, `config` is None and `tokenizer` is empty.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ImportError: if the package to read a GGUF, or to load from the hub, is missing.
      MalformedFileError: if the file is damaged.
      TypeError: if `path` is not a path.
      ValueError: if it is not a model, not a supported one, or in formats that must be
        converted first.

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
    location, target = located(path)
    return target.read(location)


def located(path: Path) -> tuple[pathlib.Path, Target]:
    """Finds the model at a path, and what it is; raises as `load` does."""
    location = find(path) or _from_hub(path)
    if location.is_dir():
        _check_converted(location)
    for target in targets().values():
        if target.recognises(location):
            for package in target.packages:
                check_installed(package, f"reading {location.name}")
            return location, target
    if location.is_dir():
        names = sorted(file.name for file in location.iterdir())[:4]
        raise ValueError(
            f"`path` must be the folder of a model, with a config.json; got "
            f"{location}, which has {names}. Pass the folder that holds config.json, "
            f"or the GGUF itself."
        )
    if not location.is_file():
        raise malformed(
            "`path` must be a file or a folder",
            f"{location}, a FIFO, a socket or a device",
            "Copy its content into a file.",
        )
    _check_converted(location)
    raise malformed(
        "`path` must be a model",
        f"{location.name}, which is not a well-formed file of {suffixes()}",
        "Pass one of those, or the folder of the model.",
    )


def _check_converted(location):
    """Raises for weights of other libraries: a file, or all that a folder has."""
    is_folder = location.is_dir()
    names = sorted(
        file.name for file in (location.iterdir() if is_folder else [location])
    )
    if any(name.endswith(".safetensors") for name in names):
        return
    folder = location if is_folder else location.parent
    for pattern, line in _OF_OTHERS.items():
        for name in fnmatch.filter(names, pattern):
            line = line.format(repr(str(folder)), repr(str(folder / name)))
            raise _not_converted(location, name, line)


def _not_converted(path, weights, line):
    return ValueError(
        f"`path` must have its weights in safetensors; got {path}, where they are in "
        f"{weights}. Convert it with transformers and PyTorch: {line}"
    )


def find(path: Path) -> pathlib.Path | None:
    """Returns the path of a model on disk, or None for a name on the hub.

    Raises:
      FileNotFoundError: if the path does not exist and cannot be a name on the hub.
      TypeError, ValueError: if `path` is not a path.
    """
    location = as_path(path)
    if location.exists():
        return location
    if (
        not isinstance(path, str)
        or not _ON_THE_HUB.fullmatch(path)
        or location.suffix in (*_SUFFIXES, *suffixes())
        or location.parent.exists()
    ):
        raise FileNotFoundError(
            f"`path` must be a file or a folder; got {str(path)!r}, which does not "
            f"exist. Check the path, or give a name on the hub such as "
            f"HuggingFaceTB/SmolLM2-135M."
        )
    return None


def _from_hub(name):
    """Downloads a model from the hub and returns its folder."""
    check_installed("huggingface_hub", f"loading {name} from the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.jinja"]
        )
    except Exception as error:  # several libraries raise, with no common class
        reason = str(error).strip().splitlines()[0] if str(error) else type(error)
        raise ValueError(
            f"`path` must be a file, a folder, or a name on the Hugging Face hub that "
            f"can be reached; got {name!r} ({reason}). Download it elsewhere, and give "
            f"the folder."
        ) from error
    folder = pathlib.Path(downloaded)
    if not any(folder.glob("*.safetensors")):
        raise _not_converted(name, "other files", _CONVERT.format(repr(name)))
    return folder
