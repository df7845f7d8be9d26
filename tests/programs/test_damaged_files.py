"""Damaged files: a part of what `make fuzz` tries."""

import pytest

pytest.importorskip("gguf", reason="files of GGUF are written with it")
pytest.importorskip("safetensors", reason="files are written with it")
pytest.importorskip("tokenizers", reason="a tokenizer is trained with it")

import fuzzing


@pytest.mark.timeout(1800)
def test_damaged_files_are_read_or_refused():
    fuzzing.check(200, seed=2)
