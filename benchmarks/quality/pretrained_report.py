"""Tables of the small pretrained models, from the files in results/."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from measurement import Rows
from methods import WORDS
from pretrained import BOUNDS, TRAINED, TUNED_ON

# By width, objective and start: by method, its measure by seed.
Measured = dict[tuple[str, str, str], dict[str, dict[int, float]]]
NOT_MEASURED = "-"


def measured(record: Mapping[str, Any], name: str) -> Measured:
    """Collects one measure; full precision and rounding are there for each seed."""
    cells, found = record["cells"], Measured()
    for key, cell in cells.items():
        parts = TRAINED.fullmatch(key)
        if parts is None or int(parts["seed"]) == TUNED_ON:
            continue
        by_arm = found.setdefault(parts.group("width", "objective", "start"), {})
        for label, values in cell.items():
            arm = parts["arm"] if label == "last" else label
            by_arm.setdefault(arm, {})[int(parts["seed"])] = values[name]
    for (width, _, start), by_arm in found.items():
        seeds = sorted({seed for each in by_arm.values() for seed in each})
        for arm, key in (("full", "full precision"), ("ptq", f"{width}, {start}")):
            if key in cells:
                by_arm[arm] = dict.fromkeys(seeds, cells[key][""][name])
    return found


def means(name: str, digits: int = 3, scale: float = 1) -> Callable[[Any], Rows]:
    """Returns what makes the table of a measure: means and standard errors."""

    def cell(values):
        if not values:
            return NOT_MEASURED
        values = scale * np.array(values)
        text = f"{values.mean():.{digits}f}"
        if len(values) == 1 or np.ptp(values) == 0:
            return text
        return f"{text} ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"

    def rows(record):
        found = measured(record, name)
        lines = [
            [*_words(key), *(cell([*by_arm.get(arm, {}).values()]) for arm in WORDS)]
            for key, by_arm in found.items()
        ]
        return _without_empty_columns(["trained", *WORDS.values()], lines)

    return rows


def recovered(name: str) -> Callable[[Any], Rows]:
    """Returns what makes the table of shares of the gap of STE that is recovered."""

    def rows(record):
        found = measured(record, name)
        lines = [
            [*_words(key), *(_share(by_arm, arm) for arm in _COMPARED)]
            for key, by_arm in found.items()
            if "ste" in by_arm
        ]
        header = ["trained", *(WORDS[arm] for arm in _COMPARED)]
        return _without_empty_columns(header, lines)

    return rows


def rates(name: str) -> Callable[[Any], Rows]:
    """Returns what makes the table of the learning rates that were compared."""

    def rows(record):
        found: dict[str, dict[str, str]] = {}
        for key, cell in record["cells"].items():
            parts = TRAINED.fullmatch(key)
            if parts is not None and parts["rate"]:
                value = f"{cell['last'][name]:.3f}"
                found.setdefault(parts["width"], {})[parts["rate"]] = value
        header = list(dict.fromkeys(rate for each in found.values() for rate in each))
        lines = [
            [width, *(each.get(rate, NOT_MEASURED) for rate in header)]
            for width, each in found.items()
        ]
        return Rows(["learning rate", *header], lines)

    return rows


def bounds(name: str) -> Callable[[Any], Rows]:
    """Returns what makes the table of the bounds of the pull, beside the best STE."""

    def rows(record):
        cells = record["cells"]
        found: dict[str, dict[str, float]] = {}
        for key, cell in cells.items():
            parts = TRAINED.fullmatch(key)
            if parts is None or int(parts["seed"]) != TUNED_ON:
                continue
            own = found.setdefault(parts["width"], {})
            if not parts["rate"]:
                own[parts["arm"]] = cell["last"][name]
            elif cell["last"][name] <= own.get("ste", np.inf):
                own["ste"] = cell["last"][name]
                own["averaged"] = cell["averaged"][name]
        arms = {"ste": WORDS["ste"], "averaged": WORDS["averaged"]} | {
            bound: "no bound" if np.isinf(most) else f"{most:g}"
            for bound, most in BOUNDS.items()
        }
        lines = [
            [width, *(f"{each[a]:.3f}" if a in each else NOT_MEASURED for a in arms)]
            for width, each in found.items()
        ]
        return Rows(["bound", *arms.values()], lines)

    return rows


_COMPARED = tuple(arm for arm in WORDS if arm not in ("full", "ste"))


def _share(by_arm, arm):
    ours, ste, full = (by_arm.get(each, {}) for each in (arm, "ste", "full"))
    seeds = [seed for seed in ours if seed in ste and seed in full]
    if not seeds:
        return NOT_MEASURED
    x, y, z = (np.array([part[seed] for seed in seeds]) for part in (ours, ste, full))
    wins = f", {np.sum(x < y)} of {len(seeds)}" if len(seeds) > 1 else ""
    return f"{(y - x).mean() / (y - z).mean():.0%}{wins}"


def _words(key: Sequence[str]) -> list[str]:
    width, objective, start = key
    return [f"{width}, {objective}, from {start}"]


def _without_empty_columns(header, lines):
    kept = [0] + [
        place
        for place in range(1, len(header))
        if any(line[place] != NOT_MEASURED for line in lines)
    ]
    return Rows(
        [header[place] for place in kept],
        [[line[place] for place in kept] for line in lines],
    )


# By the name of a place in the README: the file, and what becomes of it.
SECTIONS: dict[str, tuple[str, Callable[[Any], Rows]]] = {
    "g2p_rates": ("g2p", rates("KL")),
    "g2p_bounds": ("g2p", bounds("KL")),
    "g2p": ("g2p", means("cross-entropy")),
    "g2p_words": ("g2p", means("words right", 1, scale=100)),
    "g2p_recovered": ("g2p", recovered("cross-entropy")),
    "minilm_rates": ("minilm", rates("distance")),
    "minilm_bounds": ("minilm", bounds("distance")),
    "minilm": ("minilm", means("distance")),
    "minilm_nearest": ("minilm", means("same nearest", 1, scale=100)),
    "pitch_rates": ("pitch", rates("KL")),
    "pitch_bounds": ("pitch", bounds("KL")),
    "pitch": ("pitch", means("KL")),
    "pitch_right": ("pitch", means("tones right", 1, scale=100)),
}
