"""`cage_jax.load`: the reader that a path goes to, and errors where there is none."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, assert_same, random_codes
from small_llama import CONFIG, on_host, with_kernels, with_leaf
from small_tokenizer import files_of, small_tokenizer

import cage_jax as cage

pytest.importorskip("gguf", reason="files of GGUF are written with it")

from cage_jax.export import tokenizer_files
from cage_jax.export.checking import differences, problems
from cage_jax.export.files import MalformedFileError
from cage_jax.export.native import save
from cage_jax.export.writing import MARKER
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path

WRITERS = [cage.export.compressed_tensors, cage.export.gguf]


@pytest.fixture(scope="module")
def codes():
    """The tiny model with all kernels as Q4_0."""
    return on_host(with_kernels(cage.q4_0()))


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


kinds = pytest.mark.parametrize(
    "write", [folder_of_native, folder_of_transformers, file_of_llama_cpp]
)


@kinds
def test_a_llama_with_its_tokenizer(write, codes, tokenizer, tmp_path):
    path = tmp_path / "model"  # what it is shows in what it has
    write(codes, tokenizer, path)
    for given in (path, str(path)):
        model = cage.load(given)
        assert model.config == CONFIG
        assert model.tokenizer.keys() == tokenizer.keys()
        # By what is stored: not every file says how its codes were found.
        assert not differences(by_path(model.params), by_path(codes))


def test_a_tree_of_any_model(codes, tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="it writes the folder")
    kernel = codes["layers"]["up"]["kernel"]
    cage.export.save({"any": kernel}, tmp_path / "codes.safetensors")
    cage.export.save_orbax({"any": kernel}, tmp_path / "codes")
    for name in ("codes.safetensors", "codes"):
        params, config, tokenizer = cage.load(tmp_path / name)
        assert config is None and tokenizer == {}
        assert_same(params["any"], kernel)


def test_what_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    names = ("nothing", "models/nothing.gguf", "a/b/c", "../x", "here/nothing")
    errors, text = (FileNotFoundError, ValueError), "`path` must be a"
    assert_raises((lambda name=name: cage.load(name), errors, text) for name in names)


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


def test_paths_that_are_none():
    text = "`path` must be a path; got "
    assert_raises(
        (lambda path=path: cage.load(path), TypeError, text)
        for path in (None, 3, b"model", ["model"])
    )


def test_paths_that_nothing_can_have(codes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # so "" would be a model here
    calls = {
        "path": [
            cage.load,
            lambda path: cage.export.save({}, path),
            lambda path: cage.export.save_orbax({"a": np.ones(1)}, path),
            lambda path: cage.export.gguf(codes, CONFIG, path),
            lambda path: cage.export.compressed_tensors(codes, CONFIG, path),
            lambda path: save(Model(codes, CONFIG, {}), path),
        ],
        "tokenizer": [lambda path: tokenizer_files.resolve(path, CONFIG)],
    }
    for path, text in [
        ("", "not be empty; got ''"),
        ("a" * 5000, "name of a file or a folder; got 'aaa.*too long"),
        ("models/" * 1000, "name of a file or a folder; got 'mod.*too long"),
        ("a\0b", "name of a file or a folder; got 'a.x00b': .*null"),
        ("\ud800", "name of a file or a folder; got '.ud800'"),
    ]:
        assert_raises(
            (functools.partial(call, path), ValueError, f"^`{name}` must .*{text}")
            for name, functions in calls.items()
            for call in functions
        )
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_name_as_long_as_can_be(tmp_path):
    path = tmp_path / ("a" * 243 + ".safetensors")
    cage.export.save({"a": np.ones(1, np.float32)}, path)
    assert cage.load(path).params["a"].shape == (1,)


def test_weights_in_formats_of_others(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    pretrained = "AutoModelForCausalLM.from_pretrained"
    for name, line in [
        ("pytorch_model.bin", pretrained + r"\('{folder}'\).save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", pretrained),
        ("model.ckpt", pretrained + r"\('{folder}', from_tf=True\)"),
        ("tf_model.h5", pretrained + r"\('{folder}', from_tf=True\)"),
        ("flax_model.msgpack", pretrained + r"\('{folder}', from_flax=True\)"),
        ("model.pth", r"torch.load\('{folder}/model.pth'\)"),
        ("consolidated.00.pth", "convert_llama_weights_to_hf"),
    ]:
        file = tmp_path / name
        file.write_text("weights")
        line = line.replace("{folder}", str(tmp_path))
        text = f"`path` must have its weights in safetensors; .* in {name}.*: .*{line}"
        for given in (tmp_path, file):
            with pytest.raises(ValueError, match=text):
                cage.load(given)
        (tmp_path / "model.safetensors").write_text("damaged")  # and so not of others
        with pytest.raises(ValueError, match="model_type"):
            cage.load(tmp_path)
        for each in (file, tmp_path / "model.safetensors"):
            each.unlink()
    hub = pytest.importorskip("huggingface_hub", reason="it asks the hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"other files\. .*from_pretrained\('some/one'\)"
    ):
        cage.load("some/one")


def test_without_the_reader(codes, tmp_path, monkeypatch):
    cage.export.gguf(codes, CONFIG, tmp_path / "model.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ImportError, match=r"package gguf, .*cage_jax\[export\]"):
        cage.load(tmp_path / "model.gguf")


def test_files_and_folders_of_something_else(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(
        cage.export.MalformedFileError, match="got file, which is not a"
    ):
        cage.load(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("text")
    with pytest.raises(ValueError, match=r"with a config.json; got .*\['notes'\]"):
        cage.load(tmp_path / "folder")


def test_what_has_no_end_is_not_opened(codes, tokenizer, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", pathlib.Path("/dev/zero")):
        with pytest.raises(MalformedFileError, match="a FIFO, a socket or a device"):
            cage.load(path)
    save(Model(codes, CONFIG, tokenizer), tmp_path / "native")
    cage.export.compressed_tensors(
        codes, CONFIG, tmp_path / "shards", tokenizer=tokenizer, shard_bytes=100_000
    )
    cage.export.stablehlo(
        lambda params, x: x @ params["a"],
        {"a": codes["layers"]["up"]["kernel"]},
        tmp_path / "program",
        arguments=[np.ones((3, 64), np.float32)],
    )
    for name in ("native", "shards", "program"):
        folder = tmp_path / name
        for file in sorted(folder.iterdir()):
            if file.name in ("program.bin", "generation_config.json", MARKER):
                continue  # which are not read
            for other in (lambda path: path.symlink_to("/etc/hostname"), os.mkfifo):
                file.rename(tmp_path / "kept")
                other(file)
                with pytest.raises(MalformedFileError, match=r"FIFO|link to"):
                    cage.load(folder)
                    pytest.fail(file.name)
                file.unlink()
                (tmp_path / "kept").rename(file)
        cage.load(folder)


def test_a_folder_that_lost_its_config(codes, tmp_path):
    save(Model(codes, CONFIG, {}), tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"with a config.json; got .*codes.safetensor"):
        cage.load(tmp_path / "model")


# --- whether two models are the same, and well-formed ---------------------------------


def test_where_two_models_differ(rng):
    plain = cage.int4(group_size=32)
    codes = on_host(random_codes(rng, plain, (64, 32)))
    floats = rng.standard_normal((64, 32)).astype(np.float32)
    rotated = dataclasses.replace(plain, hadamard=32)
    asymmetric = cage.int4(group_size=32, symmetric=False)
    shifted = dataclasses.replace(
        codes, zero_point=codes.codes[:2], quantizer=asymmetric
    )
    scale, other = codes.scale.copy(), floats.copy()
    scale[1, 3] += 1
    other[5, 7] = np.nan

    for one, two, expected in [
        (codes, codes, []),
        (other, other, []),
        (floats, other, ["a: 1 of 2048 values differ"]),
        (floats, floats[:4], ["a: the shapes differ: (64, 32) and (4, 32)"]),
        (codes, floats, ["a: codes in one, floats in the other"]),
        (
            codes,
            dataclasses.replace(codes, scale=scale),
            ["a: 1 of 64 scales differ"],
        ),
        (
            codes,
            dataclasses.replace(codes, scale=codes.scale[:1]),
            ["a: scales differ in shape: (2, 32) and (1, 32)"],
        ),
        (
            codes,
            dataclasses.replace(codes, quantizer=rotated),
            ["a: rotated only in one of them"],
        ),
        (codes, shifted, ["a: zero points only in one of them"]),
    ]:
        assert differences({"a": one}, {"a": two}) == expected
        if "shape" not in str(expected):
            assert differences({"a": two}, {"a": one}) == expected
    found = differences({"a": codes, "b": codes}, {"a": codes, "c": codes})
    assert found == ["b: only in one of them", "c: only in one of them"]


def test_what_is_wrong_with_a_parameter(rng):
    def made(quantizer, **changes):
        codes = on_host(random_codes(rng, quantizer, (64, 32)))
        changes = {name: change(codes) for name, change in changes.items()}
        return dataclasses.replace(codes, **changes)

    def endless(part):
        part = part.copy()
        part[0, :2] = np.inf
        return part

    fp8 = made(cage.fp8(), codes=lambda codes: codes.codes * np.nan)
    low = made(cage.int4(), codes=lambda codes: np.full_like(codes.codes, -8))
    for leaf, text in [
        (made(cage.int4()), ""),
        (
            np.array([1.0, np.nan, np.inf]),
            "the values must be finite; got NaN or infinity in 2 places",
        ),
        (
            made(cage.int4(), scale=lambda codes: endless(codes.scale)),
            "the scales must be finite; got NaN or infinity in 2 places",
        ),
        (
            made(cage.q4_1(), offset=lambda codes: endless(codes.offset)),
            "the offsets must be finite; got NaN or infinity in 2 places",
        ),
        (
            fp8,
            f"the codes must be finite; got NaN or infinity in {fp8.codes.size} places",
        ),
        (low, "codes must be from -7 to 7; got -8 to -8"),
    ]:
        assert problems("a", leaf) == ([f"`a`: {text}"] if text else [])


# --- tokenizers -----------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS)
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


def test_a_tokenizer_of_another_model(codes, tokenizer, tmp_path):
    content = json.loads(tokenizer["tokenizer.json"])
    token = {"id": 320, "content": "one more", "special": False}
    more = content | {"added_tokens": [*content["added_tokens"], token]}
    files = tokenizer | {"tokenizer.json": json.dumps(more).encode()}
    text = "below the 320 of `config`; got 320 for 'one"
    for write in WRITERS:
        with pytest.raises(ValueError, match=text):
            write(codes, CONFIG, tmp_path / "model", tokenizer=files)
    assert not list(tmp_path.iterdir())


def test_what_is_no_tokenizer(codes, tmp_path):
    path, files = tmp_path / "model", "must have files of .*got "
    rows = [
        (small_tokenizer, TypeError, "must be a folder, or bytes by name; got f"),
        (
            {"tokenizer.json": "{}"},
            TypeError,
            "must have bytes; got str for 'tokeni",
        ),
        ({"../tokenizer.json": b"{}"}, ValueError, f"{files}'../tok"),
        ({"config.json": b"{}"}, ValueError, f"{files}'config.json'"),
    ]
    assert_raises(
        (
            lambda write=write, given=given: write(
                codes, CONFIG, path, tokenizer=given
            ),
            error,
            f"`tokenizer` {text}",
        )
        for write in WRITERS
        for given, error, text in rows
    )
    assert not list(tmp_path.iterdir())


# --- what is not written --------------------------------------------------------------


def test_numbers_that_are_none(codes, tmp_path):
    norm = codes["norm"]["scale"].copy()
    norm[3] = np.nan
    kernel = codes["layers"]["up"]["kernel"]
    scale = kernel.scale.copy()
    scale[1, 0, 2] = np.inf
    endless = dataclasses.replace(kernel, scale=scale)
    rows = [
        (
            with_leaf(codes, "norm/scale", norm),
            r"^`norm/scale`: `codes` must have finite v",
        ),
        (
            with_leaf(codes, "layers/up/kernel", endless),
            r"^`layers/1/up/kernel`: .* finite scales",
        ),
    ]
    assert_raises(
        (
            lambda write=write, tree=tree: write(tree, CONFIG, tmp_path / "model"),
            ValueError,
            text,
        )
        for write in WRITERS
        for tree, text in rows
    )
    assert not list(tmp_path.iterdir())


def test_arguments_in_another_order(codes, tmp_path):
    path, model = tmp_path / "model", Model(codes, CONFIG, {})
    rows = [
        ((codes, CONFIG, None), "`path` must be a path; got NoneType"),
        ((CONFIG, CONFIG, path), r"^`codes` must be floats and Quan.*LlamaConfig"),
        ((model, CONFIG, path), r"got a whole Model. Use model.params"),
    ]
    assert_raises(
        (lambda write=write, given=given: write(*given), TypeError, text)
        for write in WRITERS
        for given, text in rows
    )
    with pytest.raises(TypeError, match="`path` must be a path; got dict"):
        cage.export.save(tmp_path / "a.safetensors", codes)


def test_a_dtype_of_jax_is_one(codes, tmp_path):
    with pytest.raises(ValueError, match=r"`dtype` must be 'float16' .* got 'bfloat1"):
        cage.export.compressed_tensors(
            codes, CONFIG, tmp_path / "model", dtype=jnp.bfloat16
        )


@kinds
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
