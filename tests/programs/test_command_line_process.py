"""The installed command, in a process of its own."""

import os
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


def test_streams_that_are_closed_or_of_another_encoding(tmp_path):
    model = tmp_path / "módel ✓ \udc80"
    save(Model(params_of(), CONFIG, {}), model)
    command = [sys.executable, "-m", "cage_jax.cli.main"]

    def run(redirected, *arguments):
        return subprocess.run(
            ["bash", "-c", f'"$@" {redirected}', "bash", *command, *arguments],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            check=False,
        )

    flags = ["--weights", "int8", "--quiet"]
    done = run("", "quantize", model, f"{model} 2", *flags)
    assert done.returncode == 0 and rb"\u2713 \udc80 2: " in done.stdout, done.stderr
    for redirected in ("2>&-", ">&- 2>&-"):
        done = run(redirected, "check", model)
        assert done.returncode == 0, done
        assert done.stdout.startswith(b"well-formed") is (redirected == "2>&-")
        assert run(redirected, "check", "nowhere").returncode == 1
