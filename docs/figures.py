"""Draws the figures of docs/explanation.md from the library's own numbers.

`python docs/figures.py` writes them to docs/figures/; it needs the extra "demo".
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

import cage_jax as cage

ORANGE, GRAY, BLUE = "#c1440e", "#8a9ba8", "#33658a"
RATE = 0.02
# Seven levels: -1, -2/3, ..., 1.
THIRDS = cage.Quantizer(cage.formats.Integer(3), cage.scales.Fixed(1 / 3), axis=0)


def grid():
    """One group of weights, and the values of its 3-bit grid."""
    group = np.asarray(jax.random.normal(jax.random.key(2), (16,)))
    x = np.linspace(-2.6, 2.6, 1001)
    codes = cage.quantize(jnp.asarray(group), cage.int3(axis=0))
    scale = float(codes.scale.squeeze())
    fixed = cage.Quantizer(codes.quantizer.format, cage.scales.Fixed(scale), axis=0)
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axis.plot(x, x, color=GRAY, linewidth=1, linestyle="--", label="no rounding")
    steps = np.asarray(cage.fake_quant(jnp.asarray(x), fixed))
    axis.plot(x, steps, color=BLUE, label="Q(x)")
    rounded = np.asarray(cage.fake_quant(jnp.asarray(group), cage.int3(axis=0)))
    axis.vlines(
        group, rounded, group, color=ORANGE, linewidth=1.5, label="e = x - Q(x)"
    )
    axis.plot(group, rounded, "o", color=ORANGE, markersize=4, label="weights")
    axis.set(
        xlabel="weight x",
        ylabel="value used",
        yticks=(scale * np.arange(-3, 4)).round(2),
    )
    return _with_legend(figure, axis)


def straight_through():
    """The loss of one weight under rounding, and the two gradients of it."""
    x = jnp.linspace(-1.2, 1.2, 1201)

    def loss(x):
        return (cage.fake_quant(x, THIRDS) - 0.5) ** 2

    values = loss(x)
    passed = jax.grad(lambda x: loss(x).sum())(x)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0), layout="constrained")
    left.plot(x, values, color=BLUE)
    left.plot(x, (x - 0.5) ** 2, color=GRAY, linestyle="--")
    left.set(xlabel="weight x", ylabel="loss")
    right.plot(x, jnp.zeros_like(x), color=BLUE, label="at Q(x)")
    right.plot(x, passed, color=ORANGE, label="straight-through")
    right.plot(x, 2 * (x - 0.5), color=GRAY, linestyle="--", label="without rounding")
    right.set(xlabel="weight x", ylabel="gradient")
    return _with_legend(figure, right)


def hopping():
    """One weight whose best value lies between two codes, without CAGE and with it."""
    steps = 400
    rules = cage.Rules([("x", THIRDS)])
    noise = 0.3 * jax.random.normal(jax.random.key(0), (steps,))
    strength = cage.silence_then_ramp(steps, peak=10.0, silence=0.5)

    def path(tx):
        def step(carry, noise):
            params, state = carry
            rounded = cage.fake_quant(params, rules)["x"][0]
            gradient = {"x": (rounded - 0.42 + noise)[None]}
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.stack([params["x"][0], rounded])

        params = {"x": jnp.array([0.3])}
        return jax.lax.scan(step, (params, tx.init(params)), noise)[1].T

    figure, axes = plt.subplots(
        1, 2, figsize=(6.4, 3.0), sharey=True, layout="constrained"
    )
    optimizers = {
        "straight-through": optax.sgd(RATE),
        "with CAGE from step 200": cage.cage_sgd(RATE, rules, strength=strength),
    }
    for axis, (name, tx) in zip(axes, optimizers.items()):
        weight, rounded = path(tx)
        axis.plot(rounded, color=BLUE, linewidth=1, label="Q(x), used in the loss")
        axis.plot(weight, color=ORANGE, label="weight x")
        axis.axhline(0.42, color=GRAY, linestyle="--", label="best value")
        axis.set(xlabel="step", title=name)
    axes[0].set(ylabel="value")
    return _with_legend(figure, axes[0])


def dose():
    """Strengths over a training; learning rate times strength, whose area counts."""
    steps = 1000
    rate = optax.cosine_decay_schedule(3e-3, steps, alpha=0.1)
    strengths = {
        "published": cage.silence_then_ramp(steps),
        "recommended": cage.recommended(rate, steps)["strength"],
    }
    counts = jnp.arange(steps)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 3.0), layout="constrained")
    for color, (name, strength) in zip((GRAY, ORANGE), strengths.items()):
        values = jax.vmap(strength)(counts)
        area = jax.vmap(rate)(counts) * values
        total = cage.dose(rate, strength, steps)
        drawn = slice(None, None, 5)
        left.plot(counts[drawn], values[drawn], color=color)
        label = f"{name}: dose (area) {total:.2g}"
        right.plot(counts[drawn], area[drawn], color=color, label=label)
        right.fill_between(counts[drawn], area[drawn], color=color, alpha=0.3)
    left.set(xlabel="step", ylabel="strength λ")
    right.set(xlabel="step", ylabel="learning rate times λ")
    return _with_legend(figure, right)


def _with_legend(figure, axis):
    handles, labels = axis.get_legend_handles_labels()
    above = {"loc": "outside upper center", "ncols": 4, "columnspacing": 1.2}
    figure.legend(handles, labels, frameon=False, **above)
    return figure


def main(folder):
    """Writes every figure as an SVG, the same bytes each time."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.hashsalt": "cage_jax", "font.size": 10.5})
    for draw in (grid, straight_through, hopping, dose):
        draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.use("agg")
    here = pathlib.Path(__file__).parent / "figures"
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here)
