"""The commands, from the shell's side: output, exit codes, files."""

import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import assert_same
from oracles import absmax_round
from small_llama import (
    TIED,
    leaves_by_path,
    on_host,
    params_of,
    with_codes,
    with_leaf,
)
from small_tokenizer import files_of, small_tokenizer

import cage_jax as cage
from cage_jax.cli.main import main
from cage_jax.export import target
from cage_jax.export.checking import differences
from cage_jax.export.writing import new_folder
from cage_jax.llama.tensors import by_path
from cage_jax.quantizers.registry import PRESETS

pytest.importorskip("flax", reason="the model needs flax")
pytest.importorskip("gguf", reason="files of GGUF are written with it")
pytest.importorskip("tokenizers", reason="text is read with it")

from cage_jax.export.native import save
from cage_jax.llama.loaded import Model
from cage_jax.llama.perplexity import perplexity

WRITTEN = [name for name, each in target.targets().items() if each.write]
CONFIG = dataclasses.replace(TIED, context=2048)
PARAMS = params_of(CONFIG)
RULES = cage.Rules(
    [
        (r"layers/.*/kernel", cage.q4_0(axis=-2)),
        (r"emb.*", cage.q8_0(axis=-1)),
        (r".*", None),
    ]
)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(__doc__ * 2)


@pytest.fixture(scope="module")
def codes():
    return cage.quantize(PARAMS, RULES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model of floats, a text, and the codes of its weights at Q4_0."""
    folder = tmp_path_factory.mktemp("models")
    files = files_of(tokenizer)
    save(Model(PARAMS, CONFIG, files), folder / "floats")
    (folder / "text").write_text("what it says of them, and a little more " * 20)
    floats, codes = str(folder / "floats"), str(folder / "codes")
    embedding = ["--embedding", "q8_0"]
    assert main(["quantize", floats, codes, "--weights", "q4_0", *embedding]) == 0
    return folder


def printed(capsys, *arguments, code=0):
    capsys.readouterr()
    # Progress is left out where an error is looked for.
    assert main([*map(str, arguments), "--quiet"]) == code
    return capsys.readouterr()


def test_quantize_saves_the_codes(folder, codes):
    assert_same(cage.load(folder / "codes").params, codes)


def test_what_no_flag_is_for_stays_as_it_is(folder, capsys):
    flags = [folder / "codes", folder / "again", "--weights", "int8"]
    error = printed(capsys, "quantize", *flags).err
    assert error.startswith("warning: 7 parameters, such as layers/")
    assert "were codes and are rounded once more" in error
    text = printed(capsys, "check", flags[1], "--same-as", flags[0], code=3).out
    assert "embedding" not in text and "layers/up/kernel" in text


def test_report(folder, capsys):
    found = json.loads(printed(capsys, "report", folder / "codes", "--json").out)
    by_rules = RULES.report(PARAMS)
    assert found["bytes"] == by_rules.bytes_after
    assert found["bits_per_weight"] == pytest.approx(by_rules.bits_per_weight)
    assert {row["path"] for row in found["parameters"]} == set(CONFIG.shapes())
    text = printed(capsys, "report", folder / "codes").out
    assert "layers/down/kernel" in text and "int4 full range signed max" in text


def test_tune(folder, capsys, standard_promotion):
    flags = folder / "floats", "--weights", "int4", "--report", "--json"
    found = json.loads(printed(capsys, "tune", *flags).out)
    assert found["device"] == "cpu" and found["faults"] == []
    paths = {path for form in found["forms"] for path in form["paths"]}
    assert paths == {path for path in CONFIG.shapes() if path.endswith("kernel")}
    assert {form["is_kernel"] for form in found["forms"]} == {False}
    error = printed(capsys, "tune", *flags[:3], code=1).err
    assert "`tune` must run where there is a TPU or a GPU; got cpu" in error
    assert "`--weights`, " in printed(capsys, "tune", folder / "floats", code=1).err


def test_report_of_what_would_be(folder, capsys):
    flags = ["--weights", "int4", "--group-size", "32", "--skip", "down", "--json"]
    found = json.loads(printed(capsys, "report", folder / "floats", *flags).out)
    rows = {row["path"]: row for row in found["parameters"]}
    assert rows["layers/down/kernel"]["quantizer"] is None
    kernel = np.asarray(PARAMS["layers"]["gate"]["kernel"], np.float64)
    error = kernel - absmax_round(kernel, group=32)
    expected = np.linalg.norm(error) / np.linalg.norm(kernel)
    assert rows["layers/gate/kernel"]["relative_error"] == pytest.approx(expected, 1e-5)
    text = printed(capsys, "report", folder / "floats", *flags[:-1]).out
    assert f"{expected:.2%}" in text


def test_eval(folder, capsys, codes, tokenizer):
    flags = ["--text", folder / "text", "--context", 16]
    found = json.loads(printed(capsys, "eval", folder / "codes", *flags, "--json").out)
    ids = tokenizer.encode((folder / "text").read_text()).ids
    expected = perplexity(cage.dequantize(codes), ids, CONFIG, context=16)
    assert found["tokens"] == expected.tokens
    assert found["perplexity"] == pytest.approx(expected.value, 1e-6)
    text = printed(capsys, "eval", folder / "codes", *flags, "--tokens", 40).out
    assert text.startswith("perplexity ") and "of 30 tokens" in text


@pytest.mark.parametrize("out", ["shipped.gguf", "shipped"])
def test_export_and_check(folder, capsys, out):
    codes = folder / "codes"
    if out == "shipped":
        codes = folder / "int4"
        params = cage.load(folder / "codes").params | {"embedding": PARAMS["embedding"]}
        quantizer = cage.ct_w4a16(group_size=32)
        params = with_codes(params, "layers/down/kernel", quantizer)
        save(Model(params, CONFIG, {}), codes)
    assert "bytes" in printed(capsys, "export", codes, folder / out).out
    text = printed(capsys, "check", folder / out, "--same-as", codes).out
    assert text.startswith("well-formed: ") and "the same codes and scales" in text
    other = folder / "floats"
    text = printed(capsys, "check", folder / out, "--same-as", other, code=3).out
    assert "layers/down/kernel: codes in one, floats in the other" in text


def test_check_sees_one_code(folder, capsys):
    model = cage.load(folder / "codes")
    kernel = model.params["layers"]["up"]["kernel"]
    codes = np.array(kernel.codes)
    codes[1, 2, 3] = int(codes[1, 2, 3]) ^ 1
    kernel = dataclasses.replace(kernel, codes=codes)
    params = with_leaf(model.params, "layers/up/kernel", kernel)
    save(model._replace(params=params), folder / "other")
    flags = [folder / "other", "--same-as", folder / "codes", "--json"]
    found = json.loads(printed(capsys, "check", *flags, code=3).out)
    assert found["differences"] == ["layers/up/kernel: 1 of 16384 codes differ"]


def test_every_command_refuses_what_is_not_finite(tmp_path, folder, capsys):
    kernel = np.array(PARAMS["layers"]["up"]["kernel"])
    kernel[0, 3] = np.nan
    params = with_leaf(PARAMS, "layers/up/kernel", kernel)
    model, out = tmp_path / "nan", tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:  # as another program may write it
        for module in ("native", "trees"):
            patch.setattr(f"cage_jax.export.{module}.check_finite", lambda *_: None)
        save(Model(params, CONFIG, {}), model)
    places = kernel.shape[-1]
    message = f"the values must be finite; got NaN or infinity in {places} places"
    for arguments in (
        ["check", model],
        ["check", folder / "floats", "--same-as", model],
        ["report", model],
        ["report", model, "--weights", "q4_0"],
        ["quantize", model, out, "--weights", "q4_0"],
        ["export", model, out],
        ["export", model, tmp_path / "out.gguf"],
        ["eval", model, "--text", folder / "text"],
    ):
        found = printed(capsys, *arguments, code=1)
        assert f"error: `layers/up/kernel`: {message}. Look" in found.err, arguments
        assert found.out == "" and list(tmp_path.iterdir()) == [model], arguments


def test_a_loss_that_is_not_finite_is_refused(tmp_path, folder, capsys):
    norm = np.full_like(PARAMS["norm"]["scale"], 1e38)
    params = with_leaf(PARAMS, "norm/scale", norm)
    save(Model(params, CONFIG, cage.load(folder / "floats").tokenizer), tmp_path / "it")
    flags = "--text", folder / "text", "--context", 16
    error = printed(capsys, "eval", tmp_path / "it", *flags, code=1).err
    assert "`MODEL` must give finite logits" in error


def test_errors_of_large_and_small_weights(tmp_path, capsys):
    def error_of(size):
        path = tmp_path / str(size)
        params = jax.tree.map(lambda x: x * np.float32(size), PARAMS)
        save(Model(params, CONFIG, {}), path)
        flags = "--weights", "int4", "--json"
        rows = json.loads(printed(capsys, "report", path, *flags).out)["parameters"]
        return [row["relative_error"] for row in rows if row["relative_error"]]

    # By powers of two, which change no digit; their squares are no float32s.
    expected = error_of(1.0)
    for size in (2.0**70, 2.0**-80):
        np.testing.assert_allclose(error_of(size), expected, 1e-6)


def test_groups_that_do_not_divide(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, hidden=120)
    save(Model(params_of(config), config, {}), tmp_path / "it")
    flags = ["report", tmp_path / "it", "--weights"]
    error = printed(capsys, *flags, "q4_0", code=1).err
    assert "`--weights` q4_0 has groups that must divide the 120 inputs of " in error
    assert "Use --skip layers/down/kernel, or another preset." in error
    printed(capsys, *flags, "q4_0", "--skip", "layers/down/kernel")
    error = printed(capsys, *flags, "int4", "--group-size", 32, code=1).err
    assert "`--group-size` must divide the 120 inputs" in error
    printed(capsys, *flags, "int4", "--group-size", 8)


ERRORS = [
    (["report", "nowhere"], "`MODEL` must be a file or a folder; got 'nowhere'"),
    (["report", "no/where.gguf"], "`MODEL` must be a file or a folder; got 'no/"),
    (["quantize", "{floats}", "{out}"], "one of `--weights`, "),
    (["quantize", "{floats}", "{codes}", "--weights", "q4_0"], "Use --overwrite"),
    (["export", "{codes}", "{floats}"], "Use --overwrite"),
    # OUT is looked at before a model is read.
    (["quantize", "nowhere", "{codes}", "--weights", "q4_0"], "`OUT` must not exist"),
    (["export", "nowhere", "{floats}"], "`OUT` must not exist"),
    (
        ["quantize", "{floats}", "{out}.gguf", "--weights", "q4_0"],
        "`OUT` must be the name of a folder",
    ),
    (
        ["report", "{floats}", "--weights", "int4", "--skip", "dwon"],
        "`--skip` must match a part of a parameter's path; got 'dwon'",
    ),
    (["report", "{floats}", "--head", "int4"], "Its head is its embedding"),
    (["report", "{tree}", "--weights", "int4"], "has no layers/.*/kernel"),
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
        "`--group-size` has no effect on q4_0",
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
        "must divide the 128 inputs of layers/down/kernel; got 48. Use --group",
    ),
    (["export", "{codes}", "{out}"], "`embedding/embedding`: "),
    (["eval", "{nothing}", "--text", "{text}"], "must be a file or a folder"),
    (["eval", "{codes}", "--text", "{binary}"], "must be UTF-8"),
    (["eval", "{codes}", "--text", "nowhere.txt"], "No such file"),
    (["eval", "nowhere", "--text", "nowhere.txt"], "`--text` must be readable files"),
    (["eval", "{codes}", "--text", "{empty}"], "must have at least two tokens"),
    (["eval", "{tree}", "--text", "{text}"], "`MODEL` must be a Llama"),
    (["check", "{codes}", "--same-as", "nowhere"], "`--same-as` must be a file"),
    (
        ["eval", "{codes}", "--text", "{text}", "--context", "2049"],
        "at most 2048",
    ),
    (["export", "{codes}", "{text}/out"], "`OUT` must be in a folder that can be"),
    (["export", "{codes}", ""], "`OUT` must not be empty"),
    (["export", "{codes}", "a" * 5000], "`OUT` must be the name of a file"),
    (["report", ""], "`MODEL` must not be empty"),
    (["report", "a" * 5000], "`MODEL` must be the name of a file"),
    (["check", "{codes}", "--same-as", ""], "`--same-as` must not be empty"),
    (["eval", "{codes}", "--text", ""], "`--text` must not be empty"),
    (
        ["quantize", "{floats}", "{floats}", "--weights", "int8", "--overwrite"],
        "`OUT` must differ from MODEL",
    ),
    (
        ["export", "{codes}", "{strange}", "--overwrite"],
        "`OUT` must hold only an export to be overwritten; got {strange}: thesis.tex, ",
    ),
    (
        ["export", "{codes}", "{strange}", "--overwrite", "--format", "gguf"],
        "got {strange}: a folder.",
    ),
    (
        ["export", "{codes}", "{hollow}", "--format", "gguf"],
        "`OUT` must be a file for this format; got {hollow}, a folder.",
    ),
]


def test_errors_are_one_line(folder, capsys):
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / "empty").write_bytes(b"")
    places = {name: str(folder / name) for name in ("floats", "codes", "out", "text")}
    places |= {name: str(folder / name) for name in ("nothing", "binary", "empty")}
    for name in ("strange", "hollow"):
        places[name] = str(folder / name)
        (folder / name).mkdir(exist_ok=True)
    (folder / "strange" / "thesis.tex").write_text("of years")
    places["tree"] = str(folder / "tree.safetensors")
    cage.export.save({"kernel": np.ones((4, 4), np.float32)}, places["tree"])
    for arguments, message in ERRORS:
        filled = [argument.format(**places) for argument in arguments]
        found = printed(capsys, *filled, code=1)
        assert found.out == "", arguments
        assert found.err.startswith("error: ") and found.err.count("\n") == 1
        assert message.format(**places) in found.err
        assert not (folder / "out").exists(), arguments
        assert (folder / "strange" / "thesis.tex").exists(), arguments


def test_nobody_reads_what_is_said(folder, monkeypatch, tmp_path):
    """A program goes on where its progress and warnings go nowhere."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    out = tmp_path / "out"
    assert main(["quantize", str(folder / "codes"), str(out), "--weights", "int8"]) == 0
    assert cage.load(out).config == CONFIG
    assert main(["check", "nowhere"]) == 1


def test_links_that_lead_nowhere(folder, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(link)
    flags = ["quantize", folder / "floats", link, "--weights", "int8", "--overwrite"]
    assert "link: a link. Remove" in printed(capsys, *flags, code=1).err


def test_an_orbax_folder_by_a_relative_path(tmp_path, monkeypatch, capsys):
    pytest.importorskip("orbax.checkpoint")
    cage.export.save_orbax({"kernel": np.ones((4, 4), np.float32)}, tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert "well-formed: 16 weights" in printed(capsys, "check", "a").out


def test_flags_that_there_are_not():
    with pytest.raises(SystemExit) as stop:
        main(["report", "model", "--weights", "int5"])
    assert stop.value.code == 2


def test_help(capsys):
    names = "report", "quantize", "export", "eval", "check", "audit", "tune"
    for command in [[], *([name] for name in names)]:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "example:\n  cage-jax" in text if command else "COMMAND" in text


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in ("quantize", "report", "export", "check"))


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    version = importlib.metadata.version("cage_jax")
    assert capsys.readouterr().out.startswith(f"cage_jax {version}, jax ")


def test_ctrl_c_while_the_package_is_imported(tmp_path):
    package = tmp_path / "cage_jax"
    package.mkdir()
    text = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (package / "__init__.py").write_text(text)
    root = pathlib.Path(cage.__file__).parents[1]
    shutil.copy(root / "cage_jax_cli.py", tmp_path)
    command = "import cage_jax_cli; cage_jax_cli.main()"
    with subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b"stopped.\n"
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_stopped_leaves_nothing(tmp_path, folder, capsys, number):
    def half(params, folder, **_):
        with new_folder(folder) as temporary:
            (temporary / "a part").write_text("of it")
            signal.raise_signal(number)

    out = tmp_path / "out"
    flags = ["quantize", folder / "floats", out, "--weights", "int8"]
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cage_jax.export.native.save", half)
        found = printed(capsys, *flags, code=128 + number)
    assert found.err == "stopped; nothing was written.\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_a_tokenizer_is_checked_too(tmp_path, folder, capsys):
    model = cage.load(folder / "codes")
    save(model._replace(tokenizer={"tokenizer.json": b"{"}), tmp_path / "broken")
    found = printed(capsys, "check", tmp_path / "broken", code=1)
    assert "tokenizer.json must be a file of the library tokenizers" in found.err
    flags = ["export", tmp_path / "broken", tmp_path / "out", "--format"]
    for name in WRITTEN:
        found = printed(capsys, *flags, name, code=1)
        assert "must have JSON in 'tokenizer.json'" in found.err
    save(model._replace(tokenizer={}), tmp_path / "without")
    found = printed(capsys, "check", tmp_path / "without")
    assert found.err == (
        "warning: the model has no tokenizer.json, so it cannot read text.\n"
    )


def test_an_export_is_replaced_where_that_is_asked(tmp_path, folder, capsys):
    for out in ("x.GGUF", "x.gguf"):
        text = printed(capsys, "export", folder / "codes", tmp_path / out).out
        assert text.endswith(" bytes, gguf\n") and (tmp_path / out).is_file()
    printed(capsys, "export", folder / "codes", tmp_path / "x.gguf", "--overwrite")
    flags = ["quantize", folder / "floats", tmp_path / "codes", "--weights", "int8"]
    printed(capsys, *flags)
    printed(capsys, *flags, "--overwrite")


def test_errors_are_in_the_json_too(tmp_path, folder, capsys):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(20))
    found = printed(capsys, "check", damaged, "--json", code=1)
    content = json.loads(found.out)
    assert content["well_formed"] is False
    assert found.err == f"error: {content['error']}\n"
    found = printed(capsys, "report", damaged, "--json", code=1)
    assert json.loads(found.out).keys() == {"error"}


def test_what_quantize_says(tmp_path, folder, capsys):
    flags = ["quantize", folder / "floats", tmp_path / "out", "--weights", "int8"]
    found = json.loads(printed(capsys, *flags, "--json").out)
    kernels = {
        path: np.asarray(leaf, np.float64)
        for path, leaf in leaves_by_path(PARAMS).items()
        if path.startswith("layers") and path.endswith("kernel")
    }
    error = sum(
        np.sum((absmax_round(kernel, 127) - kernel) ** 2) for kernel in kernels.values()
    )
    total = sum(np.sum(kernel**2) for kernel in kernels.values())
    assert found["relative_error"] == pytest.approx(np.sqrt(error / total), 1e-4)
    assert found["bytes_before"] == 4 * sum(map(np.size, jax.tree.leaves(PARAMS)))
    text = printed(capsys, *flags, "--overwrite").out
    assert (
        f"relative error of the rounded weights {found['relative_error']:.2%}" in text
    )


def test_progress_is_said_where_there_is_no_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr("cage_jax.cli.terminal._SECONDS", 0.0)
    capsys.readouterr()
    assert main(["check", str(folder / "codes")]) == 0
    lines = capsys.readouterr().err.splitlines()
    count = len(CONFIG.shapes())
    assert lines[0] == f"reading {folder / 'codes'}"
    assert lines[1:] == [f"checking: {number} of {count}" for number in range(count)]


# Kernels of one shape, with inputs for groups of 128.
WIDE = dataclasses.replace(
    CONFIG, width=128, hidden=128, layers=1, heads=4, kv_heads=4, head_size=32
)


@pytest.mark.parametrize("preset", [n for n, line in PRESETS.items() if line.summary])
def test_the_targets_of_a_preset_are_as_the_help_says(tmp_path, capsys, preset):
    params = on_host(params_of(WIDE))
    save(Model(params, WIDE, {}), tmp_path / "floats")
    codes = tmp_path / "codes"
    printed(capsys, "quantize", tmp_path / "floats", codes, "--weights", preset)
    for name in WRITTEN:
        out, holds = tmp_path / name, preset in target.targets()[name].presets
        flags = ["--format", name]
        error = printed(capsys, "export", codes, out, *flags, code=1 - holds).err
        assert error.startswith("warning: the model has no tokenizer; programs that")
        is_rounded = "fp4" in preset and name == "compressed-tensors"
        assert ("warning: Readers decode FP4 as bfloat16" in error) is is_rounded
        if not holds:
            continue
        found = differences(*(by_path(cage.load(each).params) for each in (out, codes)))
        assert found == (lost_in_bfloat16(params) if is_rounded else [])


def lost_in_bfloat16(params):
    """Says how many floats of each parameter beside the kernels are no bfloat16."""
    lost = []
    for path, leaf in sorted(leaves_by_path(params).items()):
        if not path.endswith("kernel"):
            rounded = leaf.astype(jax.numpy.bfloat16).astype(np.float32)
            count = np.sum(rounded != leaf)
            lost.append(f"{path}: {count} of {leaf.size} values differ")
    return lost
