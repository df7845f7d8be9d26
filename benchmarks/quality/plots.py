"""The pictures of the study."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from cells import RESULTS
from methods import WORDS
from pretrained_report import measured as pretrained_measures
from report import (
    finetuned,
    language_models_by_size,
    quadratic_shares,
    recovered,
    share_of_gap,
)

# What is to be seen, and all else.
KIBIBYTES = (16, 24, 32, 48, 64, 96)
THOUSANDS = (50, 100, 200, 300)
COLORS = {"recommended": "#c1440e", "cage": "#e6a27c", "matched": "#e6a27c"}
OTHER = "#8a9ba8"


def quadratics(record: Mapping[str, Any], path: Path) -> None:
    """The spread of each method's share of STE's loss, noise by noise."""
    shares = {
        name: np.minimum(share, 16) for name, share in quadratic_shares(record).items()
    }
    del shares["full"]  # whose loss is 0 where there is no noise
    noises = np.array([noise for *_, noise in record["settings"]["combinations"]])
    levels = np.unique(noises)
    figure, axes = plt.subplots(
        1, len(levels), figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    names = list(shares)[::-1]
    for axis, noise in zip(axes, levels):
        values = [shares[name][:, noises == noise].ravel() for name in names]
        boxes = axis.boxplot(
            values,
            orientation="horizontal",
            whis=(10, 90),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "black"},
        )
        for name, box in zip(names, boxes["boxes"]):
            box.set_facecolor(COLORS.get(name, OTHER))
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 1, 2] if noise else [0.0625, 0.125, 0.25, 0.5, 1]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_title(f"gradient noise {noise:g}")
        axis.set_xlabel("loss as a share of STE's")
    axes[0].set_yticks(range(1, len(names) + 1), [WORDS[name] for name in names])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def classifiers(record: Mapping[str, Any], path: Path) -> None:
    """What each method recovers of the gap to full precision, cell by cell."""
    points = [
        (key.split()[1], name, recovered(cell, name))
        for key, cell in record["cells"].items()
        for name in cell
    ]
    _shares(points, "train loss", path)


def tuned(record: Mapping[str, Any], path: Path) -> None:
    """The same where all are tuned, width by width."""
    points = [
        (key.split()[-1], name, recovered(cell, name))
        for key, cell in record["cells"].items()
        for name in cell
    ]
    _shares(points, "train loss", path)


def finetuning(record: Mapping[str, Any], path: Path) -> None:
    """What each method recovers of the gap to full precision, target by target."""
    points = [
        (target, name, share)
        for (target, _), by_arm in finetuned(record).items()
        for name in by_arm
        if (share := share_of_gap(by_arm, name)) is not None
    ]
    _shares(points, "each text is a point", path)


def g2p(record: Mapping[str, Any], path: Path) -> None:
    """What each method recovers of the gap to full precision, seed by seed."""
    _pretrained(record, "cross-entropy", path)


def minilm(record: Mapping[str, Any], path: Path) -> None:
    """What each method recovers of the gap to full precision, seed by seed."""
    _pretrained(record, "distance", path)


def _pretrained(record, name, path):
    points = []
    for key, by_arm in pretrained_measures(record, name).items():
        full, ste = (by_arm.get(arm, {}) for arm in ("full", "ste"))
        for name, values in by_arm.items():
            for seed in values.keys() & ste.keys() & full.keys():
                share = (ste[seed] - values[seed]) / (ste[seed] - full[seed])
                points.append((f"{', '.join(key[:2])}, from {key[2]}", name, share))
    _shares(points, "each seed is a point", path)


def paper(record: Mapping[str, Any], path: Path) -> None:
    """What each method recovers of the gap to full precision, width by width."""
    points = []
    for key, cell in record["cells"].items():
        losses = cell["loss"]
        gap = losses["ste"] - losses["full"]
        for name, loss in losses.items():
            points.append((key.split()[0], name, (losses["ste"] - loss) / gap))
    _shares(points, "each seed is a point", path)


def _shares(points, what, path):
    """Points (kind, method, share recovered), a line for each method."""
    kinds = dict(zip(dict.fromkeys(kind for kind, *_ in points), "os^Dv<>P"))
    there = {name for _, name, _ in points} - {"full", "ptq", "ste"}
    names = [name for name in WORDS if name in there]
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for kind, name, share in points:
        if name in names:
            axis.scatter(
                np.clip(np.nan_to_num(share, nan=-np.inf), -1.05, 1.05),
                -names.index(name),
                c=COLORS.get(name, OTHER),
                marker=kinds[kind],
                alpha=0.75,
                edgecolors="black",
            )
    for kind, marker in kinds.items():
        axis.scatter([], [], c=OTHER, marker=marker, edgecolors="black", label=kind)
    axis.legend(loc="lower right")
    axis.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(-np.arange(len(names)), [WORDS[name] for name in names])
    axis.set_xlim(-1.1, 1.1)
    axis.set_xlabel(
        "share of the gap between STE and full precision that is recovered\n"
        f"({what}; what is below -1 or above 1 lies at the edge)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def language_models(record: Mapping[str, Any], path: Path) -> None:
    """The loss by bytes and by weights of the layers: STE's, the recommended one's."""
    rows = language_models_by_size(record).cells
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for axis, column, unit, ticks, label in (
        (axes[0], 2, 1024, KIBIBYTES, "KiB of the layers' weights"),
        (axes[1], 1, 1000, THOUSANDS, "thousands of weights in the layers"),
    ):
        _by_size(axis, rows, column, unit)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axis.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.1)
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nat a byte)")
    axes[1].legend(fontsize=8, handlelength=3.5)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _by_size(axis, rows, size, unit):
    """A line for each width and method; `size` is a column of the rows."""
    for loss, color, marker, text in (
        (3, OTHER, "o", WORDS["ste"]),
        (4, COLORS["recommended"], "s", WORDS["recommended"]),
    ):
        for width, style in (("W4", "-"), ("W3", "--"), ("W2", ":")):
            lines = [line for line in rows if line[0].startswith(width)]
            if not lines:
                continue
            sizes = [int(line[size].replace(",", "")) / unit for line in lines]
            losses = [float(line[loss]) for line in lines]
            label = f"{width}{width.replace('W', 'A')}, {text}"
            axis.plot(sizes, losses, style, color=color, marker=marker, label=label)


PLOTS = {
    "quadratics": quadratics,
    "classifiers": classifiers,
    "language_models": language_models,
    "tuned": tuned,
    "finetuning": finetuning,
    "g2p": g2p,
    "minilm": minilm,
    "paper": paper,
}


def draw(name: str, folder: Path = RESULTS) -> Path:
    """Draws what was measured, beside its file."""
    path = folder / f"{name}.png"
    PLOTS[name](json.loads((folder / f"{name}.json").read_text()), path)
    return path
