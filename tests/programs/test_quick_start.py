"""The quick start of the README prints what the README says."""

import pathlib
import subprocess
import sys

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_quick_start_of_the_readme(tmp_path):
    readme = README.read_text()
    program = readme.split("```python\n")[1].split("```")[0]
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "int4 320 bytes" in run.stdout
    shown = readme.split("what is not:\n\n```\n")[1].split("```")[0]
    assert run.stdout.endswith(shown)
