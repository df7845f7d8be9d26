"""Trains a tiny network that is a video, at few bits, with and without a teacher.

The network maps the number of a frame to the frame, as NeRV does. A wider one is the
teacher of TinyNeRV's distillation: the low frequencies of both outputs and, weighted by
where they differ, the high ones, at three scales. The clip is computed. Run `python
examples/tiny_nerv.py`; the default run takes a few minutes on two cores.
"""

import dataclasses
import functools
from typing import Any

import program

with program.imports(__name__):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import tyro
    from jax import lax
    from rich.console import Console
    from rich.table import Table

    import cage_jax as cage

HEIGHT, WIDTH = 4, 6  # of the first feature map; three blocks double it
WAVES = 8
DISTILLED, HIGH, SCALES = 0.3, 3.0, (1, 2, 4)
RAMP = 0.1  # of the steps, in which the distillation gets its weight
Params = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a tiny network that is a video at few bits."""

    frames: int = 16
    """Frames of the clip, 32 x 48 pixels."""
    width: int = 12
    """Channels of the network; the teacher has twice as many."""
    steps: int = 1000
    """Steps of full precision."""
    quantized_steps: int = 300
    """Steps at few bits, from there."""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """Bits of the weights."""
    seed: int = 0
    """Seed of the initial weights and of the order of frames."""
    tiny: bool = False
    """A few steps of one width, to see that it works."""


def clip(frames: int) -> jax.Array:
    """Computes a clip of three moving discs before a moving wave, (T, H, W, 3)."""
    height, width = 8 * HEIGHT, 8 * WIDTH
    time = np.arange(frames)[:, None, None] / frames
    y, x = np.mgrid[:height, :width] / height
    parts = [
        0.5 + 0.3 * np.sin(8 * (x + i * y / 2) + 2 * np.pi * time) for i in (0, 1, 2)
    ]
    for i, part in enumerate(parts):
        angle = 2 * np.pi * (time + i / 3)
        away = np.hypot(x - 0.75 - 0.4 * np.cos(angle), y - 0.5 - 0.3 * np.sin(angle))
        part += np.where(away < 0.15, 0.4, 0) - np.where(away < 0.07, 0.6, 0)
    return jnp.asarray(np.clip(np.stack(parts, -1), 0, 1), jnp.float32)


def initial(key: jax.Array, width: int) -> Params:
    """Draws the parameters of a network with `width` channels."""
    shapes = {
        "stem": (2 * WAVES, 4 * width),
        "map": (4 * width, HEIGHT * WIDTH * width),
        **{f"block_{i}": (3, 3, width, 4 * width) for i in range(3)},
        "head": (3, 3, width, 3),
    }
    return {
        name: {
            "kernel": jax.random.normal(each, shape) * (2 / np.prod(shape[:-1])) ** 0.5,
            "bias": jnp.zeros(shape[-1]),
        }
        for each, (name, shape) in zip(
            jax.random.split(key, len(shapes)), shapes.items()
        )
    }


def frames_of(params: Params, times: jax.Array) -> jax.Array:
    """Computes the frames at times in [0, 1), (N, H, W, 3)."""

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def convolved(name, x):
        layout = "NHWC", "HWIO", "NHWC"
        kernel = params[name]["kernel"]
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        return x + params[name]["bias"]

    angles = np.pi * 1.25 ** np.arange(WAVES) * times[:, None]
    x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    x = jax.nn.silu(dense("map", jax.nn.silu(dense("stem", x))))
    x = x.reshape(len(times), HEIGHT, WIDTH, -1)
    for i in range(3):
        n, height, width, channels = x.shape
        x = convolved(f"block_{i}", x).reshape(n, height, width, 2, 2, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, channels)
        x = jax.nn.silu(x)
    return (jnp.tanh(convolved("head", x)) + 1) / 2


def low_of(x: jax.Array) -> jax.Array:
    """Blurs frames by a Gaussian of 5 x 5 and deviation 1, zeros around."""
    line = np.exp(-(np.arange(-2.0, 3.0) ** 2) / 2)
    kernel = np.tile(np.outer(line, line)[..., None, None] / line.sum() ** 2, 3)
    return lax.conv_general_dilated(
        x,
        jnp.asarray(kernel, x.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )


def distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes TinyNeRV's loss: both bands, the high one weighted, over scales."""
    total = jnp.zeros(())
    for scale in SCALES:
        n, height, width, _ = student.shape
        own, given = (
            x.reshape(n, height // scale, scale, width // scale, scale, 3).mean((2, 4))
            for x in (student, teacher)
        )
        low, low_given = low_of(own), low_of(given)
        gap = jnp.mean(jnp.abs(given - own), -1, keepdims=True)
        least, most = (f(gap, (1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
        weights = lax.stop_gradient((gap - least) / (most - least + 1e-6))
        high = jnp.abs((own - low) - (given - low_given))
        total += jnp.mean(jnp.abs(low - low_given)) + HIGH * jnp.mean(weights * high)
    return total / len(SCALES)


def rules_of(bits: int) -> cage.Rules:
    """Returns one scale for each output of every kernel."""
    quantizer = {8: cage.int8, 4: cage.int4, 3: cage.int3, 2: cage.int2}[bits]
    return cage.Rules(
        [
            (r"(stem|map)/kernel", quantizer(axis=0)),
            (r".*kernel", quantizer(axis=(0, 1, 2))),
            (r".*", None),
        ]
    )


@functools.partial(jax.jit, static_argnames=("rules", "steps", "rate"))
def train(
    params: Params,
    video: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    rate: float,
    rules: cage.Rules | None = None,
    teacher: jax.Array | None = None,
) -> Params:
    """Trains on four frames a step, at rounded weights and near a teacher's frames."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps), b1=0.5)
    times = jnp.arange(len(video)) / len(video)

    def loss(params, chosen, step):
        found = params if rules is None else cage.fake_quant(params, rules)
        frames = frames_of(found, times[chosen])
        error = jnp.mean(jnp.abs(frames - video[chosen]))
        if teacher is None:
            return error
        weight = DISTILLED * jnp.minimum(step / (RAMP * steps), 1)
        return error + weight * distance(frames, teacher[chosen])

    def step(carry: Any, number: jax.Array):
        params, state = carry
        drawn = jax.random.permutation(jax.random.fold_in(key, number), len(video))
        gradient = jax.grad(loss)(params, drawn[:4], number)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    start = params, tx.init(params)
    return lax.scan(step, start, jnp.arange(steps))[0][0]


def psnr(params: Params, video: jax.Array) -> float:
    """Returns the mean over frames of the peak signal-to-noise ratio, in decibels."""
    frames = jax.jit(frames_of)(params, jnp.arange(len(video)) / len(video))
    error = np.mean(np.float64(frames - video) ** 2, (1, 2, 3))
    return float(np.mean(-10 * np.log10(error)))


def run(settings: Settings) -> dict[str, float]:
    """Trains all arms; returns their PSNR by name, such as "4 bits, distilled"."""
    if settings.tiny:
        settings = dataclasses.replace(
            settings, frames=4, width=4, steps=20, quantized_steps=10, bits=(4,)
        )
    video = clip(settings.frames)
    own, wide, order = jax.random.split(jax.random.key(settings.seed), 3)
    full = {"steps": settings.steps, "rate": 2e-3}
    student = train(initial(own, settings.width), video, order, **full)
    teacher = train(initial(wide, 2 * settings.width), video, order, **full)
    found = {"teacher": psnr(teacher, video), "full precision": psnr(student, video)}
    frames = frames_of(teacher, jnp.arange(len(video)) / len(video))
    # A tenth of the first rate; TinyNeRV's 1e-4 is for 720p and more steps.
    few = {"steps": settings.quantized_steps, "rate": 2e-4}
    for bits in settings.bits:
        rules = rules_of(bits)
        arms = {
            "rounded": student,
            "QAT": train(student, video, order, rules=rules, **few),
            "distilled": train(
                student, video, order, rules=rules, teacher=frames, **few
            ),
        }
        for name, params in arms.items():
            values = cage.dequantize(cage.quantize(params, rules))
            found[f"{bits} bits, {name}"] = psnr(values, video)
    return found


def main() -> int:
    """Runs the program; returns its exit code."""
    table = Table("weights", "PSNR, dB", title="A video of 32 x 48 pixels as a network")
    for name, value in run(tyro.cli(Settings, description=__doc__)).items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    program.run(main, stopped="nothing was saved.")
