"""Names that lead elsewhere, and JSON that is none."""

import pytest

from cage_jax.export.files import MalformedFileError, inside, read_json


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
