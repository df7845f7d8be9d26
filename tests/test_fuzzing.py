"""Damaged files: a part of what `make fuzz` tries."""

import pytest

pytest.importorskip("flax", reason="the model needs flax")
pytest.importorskip("gguf", reason="files of GGUF are written with it")
pytest.importorskip("safetensors", reason="files are written with it")

import fuzzing

FILES = 500


@pytest.mark.timeout(1800)
def test_damaged_files_are_read_or_refused():
    found = dict(fuzzing.run(FILES, seed=1))
    wrong = [
        f"{what}: {one}"
        for what, one in found.items()
        # Time is for `make fuzz`, where nothing else runs.
        if one.verdict not in ("read", "refused", "TIME")
    ]
    assert wrong == []
    verdicts = [one.verdict for one in found.values()]
    # Of what is read a bit of a weight, a scale or a name is another.
    assert verdicts.count("refused") > FILES / 5
    assert verdicts.count("read") > FILES / 10
