"""Draws how the weights of the quick start reach their grid, with and without CAGE.

Run `python examples/picture.py FILE.png`. Nothing is selected: it is the first output
channel of the first layer, of seed 0.
"""

import sys
from pathlib import Path

import program

with program.imports(__name__):
    import jax
    import matplotlib
    import numpy as np
    import optax
    import quickstart
    from PIL import Image
    from quickstart import RATE, STEPS, rules

    import cage_jax as cage

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

# What is so near to a border between two codes, in steps of the grid, when the pull
# begins, is drawn in color.
PULL, NEAR = int(program.RECOMMENDED_SILENCE * STEPS), 0.1
LAST = STEPS // 4
COLORS = {"straight-through (STE)": "#c8553d", "STE + CAGE": "#00798c"}


def history(tx: optax.GradientTransformation) -> np.ndarray:
    """Trains the quick start's model and keeps its first kernel before every step.

    Returns:
      The weights in steps of their grid, (STEPS + 1, inputs, outputs).
    """
    kernels = []

    def keep(kernel):
        kernels.append(np.array(kernel))

    def update(gradients, state, params):
        jax.debug.callback(keep, params["hidden"]["kernel"], ordered=True)
        return tx.update(gradients, state, params)

    recorded = optax.GradientTransformation(tx.init, update)
    params = quickstart.train(rules, recorded)
    jax.effects_barrier()
    weights = np.stack([*kernels, params["hidden"]["kernel"]])
    return weights / np.abs(weights).max(1, keepdims=True)


def draw(histories: dict[str, np.ndarray], path: Path) -> None:
    """Draws one channel's weights by step, and the whole layer's at the end."""
    plt.rcParams |= {"font.size": 12, "axes.titlesize": 12}
    plt.rcParams |= {f"axes.spines.{side}": False for side in ("top", "right", "left")}
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 5.1), width_ratios=(5, 1, 5, 1), sharey=True
    )
    for name, weights, lines, counts in zip(
        histories, histories.values(), axes[::2], axes[1::2]
    ):
        color = COLORS[name]
        for axis in (lines, counts):
            for code in (-1, 0, 1):
                axis.axhline(code, color="0.2", lw=1, zorder=0)
            for border in (-0.5, 0.5):
                axis.axhline(border, color="0.2", lw=1, ls=(0, (2, 3)), zorder=0)
        away = np.abs(np.abs(weights[PULL, :, 0]) - 0.5)
        steps = np.arange(0, len(weights), 10)
        for weight in np.argsort(-away):
            near = {"color": color, "lw": 1.2} if away[weight] < NEAR else {}
            style = {"color": "0.8", "lw": 0.8} | near
            lines.plot(steps, weights[steps, weight, 0], **style)
        hops = np.count_nonzero(np.diff(np.round(weights[-LAST - 1 :]), axis=0))
        lines.text(0, 1.3, name, color=color, fontweight="bold", fontsize=15)
        lines.text(0, 1.13, f"{hops} changes of code in the last {LAST} steps")
        lines.set(xlabel="step", xlim=(0, STEPS), xticks=(0, PULL, STEPS))
        lines.tick_params(left=False)
        counts.hist(
            weights[-1].ravel(),
            bins=np.linspace(-1.025, 1.025, 42),
            orientation="horizontal",
            color=color,
        )
        counts.text(0, 1.13, "at the end")
        counts.set(xticks=[], ylim=(-1.08, 1.08))
        counts.tick_params(left=False, labelleft=False)
    axes[2].axvspan(PULL, STEPS, color=color, alpha=0.08, lw=0)
    axes[2].text(PULL + 30, -0.985, "CAGE pulls", color=color, va="bottom")
    axes[0].set_yticks(
        (-1, -0.5, 0, 0.5, 1), ("code -1", "border", "code 0", "border", "code 1")
    )
    figure.text(
        0.075,
        0.02,
        "One channel; in color what lies near a border between codes when CAGE begins. "
        "Changes and histograms: the whole layer.",
        color="0.3",
        fontsize=11,
    )
    figure.subplots_adjust(0.075, 0.17, 0.99, 0.85, wspace=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    colors = Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    colors.save(path, optimize=True)


def main() -> int:
    """Runs the program; returns the exit status."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "cage.png")
    print("two trainings of the quick start's model, with every step of its weights")
    pulled = cage.cage_adamw(RATE, rules, total_steps=STEPS)
    found = {name: history(tx) for name, tx in zip(COLORS, (optax.adamw(RATE), pulled))}
    draw(found, path)
    print(f"The picture is {path}.")
    return 0


if __name__ == "__main__":
    program.run(main, stopped="nothing was written.")
