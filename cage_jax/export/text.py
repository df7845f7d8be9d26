"""Text to tokens, by the tokenizer that came with a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cage_jax.export.files import MalformedFileError


def tokenizer_of(files: Mapping[str, bytes]) -> Any:
    """The `tokenizers.Tokenizer` of a model.

    Args:
      files: by name, as `Model.tokenizer` has them.

    Raises:
      ValueError: for a model without one.
      MalformedFileError: for a file that is none.
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
    """The tokens of a text, int32, without those that begin or end it."""
    tokenizer = tokenizer_of(files)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
