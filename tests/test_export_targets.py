"""The registry of targets: what the docs say of them, and a new one in two steps."""

import pathlib
import re

import pytest
from cases import assert_same
from small_llama import TIED, params_of

import cage_jax as cage
from cage_jax.cli.main import main
from cage_jax.export import native, target
from cage_jax.llama.loaded import Model

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_docs_have_a_row_for_each_target():
    found = target.targets().values()
    page = (DOCS / "export.md").read_text().splitlines()
    assert [line for line in page if line.startswith("| `export.")] == [
        f"| `{each.written_by}` | {each.read_by} | {each.holds} |" for each in found
    ]
    names = {re.match(r"[\w.]+", each.written_by)[0] for each in found}
    page = (DOCS / "targets.md").read_text()
    assert set(re.findall(r"`(export\.\w+)`", page)) <= names
    for name in names:
        value = cage
        for part in name.split("."):
            value = getattr(value, part)
        assert callable(value)


def test_a_new_target_is_a_module_and_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(target.MODULES, "npz", "toy_target")
    floats, codes, out = (str(tmp_path / name) for name in ("floats", "codes", "x.npz"))
    native.save(Model(params_of(TIED), TIED, {}), floats)
    assert main(["quantize", floats, codes, "--weights", "int8"]) == 0
    assert main(["export", codes, out]) == 0
    assert capsys.readouterr().out.endswith(" bytes, npz\n")
    assert main(["export", codes, out, "--format", "npz"]) == 1
    assert main(["export", codes, out, "--overwrite"]) == 0
    assert main(["check", out, "--same-as", codes]) == 0
    capsys.readouterr()
    assert main(["report", out]) == 0
    assert "int8 absmax, axis -2" in capsys.readouterr().out

    model = cage.load(codes)
    params = cage.load(out).params
    assert_same(params, model.params)
    write = target.targets()["npz"].write
    write(params, TIED, tmp_path / "again.npz", tokenizer={}, overwrite=False)
    assert_same(cage.load(tmp_path / "again.npz").params, params)

    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert re.search(r"int8 .*NumPy", capsys.readouterr().out)
