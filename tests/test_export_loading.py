"""`cage_jax.load`: the reader that a path goes to, and errors where there is none."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tokenizer import files_of, small_tokenizer

import cage_jax as cage
from cage_jax.llama_config import LlamaConfig

pytest.importorskip("flax", reason="the model needs flax")
pytest.importorskip("gguf", reason="files of GGUF are written with it")

from cage_jax import llama
from cage_jax.export import tokenizer_files
from cage_jax.export.checking import differences
from cage_jax.export.model import Model
from cage_jax.export.native import save
from cage_jax.export.tensors import by_path

CONFIG = LlamaConfig(vocabulary=300, width=64, hidden=96, layers=2, heads=4, eos=(0,))
KERNELS = cage.Rules([("layers/.*/kernel", cage.q4_0()), (".*", None)])


@pytest.fixture(scope="module")
def codes():
    return cage.quantize(llama.initial_params(CONFIG, seed=0), KERNELS)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers", reason="a tokenizer is trained with it")
    return files_of(small_tokenizer(__doc__ * 5))


def folder_of_native(codes, tokenizer, path):
    save(Model(codes, CONFIG, tokenizer), path)


def folder_of_transformers(codes, tokenizer, path):
    cage.export.compressed_tensors(codes, CONFIG, path, tokenizer=tokenizer)


def file_of_llama_cpp(codes, tokenizer, path):
    cage.export.gguf(codes, CONFIG, path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "write", [folder_of_native, folder_of_transformers, file_of_llama_cpp]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_llama_with_its_tokenizer(write, as_text, codes, tokenizer, tmp_path):
    path = tmp_path / "model"  # what it is shows in what it has
    write(codes, tokenizer, path)
    model = cage.load(str(path) if as_text else path)
    assert model.config == CONFIG
    assert model.tokenizer.keys() == tokenizer.keys()
    # By what is stored: not every file says how its codes were found.
    assert not differences(by_path(model.params), by_path(codes))


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_tree_of_any_model(as_folder, codes, tmp_path):
    write, name = cage.export.save, "codes.safetensors"
    if as_folder:
        pytest.importorskip("orbax.checkpoint", reason="it writes the folder")
        write, name = cage.export.save_orbax, "codes"
    kernel = codes["layers"]["up"]["kernel"]
    write({"any": kernel}, tmp_path / name)
    params, config, tokenizer = cage.load(tmp_path / name)
    assert config is None and tokenizer == {}
    jax.tree.map(np.testing.assert_array_equal, params["any"], kernel)


@pytest.mark.parametrize(
    "name", ["nothing", "models/nothing.gguf", "a/b/c", "../x", "{here}/nothing"]
)
def test_what_is_not_there_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises((FileNotFoundError, ValueError), match="`path` must be a"):
        cage.load(name.format(here="here"))


def test_a_name_on_the_hub(codes, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="it asks the hub")
    cage.export.compressed_tensors(codes, CONFIG, tmp_path / "model")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "model")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert cage.load("someone/a-model_1.5").config == CONFIG
    assert asked == [("someone/a-model_1.5", ["*.safetensors", "*.json", "*.jinja"])]

    def fail(*_, **__):
        raise RuntimeError("no such model\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"can be reached; got .* \(no such model\)"):
        cage.load("someone/nothing")


@pytest.mark.parametrize("path", [None, 3, b"model", ["model"]])
def test_paths_that_are_none(path):
    with pytest.raises(TypeError, match="`path` must be a path; got "):
        cage.load(path)


def test_without_the_reader(codes, tmp_path, monkeypatch):
    cage.export.gguf(codes, CONFIG, tmp_path / "model.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ImportError, match=r'package gguf, .* "cage_jax\[export\]"'):
        cage.load(tmp_path / "model.gguf")


def test_files_and_folders_of_something_else(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(cage.export.MalformedFileError, match="got file, which is neit"):
        cage.load(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("text")
    with pytest.raises(ValueError, match=r"with a config.json; got .*\['notes'\]"):
        cage.load(tmp_path / "folder")


def test_a_folder_that_lost_its_config(codes, tmp_path):
    save(Model(codes, CONFIG, {}), tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"with a config.json; got .*codes.safetensor"):
        cage.load(tmp_path / "model")


# --- tokenizers -----------------------------------------------------------------------


def writers():
    return [cage.export.compressed_tensors, cage.export.gguf]


@pytest.mark.parametrize("write", writers())
def test_a_tokenizer_by_its_folder(write, codes, tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(ValueError, match="`tokenizer` must be a folder with a tok"):
        write(codes, CONFIG, tmp_path / "model", tokenizer=folder)
    for name, data in tokenizer.items():
        (folder / name).write_bytes(data)
    (folder / "model.safetensors").write_bytes(b"of no interest")
    write(codes, CONFIG, tmp_path / "model", tokenizer=str(folder))
    write(codes, CONFIG, tmp_path / "other", tokenizer=tokenizer)
    ours, theirs = (cage.load(tmp_path / name) for name in ("model", "other"))
    assert ours.tokenizer == theirs.tokenizer and ours.tokenizer


@pytest.mark.parametrize("write", writers())
def test_a_tokenizer_of_another_model(write, codes, tokenizer, tmp_path):
    content = json.loads(tokenizer["tokenizer.json"])
    token = {"id": 300, "content": "one more", "special": False}
    more = content | {"added_tokens": [*content["added_tokens"], token]}
    files = tokenizer | {"tokenizer.json": json.dumps(more).encode()}
    with pytest.raises(ValueError, match="below the 300 of `config`; got 300 for 'one"):
        write(codes, CONFIG, tmp_path / "model", tokenizer=files)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", writers())
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            small_tokenizer,
            TypeError,
            "must be a folder, or bytes by name; got f",
        ),
        ({"tokenizer.json": "{}"}, TypeError, "must have bytes; got str for 'tokeni"),
        ({"../tokenizer.json": b"{}"}, ValueError, "must have files of .*got '../tok"),
        ({"config.json": b"{}"}, ValueError, "must have files of .*got 'config.json'"),
    ],
)
def test_what_is_no_tokenizer(write, given, error, message, codes, tmp_path):
    with pytest.raises(error, match=f"`tokenizer` {message}"):
        write(codes, CONFIG, tmp_path / "model", tokenizer=given)
    assert not list(tmp_path.iterdir())


# --- what is not written --------------------------------------------------------------


@pytest.mark.parametrize("write", writers())
def test_numbers_that_are_none(write, codes, tmp_path):
    norm = {"scale": codes["norm"]["scale"].at[3].set(np.nan)}
    with pytest.raises(ValueError, match=r"^`norm/scale`: `codes` must have finite v"):
        write(codes | {"norm": norm}, CONFIG, tmp_path / "model")
    kernel = codes["layers"]["up"]["kernel"]
    scale = kernel.scale.at[1, 0, 2].set(np.inf)
    layers = codes["layers"] | {
        "up": {"kernel": dataclasses.replace(kernel, scale=scale)}
    }
    with pytest.raises(ValueError, match=r"^`layers/1/up/kernel`: .* finite scales"):
        write(codes | {"layers": layers}, CONFIG, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", writers())
def test_arguments_in_another_order(write, codes, tmp_path):
    with pytest.raises(TypeError, match="`path` must be a path; got NoneType"):
        write(codes, CONFIG, None)
    with pytest.raises(
        TypeError, match=r"^`codes` must be floats and Quan.*LlamaConfig"
    ):
        write(CONFIG, CONFIG, tmp_path / "model")
    with pytest.raises(TypeError, match=r"got a whole Model. Use model.params"):
        write(Model(codes, CONFIG, {}), CONFIG, tmp_path / "model")
    with pytest.raises(TypeError, match="`path` must be a path; got dict"):
        cage.export.save(tmp_path / "a.safetensors", codes)


def test_a_dtype_of_jax_is_one(codes, tmp_path):
    with pytest.raises(ValueError, match=r"`dtype` must be 'float16' .* got 'bfloat1"):
        cage.export.compressed_tensors(
            codes, CONFIG, tmp_path / "model", dtype=jnp.bfloat16
        )


def test_what_no_export_wrote_is_not_replaced(codes, tmp_path):
    out = tmp_path / "out"
    write = cage.export.compressed_tensors
    for name in ("thesis.tex", "folder"):
        out.mkdir()
        if name == "folder":
            (out / name).mkdir()
        else:
            (out / name).write_text("of years")
        with pytest.raises(FileExistsError, match=f"to be replaced; got .*{name}"):
            write(codes, CONFIG, out, overwrite=True)
        assert (out / name).exists()
        shutil.rmtree(out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="with a link"):
        write(codes, CONFIG, tmp_path / "link", overwrite=True)
    (tmp_path / "elsewhere" / "x").write_text("")
    with pytest.raises(FileExistsError, match=r"a folder. Use another path"):
        cage.export.gguf(codes, CONFIG, tmp_path / "elsewhere", overwrite=True)


@pytest.mark.parametrize(
    "write", [folder_of_native, folder_of_transformers, file_of_llama_cpp]
)
def test_what_an_export_wrote_is_replaced(write, codes, tokenizer, tmp_path):
    path = tmp_path / "model"
    files = dict.fromkeys(tokenizer_files.NAMES, b"{}")
    if write is file_of_llama_cpp:
        files = tokenizer
    write(codes, files, path)
    if write is file_of_llama_cpp:
        cage.export.gguf(codes, CONFIG, path, overwrite=True)
    else:
        cage.export.compressed_tensors(codes, CONFIG, path, overwrite=True)
    assert cage.load(path).tokenizer == {}
