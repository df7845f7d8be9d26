"""The quick start: the README shows a part of it, and it ends in loaded codes."""

import json
import pathlib
import re
import subprocess
import sys

import first_page
import numpy as np
import optax
import picture
import pytest
import quickstart
import tables

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("as_users_have_it")

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "quickstart.py"


def test_the_readme_shows_lines_of_the_program():
    block = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    program = [line.strip() for line in PROGRAM.read_text().splitlines()]
    removed, *others = sorted(block.splitlines(), key=lambda line: line[0] != "-")
    assert removed == "-tx = optax.adamw(RATE)" and "optax.adamw(RATE)" in str(program)
    assert {line[1:].strip() for line in others} <= {*program}
    assert len([line for line in others if line[0] == "+"]) == 4


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


@pytest.mark.filterwarnings("ignore:the recommended pull")
def test_the_first_page_pairs_seeds_of_the_quick_start(monkeypatch):
    monkeypatch.setattr(quickstart, "STEPS", 200)
    record = json.loads(json.dumps(first_page.measure(2)))
    found = record["seed_by_seed"]
    # Seed 1, trained alone; its accuracy and loss from the codes, in float64.
    rate = optax.cosine_decay_schedule(float(quickstart.RATE(0)), 200)
    tx = cage.cage_adamw(rate, quickstart.rules, total_steps=200)
    codes = cage.quantize(quickstart.train(quickstart.rules, tx, 1), quickstart.rules)
    hidden, output = (
        {name: np.float64(leaf) for name, leaf in cage.dequantize(codes)[layer].items()}
        for layer in ("hidden", "output")
    )
    x, y = np.float64(quickstart.x_test), np.asarray(quickstart.y_test)
    logits = np.maximum(x @ hidden["kernel"] + hidden["bias"], 0)
    logits = logits @ output["kernel"] + output["bias"]
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    assert found["cage"]["loss"][1] == pytest.approx(losses.mean(), rel=1e-3)
    right = (logits.argmax(-1) == y).mean()
    assert found["cage"]["accuracy"][1] == pytest.approx(right, abs=1.5 / len(y))
    differences = np.subtract(found["cage"]["loss"], found["ste"]["loss"])
    mean, error = differences.mean(), np.abs(np.diff(differences)) / 2
    assert record["cage_minus_ste"]["loss"] == pytest.approx(
        {"mean": mean, "error": float(error[0])}
    )
    assert record["wins"] == (differences < 0).sum()
    rows = first_page.table(record)
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_table_of_the_readme():
    text = "<!-- table: first_page -->\n<!-- end -->"
    filled = tables.filled(text, tables.front)
    assert "| straight-through (STE) | 9" in filled and "Measured" not in filled


def test_the_picture_is_of_the_same_training(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "STEPS", 20)
    found = picture.history(optax.adamw(quickstart.RATE))
    assert found.shape == (21, 64, 64)
    end = quickstart.train(quickstart.rules, optax.adamw(quickstart.RATE))
    kernel = np.array(end["hidden"]["kernel"])
    np.testing.assert_array_equal(found[-1], kernel / np.abs(kernel).max(0))
    assert np.all(np.any(found[1:] != found[:-1], (1, 2)))
    weights = np.linspace(-1, 1, 2001 * 4).reshape(4, 2001).T[:, :, None]
    path = tmp_path / "new" / "picture.png"
    picture.draw(dict.fromkeys(picture.COLORS, weights), path)
    assert path.stat().st_size < 150_000
