"""Our own folder format: parameters of any quantizer, dimensions and tokenizer."""

import pathlib

from cage_jax.core.finite import check_finite
from cage_jax.export import tokenizer_files, trees
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    as_path,
    has,
    inside,
    malformed,
    read_json,
    write_json,
)
from cage_jax.export.target import Target
from cage_jax.export.writing import new_folder
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path

CODES, CONFIG = "codes.safetensors", "config.json"


def save(model: Model, path: Path, *, overwrite: bool = False) -> None:
    """Writes a model to a folder that `cage_jax.load` reads.

    Args:
      model: a model with parameters of any quantizer.
      path: path of the folder.
      overwrite: whether to replace a folder that an export wrote, with nothing else
        in it.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if it
        holds anything that no export wrote.
      TypeError: if a parameter is neither floats nor codes.
      ValueError: if the model has no dimensions, or a parameter NaN or infinities.
    """
    if model.config is None:
        raise ValueError(
            "`model` must have a `config`; got None. Use cage_jax.export.save for a "
            "tree of any model."
        )
    check_finite(by_path(model.params), "model")
    with new_folder(path, overwrite=overwrite) as folder:
        trees.write_tree(model.params, folder / CODES)
        write_json(folder / CONFIG, model.config.to_huggingface())
        for name, data in model.tokenizer.items():
            if name in tokenizer_files.NAMES:
                (folder / name).write_bytes(data)


def read(path: Path) -> Model:
    """Reads a folder of `save`.

    Raises:
      MalformedFileError: if the folder is damaged.
    """
    folder = as_path(path)
    params = trees.load(inside(folder, CODES))
    try:
        config = LlamaConfig.from_huggingface(read_json(inside(folder, CONFIG)))
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"{CONFIG}: {error}") from error
    shapes = {name: leaf.shape for name, leaf in by_path(params).items()}
    if shapes != config.shapes():
        wrong = sorted(set(shapes.items()) ^ set(config.shapes().items()))[:2]
        raise malformed(f"{CODES} must have the parameters of {CONFIG}", wrong)
    return Model(params, config, tokenizer_files.read_folder(folder))


def is_folder(path: pathlib.Path) -> bool:
    """Tells whether a folder has the files that `save` writes."""
    return has(path, CODES, CONFIG)


TARGET = Target(
    written_by="export.native.save(model._replace(params=codes), path)",
    read_by="`cage.load`, all of `cage-jax`",
    holds="every quantizer, a Llama",
    recognises=is_folder,
    read=read,
)
