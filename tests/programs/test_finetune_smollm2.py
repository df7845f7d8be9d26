"""The whole path of the fine-tuning example, on a model with two small layers."""

import json
import pathlib

import jax
import pytest
from small_tokenizer import files_of, small_tokenizer

from cage_jax.llama.config import LlamaConfig

pytest.importorskip("flax", reason="the model needs flax")
pytest.importorskip("orbax", reason="the example needs the extra demo")
pytest.importorskip("transformers", reason="one of the readers")
pytest.importorskip("xllamacpp", reason="one of the readers")
pytest.importorskip("tokenizers", reason="text is read with it")

import finetune_smollm2 as example

from cage_jax import llama
from cage_jax.export.gguf import gguf

CONFIG = LlamaConfig(
    vocabulary=300,
    width=64,
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    tied=True,
    bos=0,
    eos=(0,),
)
# What other libraries say of themselves when they are imported or used.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("standard_promotion"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    text = pathlib.Path(example.__file__).read_text()
    params = llama.initial_params(CONFIG, seed=0)
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    files = files_of(small_tokenizer(text))
    gguf(params, CONFIG, folder / "model.gguf", tokenizer=files)
    (folder / "text").write_text(text)
    return folder


def run(monkeypatch, folder, *flags):
    model = ["--model", folder / "model.gguf", "--text", folder / "text"]
    sizes = ["--steps", 6, "--base-steps", 4, "--out", folder / "out"]
    arguments = ["program", "--tiny", *model, *sizes, *flags]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    return example.main()


def results(folder):
    return json.loads((folder / "out" / "results.json").read_text())["results"]


@pytest.mark.filterwarnings("ignore:the recommended pull")
def test_the_whole_path(folder, monkeypatch, capsys):
    assert run(monkeypatch, folder) == 0
    found = results(folder)
    assert set(found["targets"]) == set(example.SHIPPED)
    for row in found["targets"].values():
        assert abs(row["difference"]) < example.AGREEMENT + 2 * row["error"]
        assert row["error"] < 0.01
        # The weights are random and the steps few, so that 4 bits cost some percent.
        # The text is the source of the example, and its perplexity changes with it.
        assert [*row["after"]] == ["rounded", "gptq", "trained"]
        assert all(1 < value < 1.1 * found["base"] for value in row["after"].values())
    assert (folder / "out" / "q4_0.gguf").is_file()
    assert (folder / "out" / "ct_w4a16" / "model.safetensors").is_file()
    # A finished run is not touched, and with --resume it is not trained again.
    assert run(monkeypatch, folder) == 1
    assert "must not hold a run already" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, folder, "--resume") == 0
    assert "base was done before" in capsys.readouterr().out
    assert results(folder) == found


@pytest.mark.filterwarnings("ignore:the recommended pull")
def test_every_piece_on_and_off(folder, monkeypatch, capsys):
    out = folder / "pieces"
    flags = ["--targets", "int3", "--blocks", "--scales", "--out", out]
    assert run(monkeypatch, folder, *flags) == 0
    (row,) = json.loads((out / "results.json").read_text())["results"][
        "targets"
    ].values()
    stages = ["rounded", "gptq", "blocks", "trained", "scales"]
    assert [*row["after"]] == stages and row["difference"] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "GPTQ; block by block; 6 steps, distilled, with CAGE; 2 steps of" in printed
    assert "GB of logits" in printed
    out = folder / "plain"
    flags = ["--targets", "w4a4", "--start", "rounded", "--no-distill", "--no-cage"]
    assert run(monkeypatch, folder, *flags, "--out", out) == 0
    (row,) = json.loads((out / "results.json").read_text())["results"][
        "targets"
    ].values()
    assert [*row["after"]] == ["rounded", "trained"]


def test_refused(folder, monkeypatch, capsys, tmp_path):
    for flags, message in (
        (["--model", "nowhere"], "must be a file or a folder"),
        (["--batch", 0], "`--batch` must be at least 1"),
        (["--sequence", 100_000], "`--text` must hold"),
        (["--targets", "q4_0", "q4_0"], "each once"),
    ):
        assert run(monkeypatch, folder, *flags, "--out", tmp_path / "out") == 1
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith("error: ") and message in text
    # A reader that is missing is named before anything is trained.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(monkeypatch, folder, "--out", tmp_path / "new") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "`--targets` ct_w4a16 must have the package 'transformers'" in text
    assert not (tmp_path / "new").exists()
