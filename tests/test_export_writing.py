"""Files and folders that are written whole or not at all, and replace only exports."""

import hashlib
import json
import os
import stat

import numpy as np
import pytest
from all_writers import RULES, WRITERS
from small_llama import CONFIG, params_of

import cage_jax as cage
from cage_jax.cli.main import main
from cage_jax.export import native, writing
from cage_jax.export.writing import MARKER, new_file, new_folder
from cage_jax.llama.loaded import Model

KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


def is_text(path):
    return path.read_bytes().startswith(b"text")


def new(kind, path, **options):
    if kind == "file":
        return new_file(path, is_export=is_text, **options)
    return new_folder(path, **options)


def fill(place, text="text"):
    (place / "b" if place.is_dir() else place).write_text(text)


def write(kind, path, text="text", **options):
    with new(kind, path, **options) as place:
        fill(place, text)


def text_at(path):
    return (path / "b" if path.is_dir() else path).read_text()


def contents(folder):
    """What is in a folder: files with their bytes, links and all others by kind."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode)
        content = path.read_bytes() if is_file else stat.S_IFMT(mode)
        found[path.relative_to(folder).as_posix()] = content
    return found


def test_a_file_is_there_when_it_is_whole(tmp_path):
    with new("file", tmp_path / "deep" / "a") as place:
        place.write_text("whole")
        number = place.stat().st_ino
        assert not (tmp_path / "deep" / "a").exists()
    # The very file, under its name: no moment in which a part of it is there.
    assert (tmp_path / "deep" / "a").stat().st_ino == number
    assert contents(tmp_path / "deep") == {"a": b"whole"}


@KINDS
def test_nothing_is_left_of_a_failure(tmp_path, kind):
    with pytest.raises(RuntimeError), new(kind, tmp_path / "a") as place:
        fill(place, "half")
        raise RuntimeError
    assert not contents(tmp_path)


@KINDS
@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_kept(tmp_path, kind, there):
    write(there, tmp_path / "a")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"`path` must not exist; .*Use overwr"):
        write(kind, tmp_path / "a")
    if kind != there:
        with pytest.raises(FileExistsError, match=rf"to be overwritten; .*a {there}\."):
            write(kind, tmp_path / "a", overwrite=True)
    assert contents(tmp_path) == before


@KINDS
def test_an_export_is_replaced_as_a_whole(tmp_path, kind):
    write(kind, tmp_path / "a", "text of old")
    with new(kind, tmp_path / "a", overwrite=True) as place:
        fill(place, "text of new")
        assert text_at(tmp_path / "a") == "text of old"
    assert text_at(tmp_path / "a") == "text of new"
    assert os.listdir(tmp_path) == ["a"]
    write(kind, tmp_path / "a", overwrite=True)  # its marker is the new one


def test_a_marker_lists_what_a_folder_has(tmp_path):
    write("folder", tmp_path / "a")
    found = json.loads((tmp_path / "a" / MARKER).read_text())
    entry = {"bytes": 4, "sha256_of_ends": hashlib.sha256(b"text").hexdigest()}
    assert found == {"written_by": "cage_jax 0.1.0", "files": {"b": entry}}


@pytest.mark.parametrize("size", [4, 5, 9])
def test_both_ends_of_a_file_are_digested(tmp_path, monkeypatch, size):
    monkeypatch.setattr(writing, "_DIGESTED", 3)
    file, content = tmp_path / "a", bytes(range(size))
    file.write_bytes(content)
    found = writing._entry(file)
    ends = content if size <= 6 else content[:3] + content[-3:]
    digest = hashlib.sha256(ends).hexdigest()
    assert found == {"bytes": size, "sha256_of_ends": digest}


def test_an_empty_folder_is_nothing_and_an_empty_file_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    write("folder", tmp_path / "a")
    assert text_at(tmp_path / "a") == "text"
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="must be a file for this format"):
        write("file", tmp_path / "b", overwrite=True)
    (tmp_path / "c").touch()
    with pytest.raises(FileExistsError):
        write("file", tmp_path / "c")
    write("file", tmp_path / "c", overwrite=True)


def test_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write("folder", ".")
    assert text_at(tmp_path / "here") == "text"
    assert os.listdir(tmp_path) == ["here"]


@KINDS
def test_others_may_read_as_they_may_any_file(tmp_path, kind):
    before = os.umask(0o022)
    try:
        write(kind, tmp_path / "a")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == (0o755 if kind == "folder" else 0o644)


# --- what no export wrote -------------------------------------------------------------

# Files by their path. The first come without an export, the others with one.
FOREIGN = {
    "json": {"notes.json": "1", "results.json": "2"},
    "arrays": {"arrays/thesis.npy": "1", "arrays/photos/a.jpg": "2"},
    "description": {"description/mywork.txt": "1"},
    "folder of a name": {"x.json/thesis.txt": "1"},
    "adapter": {"config.json": "{}", "lora_adapter.safetensors": "1"},
    "something else": {"settings.json": "{}", "model.safetensors": "1"},
    "model": {"config.json": '{"model_type": "llama"}', "model.safetensors": "1"},
    "native names": {"config.json": "{}", "codes.safetensors": "1"},
    "broken marker": {"b": "text", MARKER: '{"files"'},
    "marker of a list": {"b": "text", MARKER: '{"files": ["b"]}'},
    "marker without": {"b": "text", MARKER: "{}"},
}
ADDED = {
    "one file": {"thesis.tex": "1"},
    "hidden": {".env": "1"},
    "adapter beside": {"adapter_config.json": "{}", "adapter.safetensors": "1"},
    "repository": {".git/HEAD": "ref: refs/heads/main"},
    "subfolder": {"config.json/b": "1"},
    "in its subfolder": {"sub/mine": "1"},
    "another size": {"b": "longer text"},
    "the same size": {"b": "test"},
}


@pytest.mark.parametrize("case", [*FOREIGN, *ADDED])
def test_a_folder_of_others_is_kept(tmp_path, case):
    folder = tmp_path / "a"
    if case in ADDED:
        with new_folder(folder) as place:
            fill(place)
            (place / "sub").mkdir()
            (place / "sub" / "c").touch()
    files = FOREIGN.get(case) or ADDED[case]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    refused_and_kept(tmp_path, sorted(files)[0].partition("/")[0])


@pytest.mark.parametrize("case", ["link", "link to a folder", "pipe", "marker", "self"])
def test_links_and_pipes_are_kept(tmp_path, case):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b").write_text("text")
    folder = tmp_path / "a"
    write("folder", folder)
    if case == "link":
        (folder / "b").unlink()
        (folder / "b").symlink_to(tmp_path / "elsewhere" / "b")
    elif case == "link to a folder":
        (folder / "more").symlink_to(tmp_path / "elsewhere")
    elif case == "pipe":
        (folder / "b").unlink()
        os.mkfifo(folder / "b")
    elif case == "marker":
        (folder / MARKER).rename(tmp_path / "elsewhere" / MARKER)
        (folder / MARKER).symlink_to(tmp_path / "elsewhere" / MARKER)
    else:
        folder.rename(tmp_path / "true")
        folder.symlink_to(tmp_path / "true")
    refused_and_kept(tmp_path, "")


def refused_and_kept(tmp_path, name):
    before = contents(tmp_path)
    with (
        pytest.raises(FileExistsError, match=f"to be overwritten; got .*a: .*{name}"),
        new_folder(tmp_path / "a", overwrite=True),
    ):
        pytest.fail("must not be entered")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", ["text", "link", "pipe"])
def test_a_file_of_others_is_kept(tmp_path, case):
    path = tmp_path / "a"
    (tmp_path / "b").write_text("text")
    if case == "text":
        path.write_text("thesis")
    elif case == "link":
        path.symlink_to(tmp_path / "b")
    else:
        os.mkfifo(path)
    before = contents(tmp_path)
    with (
        pytest.raises(FileExistsError, match="must hold only an export to be overwri"),
        new("file", path, overwrite=True),
    ):
        pytest.fail("must not be entered")
    assert contents(tmp_path) == before


@KINDS
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_write_meanwhile_is_kept(tmp_path, kind, overwrite):
    if overwrite:
        write(kind, tmp_path / "a")
    with (
        pytest.raises(FileExistsError),
        new(kind, tmp_path / "a", overwrite=overwrite) as place,
    ):
        fill(place)
        (tmp_path / "a").mkdir(exist_ok=True) if kind == "folder" else None
        mine = tmp_path / "a" / "mine" if kind == "folder" else tmp_path / "a"
        mine.write_text("thesis")
        before = contents(tmp_path / "a") if kind == "folder" else None
    assert mine.read_text() == "thesis" and os.listdir(tmp_path) == ["a"]
    assert before is None or contents(tmp_path / "a") == before


def test_what_others_write_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    """Between the last look and the move, which no look can exclude."""
    write("folder", tmp_path / "a")
    replace = os.replace

    def late(source, target):
        if source == tmp_path / "a":
            (source / "mine").write_text("thesis")
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(FileExistsError, match=r"overwritten; got .*a: mine"):
        write("folder", tmp_path / "a", "text of new", overwrite=True)
    assert (tmp_path / "a" / "mine").read_text() == "thesis"
    assert text_at(tmp_path / "a") == "text" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("moment", range(4))
def test_the_old_or_the_new_is_there_after_ctrl_c(tmp_path, monkeypatch, moment):
    """Before and after each of the two moves."""
    write("folder", tmp_path / "a", "text of old")
    replace, calls = os.replace, []

    def stopped(source, target):
        number = len(calls)
        calls.append(source)
        if moment == 2 * number:
            raise KeyboardInterrupt
        replace(source, target)
        if moment == 2 * number + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write("folder", tmp_path / "a", "text of new", overwrite=True)
    assert text_at(tmp_path / "a") == f"text of {'new' if moment == 3 else 'old'}"
    left = [name for name in os.listdir(tmp_path) if name != "a"]
    # After the last move a part of the old folder may be left under a hidden name.
    assert moment == 3 or not left


# --- every writer ---------------------------------------------------------------------


def names_in(folder):
    """Below a folder and its folders: Orbax draws the names that are deeper."""
    return {"/".join(name.split("/")[:2]) for name in contents(folder)}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_replaces_its_own_and_nothing_else(tmp_path, writer):
    codes, path = cage.quantize(params_of(), RULES), tmp_path / "a"

    def call(path, **options):
        WRITERS[writer](codes, path, **options)

    call(path)
    (written,) = tmp_path.iterdir()
    before = names_in(tmp_path)
    call(path, overwrite=True)
    assert names_in(tmp_path) == before
    cage.load(written)
    if written.is_dir():
        (written / "thesis.tex").write_text("of years")
    else:
        # What others wrote in the same format.
        params = {"model.norm.weight": np.ones(4, np.float32)}
        pytest.importorskip("safetensors.numpy").save_file(params, written)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"`path` must hold only an export"):
        call(path, overwrite=True)
    assert contents(tmp_path) == before


def test_the_command_line_keeps_what_is_not_an_export(tmp_path, capsys):
    pytest.importorskip("gguf")
    native.save(Model(params_of(), CONFIG, {}), tmp_path / "floats")
    quantize = ["quantize", tmp_path / "floats", tmp_path / "out", "--overwrite"]
    quantize += ["--weights", "q4_0", "--quiet"]
    shipped = ["export", tmp_path / "floats", tmp_path / "out", "--overwrite"]
    single = ["export", tmp_path / "floats", tmp_path / "x.gguf", "--overwrite"]
    for arguments in (quantize, shipped, single):
        assert main([*map(str, arguments)]) == 0
        assert main([*map(str, arguments)]) == 0  # its own
    (tmp_path / "out" / "thesis.tex").write_text("of years")
    foreign = {"settings.json": "{}", "model.safetensors": "of something else"}
    (tmp_path / "foreign").mkdir()
    for name, text in foreign.items():
        (tmp_path / "foreign" / name).write_text(text)
    (tmp_path / "x.gguf").write_bytes(b"GGUF of somebody else")
    before = contents(tmp_path)
    for arguments, others in (
        (quantize, "out: thesis.tex"),
        (shipped, "out: thesis.tex"),
        (single, "x.gguf: a file that no export wrote"),
        ([*quantize[:2], tmp_path / "foreign", *quantize[3:]], "foreign: model.safete"),
        ([*shipped[:2], tmp_path / "foreign", *shipped[3:]], "foreign: model.safete"),
    ):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert "`OUT` must hold only an export" in error and others in error
        assert contents(tmp_path) == before
