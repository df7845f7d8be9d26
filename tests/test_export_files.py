"""Files that are written whole or not at all, and names that lead elsewhere."""

import os
import stat

import pytest

from cage_jax.export.files import (
    MalformedFileError,
    inside,
    new_file,
    new_folder,
    read_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_it_is_whole(tmp_path):
    with new_file(tmp_path / "deep" / "a") as place:
        place.write_text("whole")
        number = place.stat().st_ino
        assert not (tmp_path / "deep" / "a").exists()
    # The very file, under its name: no moment in which a part of it is there.
    assert (tmp_path / "deep" / "a").stat().st_ino == number
    assert (tmp_path / "deep" / "a").read_text() == "whole"
    assert names(tmp_path / "deep") == ["a"]


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_nothing_is_left_of_a_failure(tmp_path, kind):
    with pytest.raises(RuntimeError), kind(tmp_path / "a") as place:
        (place / "part" if kind is new_folder else place).write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_what_is_there_is_kept(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with (
        pytest.raises(FileExistsError, match=r"`path` must not (exist|be a folder)"),
        kind(tmp_path / "a"),
    ):
        pytest.fail("must not be entered")
    assert names(tmp_path / "a") == ["old"]


def test_a_file_is_replaced_when_asked(tmp_path):
    (tmp_path / "a").write_text("old")
    with new_file(tmp_path / "a", overwrite=True) as place:
        place.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.json").write_text("old")
    with new_folder(tmp_path / "a", overwrite=True) as place:
        (place / "new").write_text("new")
        assert names(tmp_path / "a") == ["old.json"]
    assert names(tmp_path / "a") == ["new"]
    assert names(tmp_path) == ["a"]


def test_an_empty_folder_is_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a") as place:
        (place / "new").write_text("new")
    assert names(tmp_path / "a") == ["new"]


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_others_may_read_as_they_may_any_file(tmp_path, kind):
    before = os.umask(0o022)
    try:
        with kind(tmp_path / "a") as place:
            (place / "b" if kind is new_folder else place).write_text("x")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == (0o755 if kind is new_folder else 0o644)


def test_a_shard_lies_beside(tmp_path):
    (tmp_path / "a").write_text("outside")
    (tmp_path / "folder").mkdir()
    names = (
        "../a",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a\0",
        "b\\a",
        "c:a",
        7,
        None,
        "none",
    )
    for name in (*names, "a" * 300, "\udc80"):
        with pytest.raises(MalformedFileError):
            inside(tmp_path / "folder", name)
            pytest.fail(repr(name))
    assert inside(tmp_path, "a").read_text() == "outside"


def test_json_that_is_none(tmp_path):
    for content in ("", "[1]", "{", '{"a": nope}', "[" * 100_000, "\xff"):
        (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(MalformedFileError, match=r"a\.json must"):
            read_json(tmp_path / "a.json")
            pytest.fail(content[:20])
