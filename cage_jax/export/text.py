"""Tokenization of text by a model's own tokenizer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cage_jax.export.files import MalformedFileError


def tokenizer_of(files: Mapping[str, bytes]) -> Any:
    """Makes the `tokenizers.Tokenizer` of a model.

    Args:
      files: files by name, as in `Model.tokenizer`.

    Raises:
      ValueError: if the model has no tokenizer.
      MalformedFileError: if the file is not a tokenizer.
    """
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files:
        raise ValueError(
            f"the model must come with a tokenizer.json to read text; got "
            f"{sorted(files) or 'no file'} of a tokenizer. Put it in the model's "
            f"folder."
        )
    try:
        return Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises nothing narrower
        raise MalformedFileError(
            f"tokenizer.json must be one of the tokenizers library; got {error}. Get "
            f"the file again."
        ) from error


def encoded(files: Mapping[str, bytes], text: str) -> np.ndarray:
    """Returns the tokens of a text, int32, without special tokens at its ends."""
    tokenizer = tokenizer_of(files)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
