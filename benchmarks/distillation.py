"""Memory of the divergence from a teacher, and train steps of int4 that learn from one.

The model is a Llama of 30 M parameters with a vocabulary of 50,000; its weights have
int4 groups, and the step is one of AdamW. The memory is that of XLA's plan for the
gradient of an embedding and a head with as many parameters, logits included.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
from jax import lax
from measurement import Rows
from rich.console import Console

import cage_jax as cage
from cage_jax import llama
from cage_jax.finetuning import TopLogits, kl
from cage_jax.llama.config import LlamaConfig

MEMORY_BOUND = 1.3
TIME_BOUNDS = {"largest logits": 1.1, "live teacher": 1.4}
BASE = "cross-entropy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares distillation with cross-entropy."""

    rounds: int = 15
    """Timed steps of each kind."""
    tokens: int = 512
    """Tokens of a batch."""
    vocabulary: int = 50_000
    """Entries of the vocabulary."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Layers of the model."""
    k: int = 64
    """Logits that are kept of a teacher."""
    tiny: bool = False
    """One round of a small model, to see that it works; nothing is written."""


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The loss of full-precision training, of these tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def memory(settings: Settings) -> dict[str, int]:
    """Bytes that a gradient needs beside its inputs and itself, by what is trained."""

    def apply(params, tokens):
        return jnp.tanh(params["embedding"][tokens]) @ params["head"]

    def live(params, teacher, tokens):
        given = lax.stop_gradient(apply(teacher, tokens))
        return kl(apply(params, tokens), given)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    size = settings.vocabulary, settings.width
    params = {"embedding": shape(size), "head": shape(size[::-1])}
    tokens = jax.ShapeDtypeStruct((settings.tokens,), jnp.int32)
    logits = jax.eval_shape(apply, params, tokens)
    top = jax.eval_shape(functools.partial(TopLogits.of, k=settings.k), logits)
    losses: dict[str, tuple[Callable, tuple]] = {
        BASE: (lambda p, x: cross_entropy(apply(p, x), x), (params, tokens)),
        "largest logits": (lambda p, x, t: kl(apply(p, x), t), (params, tokens, top)),
        "given logits": (lambda p, x, t: kl(apply(p, x), t), (params, tokens, logits)),
        "live teacher": (live, (params, params, tokens)),
    }
    found = {}
    for name, (loss, arguments) in losses.items():
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes
    return found


def steps(settings: Settings) -> dict[str, Callable[[], None]]:
    """Functions that do one training step, by what is trained."""
    width, vocabulary = settings.width, settings.vocabulary
    config = LlamaConfig(
        vocabulary=vocabulary,
        width=width,
        hidden=64 * (width * 8 // 3 // 64 + 1),
        layers=settings.layers,
        heads=max(1, width // 64),
    )
    params = llama.initial_params(config, seed=0)
    rules = cage.Rules([(".*kernel", cage.int4(axis=-2, group_size=64)), (".*", None)])
    tokens = jax.random.randint(jax.random.key(0), (1, settings.tokens), 0, vocabulary)
    tx = optax.adamw(1e-5)

    def apply(params, tokens):
        return llama.logits(params, tokens, config)

    def plain(params, tokens):
        return cross_entropy(apply(cage.fake_quant(params, rules), tokens), tokens)

    losses: dict[str, Any] = {
        BASE: jax.tree_util.Partial(plain),
        "largest logits": cage.distill(apply, rules),
        "live teacher": cage.distill(apply, rules, params),
    }
    largest = jax.jit(lambda *args: TopLogits.of(apply(*args), settings.k))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(loss, params, state, tokens, given):
        gradients = jax.grad(loss)(params, tokens, **given)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def stepper(name):
        mine = jax.tree.map(jnp.copy, params)
        state = tx.init(mine)
        given = {}
        if name == "largest logits":
            given = {"teacher": largest(params, tokens)}

        def call():
            nonlocal mine, state
            mine, state = step(losses[name], mine, state, tokens, given)
            jax.block_until_ready(mine)

        return call

    return {name: stepper(name) for name in losses}


def measure(settings: Settings) -> dict[str, Any]:
    """Bytes, seconds, and their ratios to those of cross-entropy."""
    sizes = memory(settings)
    times = measurement.interleaved(steps(settings), settings.rounds)
    figures = {
        name: {
            "bytes": size,
            "bytes, ratio": size / sizes[BASE],
            "seconds": statistics.median(times[name]) if name in times else None,
            "ratio": measurement.median_ratio(times, name, BASE)
            if name in times
            else None,
        }
        for name, size in sizes.items()
    }
    targets = [
        measurement.target(
            f"memory of the gradient, {name}, to cross-entropy",
            figures[name]["bytes, ratio"],
            MEMORY_BOUND,
        )
        for name in ("given logits", "live teacher")
    ]
    targets += [
        measurement.target(
            f"a step of int4, {name}, to cross-entropy", figures[name]["ratio"], bound
        )
        for name, bound in TIME_BOUNDS.items()
    ]
    return {
        "name": "distillation",
        "benchmark": "distillation",
        "title": f"Gradients and int4 steps of {settings.tokens} tokens and a teacher, "
        "to those of cross-entropy",
        "environment": measurement.environment("flax"),
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "seconds": times,
        "targets": targets,
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    cells = [
        [
            name,
            f"{each['bytes'] / 1e6:.0f}",
            f"{each['bytes, ratio']:.2f}",
            f"{1e3 * each['seconds']:.0f}" if each["seconds"] else "",
            f"{each['ratio']:.2f}" if each["ratio"] else "",
        ]
        for name, each in record["figures"].items()
    ]
    return Rows(
        ["trained on", "MB of the gradient", "ratio", "step, ms", "ratio"], cells
    )


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        small = {"rounds": 1, "tokens": 32, "vocabulary": 512, "width": 64}
        settings = dataclasses.replace(settings, layers=1, k=8, **small)
    console.print(f"Timing {settings.rounds} steps of each kind.", highlight=False)
    record = measure(settings)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
