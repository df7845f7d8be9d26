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
from report import language_models_by_size, quadratic_shares, recovered

# What is to be seen, and all else.
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
    cells = record["cells"]
    names = [
        name
        for name in WORDS
        if name in next(iter(cells.values())) and name not in ("full", "ptq", "ste")
    ]
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    places = np.arange(len(names))[::-1]
    for key, cell in cells.items():
        shares = [np.clip(recovered(cell, name), -1.05, 1.05) for name in names]
        marker = {"MLP": "o", "CNN": "s", "ViT": "^"}[key.split()[1]]
        colors = [COLORS.get(name, OTHER) for name in names]
        axis.scatter(
            shares, places, c=colors, marker=marker, alpha=0.75, edgecolors="black"
        )
    for marker, text in (("o", "MLP"), ("s", "CNN"), ("^", "ViT")):
        axis.scatter([], [], c=OTHER, marker=marker, edgecolors="black", label=text)
    axis.legend(loc="lower left")
    axis.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(places, [WORDS[name] for name in names])
    axis.set_xlim(-1.1, 1.1)
    axis.set_xlabel(
        "share of the gap between STE and full precision that is recovered\n"
        "(train loss; what is below -1 or above 1 lies at the edge)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def language_models(record: Mapping[str, Any], path: Path) -> None:
    """The loss by the bytes of the layers: STE's and the recommended one's."""
    rows = language_models_by_size(record).cells
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for column, color, marker, text in (
        (3, OTHER, "o", WORDS["ste"]),
        (4, COLORS["recommended"], "s", WORDS["recommended"]),
    ):
        for width, style in (("W4", "-"), ("W3", "--"), ("W2", ":")):
            lines = [line for line in rows if line[0].startswith(width)]
            sizes = [int(line[2].replace(",", "")) / 1024 for line in lines]
            losses = [float(line[column]) for line in lines]
            label = f"{width}{width.replace('W', 'A')}, {text}"
            axis.plot(sizes, losses, style, color=color, marker=marker, label=label)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="KiB of the layers' weights", ylabel="validation loss (nat a byte)")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PLOTS = {
    "quadratics": quadratics,
    "classifiers": classifiers,
    "language_models": language_models,
}


def draw(name: str, folder: Path = RESULTS) -> Path:
    """Draws what was measured, beside its file."""
    path = folder / f"{name}.png"
    PLOTS[name](json.loads((folder / f"{name}.json").read_text()), path)
    return path
