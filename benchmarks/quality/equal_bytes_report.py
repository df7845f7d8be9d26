"""The table of W3A3 against W4A4 of equal bytes, from results/equal_bytes.json."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from equal_bytes import MODELS, RECIPES
from measurement import Rows

_JUDGED = ("last", "averaged")
NOT_MEASURED = "-"


def rows(record: Mapping[str, Any]) -> Rows:
    """Returns losses by recipe, and how far W3A3 comes from its STE to that of W4A4."""
    found = _losses(record["cells"])
    header = ["trained"]
    header += [
        width if judged == "last" else f"{width}, averaged"
        for width in MODELS
        for judged in _JUDGED
    ]
    lines = []
    for recipe in RECIPES:
        cells = [
            _mean(found.get((width, recipe, judged), {}))
            for width in MODELS
            for judged in _JUDGED
        ]
        way = [_way(found, recipe, judged) for judged in _JUDGED]
        if {*cells} != {NOT_MEASURED}:
            lines.append([recipe, *cells, *way])
    return Rows([*header, "W3A3's way to W4A4", "averaged"], lines)


def _losses(cells):
    """Returns losses by seed, by width, recipe and what is judged."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for name, cell in cells.items():
        width, recipe, seed = re.fullmatch(r"(\w+): (.+), seed (\d+)", name).groups()
        for judged in _JUDGED:
            found.setdefault((width, recipe, judged), {})[int(seed)] = cell[judged]
    return found


def _mean(by_seed):
    if not by_seed:
        return NOT_MEASURED
    values = np.array([*by_seed.values()])
    if len(values) == 1:
        return f"{values[0]:.4f}"
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.4f} ± {error:.4f}"


def _way(found, recipe, judged):
    """Returns the share of the way from W3A3's STE to W4A4's, over common seeds."""
    begin, end = (found.get((width, "STE", "last"), {}) for width in ("W3A3", "W4A4"))
    own = found.get(("W3A3", recipe, judged), {})
    seeds = own.keys() & begin.keys() & end.keys()
    if not seeds:
        return NOT_MEASURED
    gone, whole = (
        sum(begin[seed] - losses[seed] for seed in seeds) for losses in (own, end)
    )
    return f"{gone / whole:.0%}"
