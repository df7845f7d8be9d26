"""Tokenization of text by a model's own tokenizer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cage_jax.export.files import check_installed, malformed


def tokenizer_of(files: Mapping[str, bytes]) -> Any:
    """Makes the `tokenizers.Tokenizer` from files by name, as in `Model.tokenizer`.

    Raises:
      ValueError: if there is no tokenizer.json, or a malformed one.
    """
    check_installed("tokenizers", "reading text")
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files:
        raise ValueError(
            f"the model must have a tokenizer.json to read text; got "
            f"{sorted(files) or 'no tokenizer'}. Put it into the model's folder."
        )
    try:
        return Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises nothing narrower
        rule = "tokenizer.json must be a file of the library tokenizers"
        raise malformed(rule, error) from error


def encoded(files: Mapping[str, bytes], text: str) -> np.ndarray:
    """Returns the tokens of a text, int32, without special tokens at its ends."""
    tokenizer = tokenizer_of(files)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
