"""Times one layer of each kind, forward and backward, its inputs quantized or not."""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import tyro
from flax import nnx
from measurement import Rows
from rich.console import Console

import cage_jax as cage
import cage_jax.flax
from cage_jax.program.kv_cache import quantize_kv

WEIGHTS = cage.int4(axis=0)
# The quantizers of weights, and of inputs token by token.
ARMS: dict[str, tuple[cage.Quantizer | None, cage.Quantizer | None]] = {
    "full precision": (None, None),
    "W4A16": (WEIGHTS, None),
    "W4A8": (WEIGHTS, cage.int8(axis=-1)),
    "W4A4": (WEIGHTS, cage.int4(axis=-1)),
}
BITS_OF_KEYS = {"full precision": None, "KV8": 8, "KV4": 4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times layers of each kind with quantized weights and inputs, in turns."""

    rounds: int = 30
    """Timed steps of each kind."""
    tiny: bool = False
    """Two steps of small layers, to see that it works; nothing is written."""


class Tied(nnx.Module):
    """An embedding that is also the layer of the logits."""

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)

    def __call__(self, tokens):
        """Maps (tokens,) to (tokens, vocabulary)."""
        return self.embed.attend(self.embed(tokens))


def layers(width: int, tokens: int) -> dict[str, tuple[nnx.Module, jax.Array]]:
    """A layer of each kind, and its input."""
    rngs, heads = nnx.Rngs(0), max(width // 64, 1)
    x = jax.random.normal(jax.random.key(0), (tokens, width))
    channels, side = max(width // 8, 8), 16
    images = jax.random.normal(
        jax.random.key(1), (max(tokens // side**2, 1), side, side, channels)
    )
    return {
        "Linear": (nnx.Linear(width, width, rngs=rngs), x),
        "Einsum": (nnx.Einsum("td,dhk->thk", (width, heads, width), rngs=rngs), x),
        "MultiHeadAttention": (
            nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs),
            x.reshape(-1, min(tokens, 128), width),
        ),
        "Embed, tied": (
            Tied(4 * width, width, rngs),
            jnp.arange(tokens) % (4 * width),
        ),
        "Conv 3 x 3": (nnx.Conv(channels, channels, (3, 3), rngs=rngs), images),
        "Conv 3 x 3, by channel": (
            nnx.Conv(
                channels, channels, (3, 3), feature_group_count=channels, rngs=rngs
            ),
            images,
        ),
    }


def quantized_step(
    model: nnx.Module,
    x: jax.Array,
    weights: cage.Quantizer | None,
    inputs: cage.Quantizer | None,
) -> Callable[[], Any]:
    """A function that computes the gradient of a layer's parameters once."""
    pattern = r".*(kernel|embedding)"
    rules = cage.Rules([(pattern, weights, inputs), (r".*", None)])
    if inputs is not None:
        model = cage_jax.flax.quantize_activations(model, rules)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, x):
        def loss(params):
            rounded = params if weights is None else cage.fake_quant(params, rules)
            return jnp.sum(jnp.square(nnx.merge(graphdef, rounded, rest)(x)))

        return jax.grad(loss)(params)

    return lambda: jax.block_until_ready(step(params, x))


def attention_step(tokens: int, bits: int | None) -> Callable[[], Any]:
    """The same of causal attention, by its queries, keys and values."""
    keys = jax.random.split(jax.random.key(2), 3)
    qkv = [jax.random.normal(key, (max(tokens // 128, 1), 128, 8, 64)) for key in keys]
    quantizer = None
    if bits is not None:
        quantizer = cage.Quantizer(cage.formats.Integer(bits), axis=-1)

    @jax.jit
    def step(qkv):
        def loss(qkv):
            query, key, value = qkv
            key, value, mask = quantize_kv(key, value, quantizer, quantizer)
            mixed = jax.nn.dot_product_attention(
                query, key, value, mask=mask[None, None]
            )
            return jnp.sum(jnp.square(mixed))

        return jax.grad(loss)(qkv)

    return lambda: jax.block_until_ready(step(qkv))


def measure(
    width: int = 512, tokens: int = 2048, rounds: int = 30, warmup: int = 3
) -> dict[str, Any]:
    """Median times of each layer and arm, and their ratios to full precision.

    Args:
      width: of the layers.
      tokens: rows of their inputs.
      rounds: timed steps of each arm.
      warmup: steps before them.
    """
    figures, seconds = {}, {}
    kinds = {
        name: {arm: quantized_step(model, x, *ARMS[arm]) for arm in ARMS}
        for name, (model, x) in layers(width, tokens).items()
    }
    kinds["attention, keys and values"] = {
        arm: attention_step(tokens, bits) for arm, bits in BITS_OF_KEYS.items()
    }
    for name, functions in kinds.items():
        times = measurement.interleaved(functions, rounds, warmup)
        seconds[name] = times
        figures[name] = {
            arm: {
                "seconds": statistics.median(times[arm]),
                "to full precision": measurement.median_ratio(
                    times, arm, "full precision"
                ),
            }
            for arm in functions
        }
    return {
        "name": "layers",
        "benchmark": "layers",
        "title": f"Gradients of one layer of width {width}, {tokens} tokens: ratio to "
        f"full precision",
        "environment": measurement.environment("flax"),
        "settings": {"width": width, "tokens": tokens, "rounds": rounds},
        "figures": figures,
        "seconds": seconds,
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    arms = list(dict.fromkeys(arm for of in record["figures"].values() for arm in of))
    arms.remove("full precision")
    cells = []
    for name, figures in record["figures"].items():
        base = f"{1e3 * figures['full precision']['seconds']:.1f}"
        ratios = [
            f"{figures[arm]['to full precision']:.2f}" if arm in figures else ""
            for arm in arms
        ]
        cells.append([name, base, *ratios])
    return Rows(["layer", "full precision, ms", *arms], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    console.print("Times layers in turns: about a minute.", highlight=False)
    if settings.tiny:
        record = measure(width=16, tokens=32, rounds=2, warmup=1)
    else:
        record = measure(rounds=settings.rounds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
