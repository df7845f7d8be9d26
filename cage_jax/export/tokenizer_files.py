"""Tokenizer files, as in a model's folder of transformers."""

import json
import os
from collections.abc import Mapping
from typing import Any

from cage_jax.export.files import Path, as_path, has, inside, read_bytes
from cage_jax.llama.config import LlamaConfig

NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_REMEDY = "Pass the folder that save_pretrained of the tokenizer wrote."


def read_folder(folder: Path) -> dict[str, bytes]:
    """Reads the tokenizer files of a folder by name.

    Raises:
      MalformedFileError: if one is no regular file, too large, or a link out of the
        folder.
    """
    folder = as_path(folder, "tokenizer")
    return {
        name: read_bytes(inside(folder, name)) for name in NAMES if has(folder, name)
    }


def resolve(
    tokenizer: Mapping[str, bytes] | Path | None, config: LlamaConfig
) -> Mapping[str, bytes]:
    """Resolves a `tokenizer` argument, bytes by name or a folder, to files by name.

    Raises:
      TypeError: if `tokenizer` is anything else.
      ValueError: if there are other files, or if the tokenizer has tokens outside the
        model's vocabulary and so belongs to another model.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | os.PathLike):
        files: Mapping[str, bytes] = read_folder(tokenizer)
        if not files:
            raise ValueError(
                f"`tokenizer` must be a folder with a tokenizer.json; got "
                f"{os.fspath(tokenizer)!r}, which has none. {_REMEDY}"
            )
    elif isinstance(tokenizer, Mapping):
        files = tokenizer
    else:
        raise TypeError(
            f"`tokenizer` must be a folder, or bytes by name; got "
            f"{type(tokenizer).__name__}. {_REMEDY}"
        )
    for name, data in files.items():
        if name not in NAMES:
            raise ValueError(
                f"`tokenizer` must have files of {NAMES}; got {name!r}. Leave it out, "
                f"or copy it into the folder."
            )
        if not isinstance(data, bytes | bytearray):
            raise TypeError(
                f"`tokenizer` must have bytes; got {type(data).__name__} for {name!r}. "
                f"Use pathlib.Path(...).read_bytes()."
            )
    if "tokenizer.json" in files:
        _check_vocabulary(parsed(files, "tokenizer.json"), config)
    return files


def parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Parses the JSON object in a tokenizer's file; raises ValueError for others."""
    if name not in files:
        raise ValueError(
            f"`tokenizer` must have {name!r}; got {sorted(files)}. {_REMEDY}"
        )
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`tokenizer` must have JSON in {name!r}; got {error}. Get the file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"`tokenizer` must have an object in {name!r}; got "
            f"{type(content).__name__}. Get the file again."
        )
    return content


def _check_vocabulary(content, config):
    try:
        ids = dict(content["model"]["vocab"])
        ids |= {each["content"]: each["id"] for each in content["added_tokens"]}
        text, number = max(ids.items(), key=lambda item: item[1])
    except (ValueError, TypeError, KeyError):
        return  # this kind of tokenizer numbers its tokens differently
    if number >= config.vocabulary:
        raise ValueError(
            f"`tokenizer` must have tokens below the {config.vocabulary} of `config`; "
            f"got {number} for {text!r}. Pass the tokenizer of this model."
        )
