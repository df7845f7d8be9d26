"""The installed command, in a process of its own."""

import subprocess
import sys

import pytest
from small_llama import CONFIG, params_of
from small_tokenizer import files_of, small_tokenizer

pytest.importorskip("tokenizers", reason="text is read with it")

from cage_jax.export.native import save
from cage_jax.llama.loaded import Model


def test_the_program_is_installed(tmp_path):
    tokenizer = files_of(small_tokenizer("It was the best of times. " * 10))
    save(Model(params_of(), CONFIG, tokenizer), tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "cage_jax.cli.main", "check", tmp_path / "model"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, f"reading {tmp_path / 'model'}\n")
    assert done.stdout.startswith("well-formed: ")
