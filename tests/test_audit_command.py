"""`cage-jax audit`: its flags, its exit codes, its output."""

import dataclasses
import json

import numpy as np
import pytest
from small_llama import CONFIG, params_of, with_leaf

import cage_jax as cage
from cage_jax.cli.main import main
from cage_jax.export.native import save
from cage_jax.llama.loaded import Model

pytest.importorskip("gguf", reason="files of GGUF are written with it")

RULES = cage.Rules(
    [
        (r"layers/.*/kernel", cage.q4_0(axis=-2)),
        (r"emb.*", cage.q8_0(axis=-1)),
        (r".*", None),
    ]
)


@pytest.fixture(scope="module")
def codes():
    return cage.quantize(params_of(), RULES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, codes):
    """The floats of a training, their codes, and their rules."""
    folder = tmp_path_factory.mktemp("models")
    save(Model(params_of(), CONFIG, {}), folder / "floats")
    save(Model(codes, CONFIG, {}), folder / "codes")
    (folder / "rules.json").write_text(cage.export.rules_to_json(RULES))
    return folder


def printed(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["audit", *map(str, arguments), "--quiet"]) == code
    return capsys.readouterr()


def test_a_file_and_its_training(tmp_path, folder, codes, capsys):
    file, floats = tmp_path / "it.gguf", ["--trained", folder / "floats"]
    cage.export.gguf(codes, CONFIG, file)
    for flags in (
        [*floats, "--rules", folder / "rules.json"],
        [*floats, "--weights", "q4_0", "--embedding", "q8_0"],
        ["--trained", folder / "codes"],
    ):
        assert "as trained" in printed(capsys, file, *flags).out
    kernel = codes["layers"]["up"]["kernel"]
    numbers = np.array(kernel.codes)
    numbers[1, 2, 3] = ~numbers[1, 2, 3]
    kernel = dataclasses.replace(kernel, codes=numbers)
    other = with_leaf(codes, "layers/up/kernel", kernel)
    cage.export.gguf(other, CONFIG, file, overwrite=True)
    flags = [file, *floats, "--rules", folder / "rules.json"]
    text = printed(capsys, *flags, code=3).out
    assert "`blk.1.ffn_up.weight`: 1 of 8192 codes differ, first at (3, 2): " in text
    content = json.loads(printed(capsys, *flags, "--json", code=3).out)
    (finding,) = content["findings"]
    assert (finding["path"], finding["kind"]) == ("blk.1.ffn_up.weight", "codes")
    assert not content["ok"] and len(content["tensors"]) == 3 + 9 * CONFIG.layers


def test_floats_alone(tmp_path, codes, capsys):
    """A checkpoint of floats on a grid, by our names and by those of its files."""
    on_grid, rules = tmp_path / "on", tmp_path / "rules.json"
    values = cage.dequantize(codes)
    cage.export.compressed_tensors(values, CONFIG, on_grid, dtype="bfloat16")
    found = printed(capsys, on_grid, "--weights", "q4_0", "--json").out
    rows = {row["path"]: row for row in json.loads(found)["tensors"]}
    row = rows["model.layers.0.mlp.up_proj.weight"]
    assert row["grid"]["share"] == 1 and row["grid"]["values"] <= 16
    assert rows["model.norm.weight"]["grid"] is None
    quantizer = cage.int4(axis=-1, group_size=64)
    table = cage.Rules([(r".*up_proj\.weight", quantizer)])
    rules.write_text(cage.export.rules_to_json(table))
    text = printed(capsys, on_grid, "--rules", rules, code=3).out
    assert f"{CONFIG.layers} findings" in text and "floats in the file" in text


def test_what_cannot_be_read(tmp_path, folder, capsys):
    (tmp_path / "wrong.json").write_text("{}")
    codes = folder / "codes"
    for arguments, message in [
        ([codes], "one of `--trained`, `--rules` and `--weights` must be given"),
        ([tmp_path / "no", "--weights", "int4"], "`MODEL` must be a file or a folder"),
        ([tmp_path / "no", "--trained", codes], "`MODEL` must be a file or a folder"),
        ([codes, "--trained", tmp_path / "no"], "`--trained` must be a file or a"),
        ([codes, "--rules", tmp_path / "wrong.json"], "`--rules` must be rules in"),
        ([codes, "--rules", "x", "--weights", "int4"], "`--rules` must be given alone"),
        ([codes, "--rules", ""], "`--rules` must not be empty"),
    ]:
        found = printed(capsys, *arguments, code=1)
        assert found.err.startswith("error: ") and found.err.count("\n") == 1
        assert message in found.err and not found.out
    found = printed(capsys, tmp_path / "no", "--trained", codes, "--json", code=1)
    assert json.loads(found.out)["ok"] is False
