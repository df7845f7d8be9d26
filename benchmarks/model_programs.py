"""Times tracing, lowering and compiling a W4A8 training step, and the model's report.

The model is a transformer of Linen with 8 layers, 29 M parameters, once as a scan over
stacked layers and once flat. Its weights have int4 groups and the inputs of all its
layers are int8; both against full precision, in one process, in turns.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import tyro
from flax import linen as nn
from measurement import Rows
from rich.console import Console

import cage_jax as cage

PHASES = ("trace", "lower", "compile")
BOUNDS = {"scan": 1.35, "flat": 1.5}
REPORT_BOUND = 3.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times what quantization adds to the compilation of a model."""

    rounds: int = 5
    """Compilations of each kind."""
    layers: int = 8
    """Layers of the transformer."""
    width: int = 512
    """Its width; the inner width is four times that."""
    tiny: bool = False
    """One round of two narrow layers, to see that it works; nothing is written."""


class Block(nn.Module):
    """A layer of a transformer, in the form that a scan calls."""

    width: int

    @nn.compact
    def __call__(self, x, _=None):
        """Returns the values of the next layer, and nothing to stack."""
        heads = max(1, self.width // 64)
        x = x + nn.MultiHeadDotProductAttention(num_heads=heads)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(h), None


class Transformer(nn.Module):
    """A transformer, its layers in a scan or one after the other."""

    layers: int
    width: int
    scan: bool

    @nn.compact
    def __call__(self, tokens):
        """Returns the logits of the next tokens."""
        x = nn.Embed(8 * self.width, self.width)(tokens)
        if self.scan:
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            stack = nn.scan(Block, length=self.layers, **options)
            x, _ = stack(self.width)(x, None)
        else:
            for _ in range(self.layers):
                x, _ = Block(self.width)(x)
        return nn.Dense(8 * self.width)(nn.LayerNorm()(x))


def _compiled(function, *arguments) -> tuple[list[float], Any]:
    """Compiles a function from nothing; seconds of each phase."""
    jax.clear_caches()
    times = [time.perf_counter()]
    found = jax.jit(function).trace(*arguments)
    times.append(time.perf_counter())
    found = found.lower()
    times.append(time.perf_counter())
    found = found.compile()
    times.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(times)], found


def _losses(model, variables, tokens):
    """The loss in full precision and at W4A8."""
    rules = cage.suggest(model.apply, variables, tokens, show=False)
    quantized = cage.quantize_activations(model.apply, rules)

    def full(variables):
        return jnp.mean(model.apply(variables, tokens) ** 2)

    def at_w4a8(variables):
        return jnp.mean(quantized(cage.fake_quant(variables, rules), tokens) ** 2)

    return {"full": full, "W4A8": at_w4a8}, rules


def _report_ratio(model, rules, variables, tokens) -> tuple[float, float]:
    """Seconds of a report, and those of one forward pass with its compilation."""
    jax.clear_caches()
    begin = time.perf_counter()
    cage.report(model.apply, rules, variables, tokens)
    middle = time.perf_counter()
    jax.clear_caches()
    again = time.perf_counter()
    jax.block_until_ready(jax.jit(model.apply)(variables, tokens))
    return middle - begin, time.perf_counter() - again


def measure(settings: Settings) -> dict[str, Any]:
    """Medians of the phases, and of the ratios within a round."""
    # Each compilation begins from nothing.
    jax.config.update("jax_enable_compilation_cache", False)
    tokens = jnp.zeros((2, 64), jnp.int32)
    figures: dict[str, Any] = {}
    targets = []
    for layout, bound in BOUNDS.items():
        model = Transformer(settings.layers, settings.width, layout == "scan")
        variables = jax.jit(model.init)(jax.random.key(0), tokens)
        losses, rules = _losses(model, variables, tokens)
        rounds = []
        for _ in range(settings.rounds + 1):
            rounds.append(
                {
                    name: _compiled(jax.value_and_grad(loss), variables)[0]
                    for name, loss in losses.items()
                }
            )
        del rounds[0]  # which imports and fills caches of Python
        for name in losses:
            for number, phase in enumerate(PHASES):
                figures[f"{layout}, {name}, {phase}"] = statistics.median(
                    each[name][number] for each in rounds
                )
        ratio = statistics.median(
            sum(each["W4A8"]) / sum(each["full"]) for each in rounds
        )
        figures[f"{layout}, ratio"] = ratio
        targets.append(measurement.target(f"{layout}, to full precision", ratio, bound))
        pairs = [
            _report_ratio(model, rules, variables, tokens)
            for _ in range(settings.rounds)
        ]
        figures[f"{layout}, report"] = statistics.median(a for a, _ in pairs)
        figures[f"{layout}, forward"] = statistics.median(b for _, b in pairs)
        ratio = statistics.median(a / b for a, b in pairs)
        figures[f"{layout}, report ratio"] = ratio
        about = f"{layout}, report to forward pass"
        targets.append(measurement.target(about, ratio, REPORT_BOUND))
    return {
        "name": "model_programs",
        "benchmark": "model_programs",
        "title": "Tracing, lowering and compiling a training step at W4A8, in seconds",
        "environment": measurement.environment("flax"),
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "targets": targets,
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    figures = record["figures"]
    cells = []
    for layout in BOUNDS:
        for name in ("full", "W4A8"):
            times = [figures[f"{layout}, {name}, {phase}"] for phase in PHASES]
            ratio = f"{figures[f'{layout}, ratio']:.2f}" if name == "W4A8" else "1"
            cells.append([f"{layout}, {name}", *(f"{t:.2f}" for t in times), ratio])
        report, forward = figures[f"{layout}, report"], figures[f"{layout}, forward"]
        ratio = f"{figures[f'{layout}, report ratio']:.2f}"
        cells.append([f"{layout}, report", "", "", f"{report:.2f}", ratio])
        cells.append([f"{layout}, forward pass", "", "", f"{forward:.2f}", "1"])
    return Rows(["program", "trace", "lower", "compile and run", "ratio"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        settings = dataclasses.replace(settings, rounds=1, layers=2, width=64)
    count = 2 * 2 * (settings.rounds + 1)
    console.print(f"Compiling {count} training steps.", highlight=False)
    record = measure(settings)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
