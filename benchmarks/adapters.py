"""Counts the memory of training a Llama, all of its weights or adapters in their grid.

A step is the gradient of the loss and AdamW, in float32. The bytes are those that the
compiler plans; the steps take turns.
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
from flax import nnx
from measurement import Rows
from rich.console import Console

import cage_jax as cage
from cage_jax import finetuning
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.model import Llama

ALL, INT8 = "all weights", "LR-QAT, int8"
IN_PLACE = f"{INT8}, `adapted`"
MEBIBYTE = 2**20
# Each with the arguments of `low_rank`, None for all weights; then whether the function
# is `adapted`, and whether the weights are codes at the start.
KINDS: dict[str, tuple[dict[str, Any] | None, bool, bool]] = {
    ALL: (None, False, False),
    "LR-QAT, bfloat16": ({"store": "bfloat16"}, False, False),
    INT8: ({"store": "int8"}, False, False),
    "LR-QAT, bfloat16, `adapted`": ({"store": "bfloat16"}, True, False),
    IN_PLACE: ({"store": "int8"}, True, False),
    "QLoRA, int4": ({}, False, True),
    "QLoRA, int4, `adapted`": ({}, True, True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Counts the memory of training steps, of all weights and of adapters."""

    width: int = 512
    """Width of the model; the SwiGLU is three times as wide."""
    layers: int = 8
    """Its layers."""
    tokens: int = 256
    """Tokens of a step."""
    rank: int = 4
    """Rank of the adapters."""
    rounds: int = 5
    """Timed steps of each kind."""
    tiny: bool = False
    """One step of a narrow model, to see that it works; nothing is written."""


def _model(settings: Settings) -> tuple[Callable, Any]:
    """The loss as a function of parameters and tokens, and the parameters."""
    config = LlamaConfig(
        vocabulary=256,
        width=settings.width,
        hidden=3 * settings.width,
        layers=settings.layers,
        heads=max(1, settings.width // 64),
    )
    graph, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)))

    def loss(params, tokens):
        logits, labels = nnx.merge(graph, params)(tokens[:, :-1]), tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss, params


class Program:
    """The step of one kind, compiled, and all that it reads."""

    def __init__(self, kind: str, loss: Callable, params: Any, rules, settings):
        options, in_place, from_codes = KINDS[kind]
        tx = optax.adamw(1e-4)
        if options is None:
            # A copy, which the first step may overwrite.
            trained, frozen = jax.tree.map(jnp.copy, params), ()

            def of_trained(trained, frozen, tokens):
                return loss(cage.fake_quant(trained, rules), tokens)
        else:
            start = cage.quantize(params, rules) if from_codes else params
            trained, frozen = finetuning.low_rank(
                start, rules, rank=settings.rank, **options
            )

            def of_weights(trained, frozen, tokens):
                return loss(finetuning.weights(trained, frozen), tokens)

            of_trained = finetuning.adapted(loss) if in_place else of_weights

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, state, frozen, tokens):
            gradients = jax.grad(of_trained)(trained, frozen, tokens)
            updates, state = tx.update(gradients, state, trained)
            return optax.apply_updates(trained, updates), state

        self._trained, self._state = trained, tx.init(trained)
        self._rest = frozen, jnp.zeros((1, settings.tokens + 1), jnp.int32)
        arguments = self._trained, self._state, *self._rest
        self.compiled = step.lower(*arguments).compile()

    def __call__(self) -> None:
        """Does one step."""
        state = self.compiled(self._trained, self._state, *self._rest)
        self._trained, self._state = jax.block_until_ready(state)

    def memory(self) -> dict[str, float]:
        """MiB of what is kept between steps, and of what a step needs beside it."""
        found = self.compiled.memory_analysis()
        leaves = jax.tree.leaves((self._trained, self._state))
        return {
            "trained": sum(leaf.nbytes for leaf in leaves) / MEBIBYTE,
            "kept": found.argument_size_in_bytes / MEBIBYTE,
            "step": found.temp_size_in_bytes / MEBIBYTE,
        }


def measure(settings: Settings) -> dict[str, Any]:
    """The memory of each kind, and the median of its step's time to that of `ALL`."""
    loss, params = _model(settings)
    rules = cage.Rules([(r"layers/.*kernel", cage.int4(group_size=64)), (r".*", None)])
    tokens = jax.ShapeDtypeStruct((1, settings.tokens + 1), jnp.int32)
    rules = cage.resolve(rules, loss, params, tokens)
    programs = {kind: Program(kind, loss, params, rules, settings) for kind in KINDS}
    figures = {kind: program.memory() for kind, program in programs.items()}
    times = measurement.interleaved(programs, settings.rounds, warmup=1)
    for kind, each in figures.items():
        each["total"] = each["kept"] + each["step"]
        each["seconds"] = statistics.median(times[kind])
        each["ratio"] = measurement.median_ratio(times, kind, ALL)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "name": "adapters",
        "benchmark": "adapters",
        "title": f"A training step of a Llama of {count / 1e6:.1f} M parameters with "
        f"{settings.tokens} tokens, MiB",
        "environment": measurement.environment("flax"),
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    columns = ("trained", "kept", "step", "total")
    cells = [
        [kind, *(f"{each[name]:.0f}" for name in columns), f"{each['ratio']:.2f}"]
        for kind, each in record["figures"].items()
    ]
    header = ["trained", "trained, with Adam's moments", "all that is kept"]
    return Rows([*header, "beside it in a step", "together", "time"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        settings = dataclasses.replace(settings, width=64, tokens=16, rounds=1)
    console.print("Compiles and runs training steps: a minute.", highlight=False)
    record = measure(settings)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
