"""Results of an experiment's arms: table, verdict, codes, JSON and plot."""

import datetime
import json
import platform
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import layout
import numpy as np
import orbax.checkpoint as ocp
from checkpoints import write_whole
from experiment import ARMS, EVALUATIONS, Experiment, Settings, State, identity
from methods import RIVALS
from rich.table import Table

import cage_jax as cage


class Result(NamedTuple):
    """Result of one arm; `weights` are those at which its loss was measured."""

    loss: float
    params: Any
    weights: Any
    history: State


def results_of(experiment: Experiment, ends: dict[str, State]) -> dict[str, Result]:
    """Returns the result of each arm that was asked for."""
    results = {}
    for arm in ARMS:
        if arm not in experiment.settings.arms:
            continue
        state = ends[{"ptq": "full", "averaged": "ste"}.get(arm, arm)]
        params = state.average if arm == "averaged" else state.params
        weights = params if arm == "full" else experiment.rounded(params)
        loss = experiment.validation_loss(weights, quantized=arm != "full")
        results[arm] = Result(loss, params, weights, state)
    return results


def check_codes(experiment: Experiment, result: Result, path: Path) -> dict[str, Any]:
    """Writes the codes of an arm, reads them back, and compares their values."""
    codes = jax.jit(cage.quantize, static_argnums=1)(
        result.params, experiment.model.rules
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), codes, force=True)
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, codes)
        loaded = checkpointer.restore(path.resolve(), shapes)
    places = layout.shardings_of(result.weights)
    weights = jax.jit(cage.dequantize, out_shardings=places)(loaded)
    equal = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))(
        weights, result.weights
    )
    return {
        "path": str(path),
        "loss": experiment.validation_loss(weights, quantized=True),
        "weights_equal": all(map(bool, jax.tree.leaves(equal))),
    }


def summary(experiment: Experiment, results: dict[str, Result]) -> list[dict[str, Any]]:
    """Returns a row per arm: loss, gap, recovered share if STE lost any, dose, size."""
    losses = {arm: result.loss for arm, result in results.items()}
    full, ste = losses.get("full"), losses.get("ste")
    rows = []
    for arm, loss in losses.items():
        gap = None if full is None else loss - full
        recovered = None
        lost = full is not None and ste is not None and ste > full
        if lost and arm not in ("full", "ste"):
            recovered = (ste - loss) / (ste - full)
        report = experiment.report
        size = report.bytes_before if arm == "full" else report.bytes_after
        rows.append(
            {
                "arm": arm,
                "validation_loss": loss,
                "gap_to_full": gap,
                "share_recovered": recovered,
                "dose": experiment.dose() if arm == "cage" else 0.0,
                "size_mb": size / 1e6,
                "steps_skipped": int(results[arm].history.optimizer.total_notfinite),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], settings: Settings) -> Table:
    """Makes a table of the summary."""
    table = Table(title=f"{_kind(settings)}, {settings.steps} steps")
    table.add_column("arm")
    for name in ("validation loss", "gap to full", "recovered of STE's", "dose", "MB"):
        table.add_column(name, justify="right")

    def show(value, form):
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            ARMS[row["arm"]],
            show(row["validation_loss"], ".4f"),
            show(row["gap_to_full"], "+.4f"),
            show(row["share_recovered"], ".0%"),
            show(row["dose"] or None, ".2f"),
            show(row["size_mb"], ".2f"),
        )
    return table


def _kind(settings: Settings) -> str:
    """Describes in short what is quantized, and how it is trained."""
    kv = "" if settings.kv_bits is None else f"KV{settings.kv_bits}"
    distilled = ", distilled" if settings.distill else ""
    return f"W{settings.w_bits}A{settings.a_bits}{kv}{distilled}"


def verdict(results: dict[str, Result]) -> str:
    """Says in a sentence which arms CAGE beat."""
    if "cage" not in results or len(results) < 2:
        return ""
    cage_loss = results["cage"].loss
    parts = []
    for arm in ("ste", "averaged", "ste0", "ptq"):
        if arm in results:
            difference = cage_loss - results[arm].loss
            word = "beats" if difference < 0 else "loses to"
            parts.append(f"{word} {ARMS[arm]} by {abs(difference):.4f} nat")
    if not parts:
        return ""
    text = f"With this one seed CAGE {'; '.join(parts)}."
    if {"full", "ste"} <= results.keys() and results["ste"].loss <= results[
        "full"
    ].loss:
        text += " STE lost nothing to full precision here: there was no gap to close."
    return text


def skipped(rows: list[dict[str, Any]], steps: int) -> str:
    """Says in a sentence which arms skipped steps, if any did."""
    parts = [
        f"{row['steps_skipped']} of {steps} for {ARMS[row['arm']]}"
        for row in rows
        if row["steps_skipped"]
    ]
    if not parts:
        return ""
    return (
        f"Steps that were skipped, since a loss or gradient was not finite: "
        f"{', '.join(parts)}. Such a loss says little of an arm."
    )


def write_json(experiment, rows, codes, path: Path) -> None:
    """Writes the results and settings; keeps arms of this run that the file has."""
    if path.exists():
        now = {row["arm"] for row in rows}
        before = json.loads(path.read_text())
        rows = [*rows, *(row for row in before["results"] if row["arm"] not in now)]
        rows.sort(key=lambda row: list(ARMS).index(row["arm"]))
        codes = codes or before["codes"]
    record = {
        "settings": identity(experiment),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "machine": {"system": platform.platform(), "device": str(jax.devices()[0])},
        "date": datetime.date.today().isoformat(),
        "results": rows,
        "codes": codes,
    }
    write_whole(path, (json.dumps(record, indent=2) + "\n").encode())


def plot(experiment: Experiment, results: dict[str, Result], path: Path) -> None:
    """Plots loss and distance to the grid by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def label(arm):
        return f"{ARMS[arm]}: {results[arm].loss:.4f}"

    steps = experiment.settings.steps
    at = np.arange(EVALUATIONS + 1) * steps / EVALUATIONS
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = {"full": "0.45", "ste": "tab:blue", "ste0": "tab:green", "cage": "tab:red"}
    for arm, color in colors.items():
        if arm not in results:
            continue
        state = results[arm].history
        # Dashed and on top, because it coincides with CAGE before the pull.
        style = {"linestyle": "--", "zorder": 3} if arm == "ste" else {}
        for axes, values in ((left, state.validation), (right, state.distance)):
            axes.plot(at, values, color=color, label=label(arm), **style)
    for arm, marker in (("ptq", "x"), ("averaged", "+"), *zip(RIVALS, "ovs^D*")):
        if arm in results:
            left.plot(
                steps, results[arm].loss, f"k{marker}", label=label(arm), zorder=5
            )
    # Rounding afterwards may be far above the picture; the legend has its loss.
    trained = [result.loss for arm, result in results.items() if arm != "ptq"]
    low, high = min(trained or [0.0]), max(trained or [1.0])
    margin = high - low + 0.02
    left.set_xlim(0.5 * steps, 1.02 * steps)
    left.set_ylim(low - margin / 4, high + 2 * margin)
    left.set(xlabel="step", ylabel=f"validation loss (nat a {experiment.unit})")
    right.set(
        xlabel="step",
        ylabel="mean ||x - Q(x)|| / ||x||",
        title="distance of the weights to their grid",
    )
    settings = experiment.settings
    left.set_title(f"{_kind(settings)}, seed {settings.seed}")
    for axes in (left, right):
        if "cage" in results:
            pull = settings.silence * steps
            axes.axvspan(pull, steps, color="tab:red", alpha=0.07, label="CAGE pulls")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(textwrap.fill(verdict(results), 130), fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
