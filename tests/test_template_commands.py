"""`cage-jax export --template` and `audit` of models of any architecture."""

import numpy as np
import pytest
from small_llama import CONFIG, params_of

import cage_jax as cage
from cage_jax import export
from cage_jax.cli.main import main

pytest.importorskip("gguf", reason="files of GGUF are written with it")

from small_gguf import file_of

PATTERN = r".*(gate|up|down)(_proj|_exps)?\.weight"
RULES = cage.Rules([(PATTERN, cage.q4_0(axis=-1)), (".*", None)])


def printed(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main([*map(str, arguments), "--quiet"]) == code
    return capsys.readouterr()


@pytest.fixture
def folder(tmp_path):
    """Floats in a transformers folder and in a GGUF, and their rules."""
    export.compressed_tensors(params_of(), CONFIG, tmp_path / "floats")
    export.gguf(params_of(), CONFIG, tmp_path / "floats.gguf")
    (tmp_path / "rules.json").write_text(export.rules_to_json(RULES))
    return tmp_path


def test_one_training_for_both(folder, capsys):
    floats, rules = folder / "floats", folder / "rules.json"
    codes = cage.quantize(export.read_tensors(floats), RULES)
    trained = folder / "codes.safetensors"
    export.save(codes, trained)
    template = ["--template", folder / "floats.gguf", "--names", "transformers"]
    text = printed(capsys, "export", trained, folder / "it.gguf", *template).out
    assert text.endswith(" bytes, gguf\n")
    export.gguf(
        codes, folder / "floats.gguf", folder / "same.gguf", names="transformers"
    )
    assert (folder / "it.gguf").read_bytes() == (folder / "same.gguf").read_bytes()
    printed(capsys, "export", trained, folder / "it", "--template", floats)
    by_names = ["--names", "transformers"]
    for file, flags in {"it.gguf": by_names, "it": []}.items():
        for given in ([trained], [floats, "--rules", rules]):
            flags_of = ["--trained", *given, *flags]
            assert (
                "as trained" in printed(capsys, "audit", folder / file, *flags_of).out
            )
    other = codes | {"model.norm.weight": np.ones(64, np.float32) / 3}
    export.save(other, folder / "other.safetensors")
    flags = ["--trained", folder / "other.safetensors", *by_names]
    text = printed(capsys, "audit", folder / "it.gguf", *flags, code=3).out
    assert "`output_norm.weight`: 64 of 64 values differ" in text


def test_a_model_of_another_architecture(folder, rng, capsys):
    file_of(folder / "new.gguf", rng)
    codes = cage.quantize(export.read_tensors(folder / "new.gguf"), RULES)
    export.save(codes, folder / "codes.safetensors")
    flags = ["--template", folder / "new.gguf"]
    printed(capsys, "export", folder / "codes.safetensors", folder / "it.gguf", *flags)
    for trained in ("codes.safetensors", "new.gguf"):
        flags = ["--trained", folder / trained]
        flags += ["--rules", folder / "rules.json"] if trained == "new.gguf" else []
        assert "as trained" in printed(capsys, "audit", folder / "it.gguf", *flags).out


def test_what_cannot_be_written(folder, capsys):
    export.save({"a": np.ones(3, np.float32)}, folder / "a.safetensors")
    model, out = folder / "a.safetensors", folder / "out.gguf"
    floats = folder / "floats.gguf"
    for arguments, message in [
        ([model, out, "--template", folder / "no"], "`--template` must be a GGUF file"),
        ([model, folder / "out", "--template", floats], "`--template` must be the fol"),
        ([model, out, "--template", floats], "`MODEL` must have the parameters of the"),
        ([model, out, "--names", "tunix"], "`--names` has no effect without --templ"),
        (
            [model, out, "--template", floats, "--names", "flax"],
            "`--names` must be a table; got 'flax'. Use one of ['cage', 'transf",
        ),
        ([model, out], "`MODEL` must be a Llama for this command"),
    ]:
        found = printed(capsys, "export", *arguments, code=1)
        assert found.err.startswith("error: ") and not found.out
        assert message in found.err
        assert not (folder / "out").exists() and not out.exists()
