"""A model in a folder of our own: any quantizer, its dimensions and its tokenizer."""

import json
import pathlib

from cage_jax.export import tokenizer_files, trees
from cage_jax.export.files import MalformedFileError, Path, new_folder, read_json
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path

CODES, CONFIG = "codes.safetensors", "config.json"


def save(model: Model, path: Path, *, overwrite: bool = False) -> None:
    """Writes a model to a folder, from which `cage_jax.load` reads it.

    Args:
      model: with parameters of any quantizer.
      path: of the folder.
      overwrite: replace what is there.

    Raises:
      FileExistsError: where there is something already.
      TypeError: for parameters that are neither floats nor codes.
      ValueError: for a model without dimensions.
    """
    if model.config is None:
        raise ValueError(
            "`model` must have a `config`; got None. Use cage_jax.export.save for a "
            "tree of any model."
        )
    by_path(model.params)
    with new_folder(path, overwrite=overwrite) as folder:
        trees.save(model.params, folder / CODES)
        content = json.dumps(model.config.to_huggingface(), indent=2)
        (folder / CONFIG).write_text(content, encoding="utf-8")
        for name, data in model.tokenizer.items():
            if name in tokenizer_files.NAMES:
                (folder / name).write_bytes(data)


def read(path: Path) -> Model:
    """What `save` wrote.

    Raises:
      MalformedFileError: for a folder that is damaged.
    """
    folder = pathlib.Path(path)
    params = trees.load(folder / CODES)
    try:
        config = LlamaConfig.from_huggingface(read_json(folder / CONFIG))
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"{CONFIG}: {error}") from error
    shapes = {name: leaf.shape for name, leaf in by_path(params).items()}
    if shapes != config.shapes():
        wrong = sorted(set(shapes.items()) ^ set(config.shapes().items()))[:2]
        raise MalformedFileError(
            f"{CODES} must have the parameters that {CONFIG} says; got {wrong}. Get "
            f"the folder again."
        )
    return Model(params, config, tokenizer_files.in_folder(folder))
