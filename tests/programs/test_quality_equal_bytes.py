"""The study's table of 3 and 4 bits of equal bytes: its recipes and its rows."""

import equal_bytes
import equal_bytes_report
import jax
import pytest
from cells import Table
from rich.console import Console

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.filterwarnings("ignore:the recommended pull"),
]


@pytest.fixture
def measure(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 2**11)
    options = {"text": (text,), "cache": tmp_path / "tokens", "batch": 2}
    options |= {"microbatch": 2, "sequence": 16, "steps": 20}

    def run(*only):
        table = Table("equal_bytes", {}, folder=None)
        return equal_bytes.measure(
            Console(quiet=True), only=only, table=table, **options
        ).cells

    return run


def test_each_recipe_trains_another_model(measure):
    recipes = ("", ", rate to 0 in the last tenth", ", learned scales")
    recipes += (", from the twin and taught",)
    assert equal_bytes.RECIPES.keys() >= {f"CAGE{recipe}" for recipe in recipes}
    names = [f"W3A3: CAGE{recipe}, seed 0" for recipe in recipes]
    names += ["W4A4: CAGE, seed 0"]
    found = measure(*names)
    assert [*found] == names
    losses = [cell["last"] for cell in found.values()]
    assert len(set(losses)) == len(names)
    assert all(0 < loss < 6 for loss in losses)
    assert all(cell["averaged"] != cell["last"] for cell in found.values())
    assert found[names[0]]["bytes"] == pytest.approx(
        found[names[-1]]["bytes"], rel=0.05
    )


def test_a_rate_that_settles_is_the_same_until_the_last_tenth():
    rate = equal_bytes._settling(lambda count: 1.0 + count, 100)
    found = jax.vmap(rate)(jax.numpy.array([0, 89, 90, 95, 100]))
    assert found.tolist() == [1.0, 90.0, 91.0, 48.0, 0.0]


def test_names_are_those_of_cells():
    names = equal_bytes.names()
    assert len(set(names)) == len(names) == 2 * 9 * 3
    assert all(equal_bytes._NAME.fullmatch(name)["recipe"] for name in names)


def test_the_way_from_three_bits_to_four():
    cells = {}
    for seed, base in enumerate((1.0, 2.0)):
        for name, last in (
            ("W4A4: STE", base),
            ("W3A3: STE", base + 0.4),
            ("W3A3: CAGE", base + 0.1),
        ):
            losses = {"last": last, "averaged": last + 0.2, "bytes": 1}
            cells[f"{name}, seed {seed}"] = losses
    table = equal_bytes_report.rows({"cells": cells})
    ste, cage = table.cells
    assert table.header[:4] == ["trained", "W4A4", "W4A4, averaged", "W3A3"]
    assert ste == [
        "STE",
        *("1.5000 ± 0.5000", "1.7000 ± 0.5000", "1.9000 ± 0.5000", "2.1000 ± 0.5000"),
        *("0%", "-50%"),
    ]
    assert cage[1:3] == ["-", "-"] and cage[5:] == ["75%", "25%"]
