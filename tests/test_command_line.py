"""The commands, from the shell's side: output, exit codes, files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from small_tokenizer import files_of, small_tokenizer

import cage_jax as cage
from cage_jax.command_line import main
from cage_jax.llama_config import LlamaConfig

pytest.importorskip("flax", reason="the model needs flax")
pytest.importorskip("gguf", reason="files of GGUF are written with it")
pytest.importorskip("tokenizers", reason="text is read with it")

from cage_jax import llama
from cage_jax.export.model import Model
from cage_jax.export.native import save
from cage_jax.perplexity import perplexity

CONFIG = LlamaConfig(
    vocabulary=300, width=64, hidden=96, layers=2, heads=4, kv_heads=2, tied=True
)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(__doc__ * 2)


@pytest.fixture(scope="module")
def params():
    return llama.initial_params(CONFIG, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params, tokenizer):
    """A model of floats, a text, and the codes of its weights at Q4_0."""
    folder = tmp_path_factory.mktemp("models")
    files = files_of(tokenizer)
    save(Model(params, CONFIG, files), folder / "floats")
    (folder / "text").write_text("what it says of them, and a little more " * 20)
    floats, codes = str(folder / "floats"), str(folder / "codes")
    embedding = ["--embedding", "q8_0"]
    assert main(["quantize", floats, codes, "--weights", "q4_0", *embedding]) == 0
    return folder


def printed(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def rules():
    table = [(r"layers/.*/kernel", cage.q4_0()), (r"emb.*", cage.q8_0(axis=-1))]
    return cage.Rules([*table, (r".*", None)])


def test_quantize_saves_the_codes(folder, params):
    found = cage.load(folder / "codes").params["layers"]["down"]["kernel"]
    expected = cage.quantize(params, rules())["layers"]["down"]["kernel"]
    assert found.quantizer == expected.quantizer
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_what_no_flag_is_for_stays_as_it_is(folder, capsys):
    flags = [folder / "codes", folder / "again", "--weights", "int8"]
    error = printed(capsys, "quantize", *flags).err
    assert error.startswith("warning: 7 parameters, such as layers/")
    assert "were codes and are rounded once more" in error
    text = printed(capsys, "check", flags[1], "--same-as", flags[0], code=3).out
    assert "embedding" not in text and "layers/up/kernel" in text


def test_report(folder, capsys, params):
    found = json.loads(printed(capsys, "report", folder / "codes", "--json").out)
    by_rules = rules().report(params)
    assert found["bytes"] == by_rules.bytes_after
    assert found["bits_per_weight"] == pytest.approx(by_rules.bits_per_weight)
    assert {row["path"] for row in found["parameters"]} == set(CONFIG.shapes())
    text = printed(capsys, "report", folder / "codes").out
    assert "layers/down/kernel" in text and "int4 full range signed max" in text


def test_report_of_what_would_be(folder, capsys, params):
    flags = ["--weights", "int4", "--group-size", "32", "--skip", "down", "--json"]
    found = json.loads(printed(capsys, "report", folder / "floats", *flags).out)
    rows = {row["path"]: row for row in found["parameters"]}
    assert rows["layers/down/kernel"]["quantizer"] is None
    kernel = np.asarray(params["layers"]["gate"]["kernel"], np.float64)
    quantizer = cage.int4(group_size=32)
    error = kernel - np.asarray(
        cage.fake_quant(params["layers"]["gate"]["kernel"], quantizer)
    )
    expected = np.linalg.norm(error) / np.linalg.norm(kernel)
    assert rows["layers/gate/kernel"]["relative_error"] == pytest.approx(expected, 1e-5)
    text = printed(capsys, "report", folder / "floats", *flags[:-1]).out
    assert f"{expected:.2%}" in text


def test_eval(folder, capsys, params, tokenizer):
    flags = ["--text", folder / "text", "--context", 16]
    found = json.loads(printed(capsys, "eval", folder / "codes", *flags, "--json").out)
    ids = tokenizer.encode((folder / "text").read_text()).ids
    values = cage.fake_quant(params, rules())
    expected = perplexity(values, ids, CONFIG, context=16)
    assert found["tokens"] == expected.tokens
    assert found["perplexity"] == pytest.approx(expected.value, 1e-6)
    text = printed(capsys, "eval", folder / "codes", *flags, "--tokens", 40).out
    assert text.startswith("perplexity ") and "of 30 tokens" in text


@pytest.mark.parametrize("out", ["shipped.gguf", "shipped"])
def test_export_and_check(folder, capsys, out):
    codes = folder / "codes"
    if out == "shipped":
        codes = folder / "int4"
        flags = ["--weights", "ct_w4a16", "--group-size", 32]
        printed(capsys, "quantize", folder / "floats", codes, *flags)
    assert "bytes" in printed(capsys, "export", codes, folder / out).out
    text = printed(capsys, "check", folder / out, "--same-as", codes).out
    assert text.startswith("well-formed: ") and "the same codes and scales" in text
    other = folder / "floats"
    text = printed(capsys, "check", folder / out, "--same-as", other, code=3).out
    assert "layers/down/kernel: codes in one, floats in the other" in text


def test_check_sees_one_code(folder, capsys, params):
    model = cage.load(folder / "codes")
    kernel = model.params["layers"]["up"]["kernel"]
    codes = kernel.codes.at[1, 2, 3].set(kernel.codes[1, 2, 3] ^ 1)
    object.__setattr__(kernel, "codes", codes)
    save(model, folder / "other")
    flags = [folder / "other", "--same-as", folder / "codes", "--json"]
    found = json.loads(printed(capsys, "check", *flags, code=3).out)
    assert found["differences"] == ["layers/up/kernel: 1 of 12288 codes"]


def test_check_refuses_what_is_not_finite(folder, capsys, params):
    norm = {"scale": params["norm"]["scale"].at[3].set(np.nan)}
    save(Model(params | {"norm": norm}, CONFIG, {}), folder / "nan")
    error = printed(capsys, "check", folder / "nan", code=1).err
    assert error == "error: `norm/scale`: the values must be finite; got 1 not\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "must be a file or a folder; got 'nowhere'"),
        (["quantize", "{floats}", "{out}"], "`--weights` must say"),
        (["quantize", "{floats}", "{codes}", "--weights", "q4_0"], "must not be there"),
        (
            [
                "quantize",
                "{floats}",
                "{out}",
                "--weights",
                "q4_0",
                "--group-size",
                "16",
            ],
            "`--group-size` has no meaning for q4_0",
        ),
        (["report", "{floats}", "--asymmetric"], "without --weights"),
        (
            ["report", "{floats}", "--weights", "int4", "--skip", "("],
            "`--skip` must be",
        ),
        (
            [
                "quantize",
                "{floats}",
                "{out}",
                "--weights",
                "int4",
                "--group-size",
                "48",
            ],
            "`layers/gate/kernel`: `group_size` must divide",
        ),
        (["export", "{codes}", "{out}"], "`embedding/embedding`: "),
        (["eval", "{nothing}", "--text", "{text}"], "must be a file or a folder"),
        (["eval", "{codes}", "--text", "{binary}"], "must be UTF-8"),
        (["eval", "{codes}", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    (folder / "binary").write_bytes(b"\xff\xfe")
    places = {
        name: str(folder / name)
        for name in ("floats", "codes", "out", "text", "nothing", "binary")
    }
    filled = [argument.format(**places) for argument in arguments]
    found = printed(capsys, *filled, code=1)
    assert found.out == ""
    assert found.err.startswith("error: ") and found.err.count("\n") == 1
    assert message in found.err
    assert not (folder / "out").exists()


def test_flags_that_there_are_not():
    with pytest.raises(SystemExit) as stop:
        main(["report", "model", "--weights", "int5"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "command", [[], ["report"], ["quantize"], ["export"], ["eval"], ["check"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example: cage-jax" in text if command else "COMMAND" in text


def test_the_program_is_installed(folder):
    program = [sys.executable, "-m", "cage_jax.command_line"]
    done = subprocess.run(
        [*program, "check", str(folder / "codes")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("well-formed: ")
