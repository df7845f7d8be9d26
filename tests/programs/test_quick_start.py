"""The quick start: the README shows a part of it, and it ends in loaded codes."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "quickstart.py"


def test_the_readme_shows_a_part_of_the_program():
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    if "from sklearn" not in block and "STEPS" not in block:
        pytest.skip("the README does not show this program yet")
    assert block.strip() in PROGRAM.read_text()


def test_every_arm_has_a_row_and_codes_are_loaded(tmp_path):
    """A run so short says nothing about the arms."""
    source = PROGRAM.read_text().replace("STEPS = 2000", "STEPS = 20")
    assert "STEPS = 20\n" in source
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = re.findall(r"^(.+?) +([\d.]+)% +([\d.]+) +(\d+)$", run.stdout, re.MULTILINE)
    # 4736 weights and 74 biases of 4 bytes; 2 bits a weight, a scale for each column.
    floats, codes = 4 * (4736 + 74), 4736 // 4 + 4 * 74 + 4 * 74
    assert [int(row[-1]) for row in rows] == [floats, codes, codes, codes]
    assert "The codes read a " in run.stdout
    assert (tmp_path / "digits.safetensors").stat().st_size < codes + 2000
