"""Names that lead elsewhere, and JSON that is none."""

import pytest

from cage_jax.export.files import (
    MalformedFileError,
    check_all_inside,
    inside,
    read_bytes,
    read_json,
)
from cage_jax.export.tokenizer_files import read_folder


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


def test_links_stay_in_their_folder_or_in_the_cache_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "5678").write_text("{}")
    (tmp_path / "secret").write_text("of this machine")
    (snapshot / "here").write_text("{}")
    (snapshot / "a").symlink_to("../../blobs/5678")
    (snapshot / "b").symlink_to(blobs / "5678")
    (snapshot / "c").symlink_to("here")
    (blobs / "out").symlink_to(tmp_path / "secret")
    (snapshot / "d").symlink_to("../../blobs/out")
    (snapshot / "e").symlink_to(tmp_path / "secret")
    (snapshot / "f").symlink_to("nothing")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        for name in "abc":
            assert read_json(inside(folder, name)) == {}
        for name, text in {
            "d": "link to .*secret",
            "e": "secret",
            "f": "nothing",
        }.items():
            with pytest.raises(MalformedFileError, match=f"^{name} must be .*{text}"):
                inside(folder, name)
        with pytest.raises(MalformedFileError, match="must be a file"):
            check_all_inside(folder)
    # Only the hub's own layout has links into another folder.
    plain = tmp_path / "models--a--b" / "other" / "1234"
    plain.mkdir(parents=True)
    (plain / "a").symlink_to("../../blobs/5678")
    with pytest.raises(MalformedFileError, match="no link to another one"):
        inside(plain, "a")
    with pytest.raises(MalformedFileError, match="no link to another one"):
        check_all_inside(plain)


def test_files_that_are_read_whole_have_a_limit(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(8 * 2**30)  # of which nothing is stored
    for read in (read_json, read_bytes, lambda path: read_folder(path.parent)):
        with pytest.raises(MalformedFileError, match="at most 67108864 bytes; got 858"):
            read(tmp_path / "tokenizer.json")
