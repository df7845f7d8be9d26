"""The tables and pictures of the study, from the files in results/.

A table stands in README.md between `<!-- table: NAME -->` and `<!-- end -->`, as those
of the other benchmarks do.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equal_bytes_report
import measurement
import numpy as np
import pretrained_report
import tables
from cells import RESULTS
from measurement import Rows
from methods import WORDS

NOT_MEASURED = "not measured"
README = Path(__file__).resolve().parent / "README.md"
_FACTORS = {
    "width": lambda key, _: key.split()[0],
    "grid": lambda key, _: key.split()[1],
    "optimizer": lambda key, _: key.split()[2],
    "rate falls to": lambda key, _: f"{float(key.split()[3]):.0%}",
    "geometry": lambda _, combination: combination[0],
    "condition": lambda _, combination: f"κ {combination[1]:g}",
    "noise": lambda _, combination: f"{combination[2]:g}",
}


# --- quadratics -----------------------------------------------------------------------


def quadratic_shares(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By method, its loss as a share of STE's, (cells, combinations).

    What has diverged is infinite.
    """
    cells = record["cells"].values()
    names = [name for name in WORDS if name in next(iter(cells)) and name != "ste"]
    return {
        name: np.array([[_share(x) for x in cell[name]] for cell in cells])
        for name in names
    }


def _share(value):
    return np.inf if value is None else value


def _levels(record) -> dict[str, np.ndarray]:
    """By level of a factor, which cells and combinations are of it, a mask."""
    keys, combinations = list(record["cells"]), record["settings"]["combinations"]
    found = {"all": np.ones((len(keys), len(combinations)), bool)}
    for factor, level_of in _FACTORS.items():
        levels = np.array(
            [[level_of(key, each) for each in combinations] for key in keys]
        )
        for level in dict.fromkeys(levels.ravel().tolist()):
            found[f"{factor} {level}"] = levels == level
    return found


def quadratics_by_level(record: Mapping[str, Any]) -> Rows:
    """The median share of STE's loss, level by level."""
    shares = quadratic_shares(record)
    cells = [
        [name, f"{mask.sum()}", *(f"{np.median(s[mask]):.2f}" for s in shares.values())]
        for name, mask in _levels(record).items()
    ]
    header = ["problems with", "count", *(WORDS[name] for name in shares)]
    return Rows(header, cells)


def quadratics_by_method(record: Mapping[str, Any]) -> Rows:
    """How often a method helps, and how much it does at its best and its worst."""
    lines = {
        "median share of STE's loss": lambda s: f"{np.median(s):.2f}",
        "best tenth": lambda s: f"{np.quantile(s, 0.1):.2f}",
        "worst tenth": lambda s: f"{np.quantile(s, 0.9):.2f}",
        "the worst": lambda s: f"{s.max():.2f}".replace("inf", "diverged"),
        "below STE's": lambda s: f"{np.mean(s < 1):.0%}",
        "below STE's by 5 %": lambda s: f"{np.mean(s < 0.95):.0%}",
        "above STE's by 5 %": lambda s: f"{np.mean(s > 1.05):.0%}",
    }
    shares = quadratic_shares(record)
    cells = [
        [WORDS[name], *(line(share) for line in lines.values())]
        for name, share in shares.items()
    ]
    return Rows(["method", *lines], cells)


# --- images ---------------------------------------------------------------------------


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean difference and its standard error."""
    differences = np.subtract(values, others)
    error = np.std(differences, ddof=1) / np.sqrt(len(differences))
    return float(np.mean(differences)), float(error)


def classifiers(record: Mapping[str, Any], part: str) -> Rows:
    """Differences from STE in a loss or the accuracy, cell by cell."""
    form = "+.2%" if part == "accuracy" else "+.4f"
    cells = []
    for key, cell in record["cells"].items():
        names = [name for name in WORDS if name in cell and name != "ste"]
        ste = cell["ste"][part]
        line = [_cell_words(key), f"{np.mean(ste):{form.replace('+', '')}}"]
        for name in names:
            mean, error = paired(cell[name][part], ste)
            line.append(f"{mean:{form}} ± {error:{form.replace('+', '')}}")
        cells.append(line)
    return Rows(["trained", "STE", *(WORDS[name] for name in names)], cells)


def recovered(cell: Mapping[str, Any], name: str, part: str = "train_loss") -> float:
    """What a method recovers of the gap between STE and full precision."""
    ste, full = (np.mean(cell[each][part]) for each in ("ste", "full"))
    return float((ste - np.mean(cell[name][part])) / (ste - full))


def classifiers_recovered(record: Mapping[str, Any]) -> Rows:
    """The share of the gap between STE and full precision that methods recover."""
    cells = []
    for key, cell in record["cells"].items():
        names = [name for name in WORDS if name in cell and name not in ("ste", "full")]
        line = [f"{recovered(cell, name):.0%}" for name in names]
        cells.append([_cell_words(key), *line])
    return Rows(["trained", *(WORDS[name] for name in names)], cells)


def _cell_words(key):
    *name, floor = key.split()
    return f"{' '.join(name)}, rate to {float(floor):.0%}"


# --- tuned ----------------------------------------------------------------------------


def tuned(record: Mapping[str, Any]) -> Rows:
    """What the best of the factors comes to, and which that is."""
    cells = []
    for key, cell in record["cells"].items():
        names = [name for name in cell if name not in ("ste", "full")]
        ste = cell["ste"]["train_loss"]
        line = [key, f"{np.mean(ste):.4f}"]
        line.append("{:+.4f} ± {:.4f}".format(*paired(cell["full"]["train_loss"], ste)))
        for name in names:
            mean, error = paired(cell[name]["train_loss"], ste)
            line.append(f"{mean:+.4f} ± {error:.4f} at {cell[name]['factor']:g}")
        cells.append(line)
    header = ["trained", "STE", WORDS["full"], *(WORDS[name] for name in names)]
    return Rows(header, cells)


# --- language models ------------------------------------------------------------------


def _by_setting(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The cells of all seeds, by what they share."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, cell in record["cells"].items():
        found.setdefault(name.rpartition(", seed")[0], []).append(cell)
    return found


def _losses(cells, arm) -> list[float]:
    return [cell["loss"][arm] for cell in cells]


def language_models(record: Mapping[str, Any]) -> Rows:
    """Validation losses less that of STE, and how often they are lower."""
    lines, arms = [], []
    for name, cells in _by_setting(record).items():
        if "full" not in cells[0]["loss"]:
            continue
        arms = [arm for arm in cells[0]["loss"] if arm != "ste"]
        ste = _losses(cells, "ste")
        line = [name, str(len(cells)), f"{np.mean(ste):.4f}"]
        for arm in arms:
            losses = _losses(cells, arm)
            wins = int(np.sum(np.less(losses, ste)))
            line.append(f"{_difference(losses, ste)}, {wins}")
        lines.append(line)
    return Rows(["trained", "seeds", "STE", *(WORDS[arm] for arm in arms)], lines)


def _difference(losses, others):
    mean, error = paired(losses, others) if len(losses) > 1 else (None, None)
    if mean is None:
        return f"{losses[0] - others[0]:+.4f}"
    return f"{mean:+.4f} ± {error:.4f}"


def language_models_recovered(record: Mapping[str, Any]) -> Rows:
    """The share of the gap between STE and full precision that methods recover."""
    lines, arms = [], []
    for name, cells in _by_setting(record).items():
        if "full" not in cells[0]["loss"]:
            continue
        arms = [arm for arm in cells[0]["loss"] if arm not in ("ste", "full")]
        mean = {arm: np.mean(_losses(cells, arm)) for arm in cells[0]["loss"]}
        gap = mean["ste"] - mean["full"]
        shares = [f"{(mean['ste'] - mean[arm]) / gap:.0%}" for arm in arms]
        lines.append([name, f"{gap:.4f}", *shares])
    header = ["trained", "gap of STE", *(WORDS[arm] for arm in arms)]
    return Rows(header, lines)


# Weights and inputs of as many bits, of one width.
_OF_SIZES = re.compile(r"W(\d)A\1, \d+ x 64, 4000 steps, rate to 10%")


def language_models_by_size(record: Mapping[str, Any]) -> Rows:
    """The loss by the bytes of the layers, the smallest first."""
    lines = []
    for name, cells in _by_setting(record).items():
        if not _OF_SIZES.fullmatch(name):
            continue
        ste, ours = (_losses(cells, arm) for arm in ("ste", "recommended"))
        line = [name.partition(" x ")[0] + " layers", f"{cells[0]['weights']:,}"]
        line += [f"{cells[0]['bytes']:,}", f"{np.mean(ste):.4f}"]
        lines.append([*line, f"{np.mean(ours):.4f}", _difference(ours, ste)])
    lines.sort(key=lambda line: int(line[2].replace(",", "")))
    header = ["model", "weights in layers", "bytes", WORDS["ste"]]
    return Rows([*header, WORDS["recommended"], "difference"], lines)


# --- fine-tuning ----------------------------------------------------------------------

Tuned = dict[tuple[str, str], dict[str, dict[int, float]]]


def finetuned(record: Mapping[str, Any]) -> Tuned:
    """By target and text the losses of each method, by seed; infinite if diverged.

    What is not measured of a target is not there. Full precision is of all of them.
    """
    found: Tuned = {}
    shared: dict[str, dict[int, float]] = {}
    for name, cell in record["cells"].items():
        seed = int(name.rpartition("seed ")[2])
        for label, losses in cell.items():
            target, _, arm = label.rpartition(": ")
            for text, loss in losses.items():
                by_arm = found.setdefault((target, text), {})
                by_arm.setdefault(arm, {})[seed] = np.inf if loss is None else loss
    for target, text in list(found):
        if not target:
            shared[text] = found.pop((target, text))["full"]
    for (_, text), by_arm in found.items():
        if text in shared:
            by_arm["full"] = shared[text]
    return {key: by_arm for key, by_arm in found.items() if "ste" in by_arm}


def finetuning(record: Mapping[str, Any]) -> Rows:
    """Perplexities."""
    table = finetuned(record)
    names = _measured_of(table)
    lines = []
    for (target, text), by_arm in table.items():
        line = [f"{target}, {text}", str(len(by_arm["ste"]))]
        for name in names:
            losses = list(by_arm.get(name, {}).values())
            line.append(_perplexity(losses))
        lines.append(line)
    return Rows(["trained, judged", "seeds", *(WORDS[name] for name in names)], lines)


def _measured_of(table):
    return [name for name in WORDS if any(name in by_arm for by_arm in table.values())]


def _perplexity(losses):
    if not losses:
        return NOT_MEASURED
    if not np.isfinite(losses).all():
        return "diverged"
    value = np.exp(np.mean(losses))
    if len(losses) == 1:
        return f"{value:.2f}"
    return f"{value:.2f} ± {value * np.std(losses, ddof=1) / np.sqrt(len(losses)):.2f}"


def finetuning_recovered(record: Mapping[str, Any]) -> Rows:
    """The share of the gap in loss between STE and full precision that is recovered.

    Of the seeds that all three have.
    """
    table = finetuned(record)
    names = [name for name in _measured_of(table) if name not in ("full", "ste")]
    lines = [
        [
            f"{target}, {text}",
            _gap(by_arm),
            *(_percent(share_of_gap(by_arm, name)) for name in names),
        ]
        for (target, text), by_arm in table.items()
    ]
    header = ["trained, judged", "gap of STE", *(WORDS[name] for name in names)]
    return Rows(header, lines)


def _gap(by_arm):
    ste, full = by_arm["ste"], by_arm.get("full", {})
    gaps = [ste[seed] - full[seed] for seed in ste if seed in full]
    return f"{np.mean(gaps):.3f}" if gaps else NOT_MEASURED


def pieces(record: Mapping[str, Any]) -> Rows:
    """Perplexities after each stage."""
    cells = record["cells"]
    stages = list(dict.fromkeys(stage for cell in cells.values() for stage in cell))
    lines = [
        [
            f"{name}, {text}",
            *(f"{np.exp(cell[s][text]):.2f}" if s in cell else "-" for s in stages),
        ]
        for name, cell in cells.items()
        for text in next(iter(cell.values()))
    ]
    return Rows(["fine-tuned with, judged", *stages], lines)


def share_of_gap(by_arm: Mapping[str, Mapping[int, float]], name: str) -> float | None:
    """What a method recovers of the gap, minus infinity if it diverged.

    None where it is not measured.
    """
    ours, ste, full = (by_arm.get(each, {}) for each in (name, "ste", "full"))
    seeds = [seed for seed in ours if seed in ste and seed in full]
    if not seeds:
        return None
    mean = [np.mean([part[seed] for seed in seeds]) for part in (ours, ste, full)]
    return float((mean[1] - mean[0]) / (mean[1] - mean[2]))


def _percent(share):
    if share is None:
        return NOT_MEASURED
    return f"{share:.0%}" if np.isfinite(share) else "diverged"


# --- all of them ----------------------------------------------------------------------

# Beside the rivals, of which the best is shown.
_SHOWN = ("ptq", "averaged", "ste0", "cage", "recommended")
_RIVALS = ("dampening", "lotion", "parq", "winq")
# By the words of a line: of each of its cells what methods recover of the gap.
Lines = dict[str, list[dict[str, float]]]


def summary(folder: Path = RESULTS) -> Rows:
    """What is recovered of the gap between STE and full precision, over all tables.

    The range is that of widths, or of texts.
    """
    lines: Lines = {}
    for name, lines_of in _LINES.items():
        path = folder / f"{name}.json"
        if path.exists():
            lines |= lines_of(json.loads(path.read_text()))
    cells = []
    for words, found in lines.items():
        rivals = [name for name in _RIVALS if all(name in each for each in found)]
        line = [words, *(_range(each[name] for each in found) for name in _SHOWN)]
        best = max(
            rivals,
            key=lambda name: np.mean([each[name] for each in found]),
            default=None,
        )
        if best is None:
            cells.append([*line, NOT_MEASURED])
            continue
        range_of_best = _range(each[best] for each in found)
        cells.append([*line, f"{WORDS[best]}: {range_of_best}"])
    header = ["trained", *(WORDS[name] for name in _SHOWN), "the best rival"]
    return Rows(header, cells)


def _range(shares):
    low, *_, high = sorted([f"{share:.0%}" for share in shares] * 2, key=_number)
    return low if low == high else f"{low.removesuffix('%')} to {high}"


def _number(percent):
    return float(percent.removesuffix("%"))


def _quadratic_lines(record) -> Lines:
    shares = quadratic_shares(record)
    found = {}
    for level, mask in _levels(record).items():
        if level.startswith("rate falls"):
            median = {name: np.median(share[mask]) for name, share in shares.items()}
            gap = 1 - median["full"]
            each = {name: float((1 - share) / gap) for name, share in median.items()}
            found[f"quadratics, {level.replace('falls ', '')}"] = [each]
    return found


def _classifier_lines(record) -> Lines:
    found: Lines = {}
    for key, cell in record["cells"].items():
        data, network, _, floor = key.split()
        words = f"{data}, {network}, rate to {float(floor):.0%}"
        found.setdefault(words, []).append({n: recovered(cell, n) for n in cell})
    return found


def _language_lines(record) -> Lines:
    found: Lines = {}
    for name, cells in _by_setting(record).items():
        if "full" not in cells[0]["loss"]:
            continue
        mean = {arm: np.mean(_losses(cells, arm)) for arm in cells[0]["loss"]}
        gap = mean["ste"] - mean["full"]
        each = {arm: float((mean["ste"] - loss) / gap) for arm, loss in mean.items()}
        bits, _, rest = name.partition(", ")
        alone = ", weights alone" if bits.endswith("A16") else ""
        words = f"language model, {rest}{alone}"
        found.setdefault(words, []).append(each)
    return found


def _finetuning_lines(record) -> Lines:
    found: Lines = {}
    for (target, _), by_arm in finetuned(record).items():
        shares = {name: share_of_gap(by_arm, name) for name in by_arm}
        each = {name: share for name, share in shares.items() if share is not None}
        if each.keys() >= set(_SHOWN):
            found.setdefault(f"SmolLM2-135M, {target}", []).append(each)
    return found


_LINES: dict[str, Callable[[Any], Lines]] = {
    "quadratics": _quadratic_lines,
    "classifiers": _classifier_lines,
    "language_models": _language_lines,
    "finetuning": _finetuning_lines,
}


# --- the README -----------------------------------------------------------------------

# By the name of a place: the file, and what becomes of it.
SECTIONS: dict[str, tuple[str, Callable[[Any], Rows]]] = {
    "quadratics_by_method": ("quadratics", quadratics_by_method),
    "quadratics_by_level": ("quadratics", quadratics_by_level),
    "language_models": ("language_models", language_models),
    "language_models_recovered": ("language_models", language_models_recovered),
    "language_models_by_size": ("language_models", language_models_by_size),
    "paper": ("paper", language_models),
    "paper_recovered": ("paper", language_models_recovered),
    "finetuning": ("finetuning", finetuning),
    "finetuning_recovered": ("finetuning", finetuning_recovered),
    "equal_bytes": ("equal_bytes", equal_bytes_report.rows),
    "pieces": ("pieces", pieces),
    **pretrained_report.SECTIONS,
    "tuned": ("tuned", tuned),
    "classifiers_recovered": ("classifiers", classifiers_recovered),
    "classifiers_train_loss": ("classifiers", lambda r: classifiers(r, "train_loss")),
    "classifiers_test_loss": ("classifiers", lambda r: classifiers(r, "test_loss")),
    "classifiers_accuracy": ("classifiers", lambda r: classifiers(r, "accuracy")),
}


def section(name: str, folder: Path = RESULTS) -> str | None:
    """What stands at a place of a README; None where nothing was measured."""
    if name == "summary":
        return tables.markdown(summary(folder))
    file, rows = SECTIONS[name]
    path = folder / f"{file}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return f"{tables.markdown(rows(record))}\n\n{measured(record)}"


def measured(record: Mapping[str, Any]) -> str:
    """Where and when."""
    lines = [
        measurement.environment_line({"environment": each}) for each in _where(record)
    ]
    return "Measured " + " And ".join(lines)


def _where(record) -> Iterable[Mapping[str, Any]]:
    return record["environments"]
