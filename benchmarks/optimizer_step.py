"""Times an optimizer step with CAGE against plain AdamW, in JAX and in PyTorch.

Float32, a Llama's matrices, all steps with donated buffers. The contestants take
turns in one process, so their ratios hold where their times do not.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
from measurement import Rows
from rich.console import Console
from rich.markup import escape

import cage_jax as cage

try:
    import torch
except ModuleNotFoundError:  # compared with where it is there, and said where not
    torch = None

LEARNING_RATE = 1e-3
STRENGTH = 10.0
ADAMW = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
GROUP = 128
# Any step before this one is silent, any later one is not.
SILENT_STEPS = 100_000
# Layers, width and feed-forward width.
SIZES = {"10M": (2, 640, 1792), "100M": (8, 1024, 2816), "tiny": (1, 128, 256)}
QUANTIZERS = {"int4": cage.int4(group_size=GROUP), "quest": cage.quest(4)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times an optimizer step with CAGE against plain AdamW, in JAX and in PyTorch."""

    sizes: tuple[str, ...] = ("10M", "100M")
    """Numbers of parameters: 10M, 100M or tiny."""
    rounds: int = 21
    """Timed steps of each contestant; two thirds of them at 100M."""
    tiny: bool = False
    """Two steps with 0.2M parameters, to see that everything works; not written."""


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """The (in, out) shapes of a Llama's matrices."""
    layers, width, hidden = SIZES[size]
    kinds = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    kinds |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        f"{layer}/{name}/kernel": shape
        for layer in range(layers)
        for name, shape in kinds.items()
    }


# --- JAX ------------------------------------------------------------------------------


def random_tree(size: str, scale: float, seed: int) -> dict[str, jax.Array]:
    """Normal float32 arrays of a Llama's shapes."""
    keys = jax.random.split(jax.random.key(seed), len(shapes(size)))
    return {
        name: scale * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes(size).items())
    }


def optimizers() -> dict[str, optax.GradientTransformationExtraArgs]:
    """AdamW without and with the correction by each quantizer."""
    strength = cage.silence_then_constant(2 * SILENT_STEPS, STRENGTH, silence=0.5)
    found = {"AdamW": optax.adamw(LEARNING_RATE, **ADAMW)}
    for name, quantizer in QUANTIZERS.items():
        rules = cage.Rules([(r".*kernel", quantizer)])
        found[name] = cage.cage_adamw(LEARNING_RATE, rules, strength, **ADAMW)
    return found


def jax_steps(size: str) -> dict[str, Callable[[], None]]:
    """A function for each contestant that makes one step and waits for it."""
    gradients = random_tree(size, 1e-3, seed=1)
    steps: dict[str, Callable[[], None]] = {}
    for name, tx in optimizers().items():
        params = random_tree(size, 0.02, seed=0)
        # What the phases of an optimizer share; they take turns with it.
        holder: list[Any] = [params, tx.init(params)]
        step = _jitted_step(tx)
        if name == "AdamW":
            steps["optax, AdamW"] = _call(step, holder, gradients, None)
            continue
        for phase, count in (("silent", 0), ("active", SILENT_STEPS)):
            call = _call(step, holder, gradients, count)
            steps[f"cage_jax, {name}, {phase}"] = call
    return steps


def _jitted_step(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def _call(step, holder, gradients, count):
    """Makes one step at `count`, by the very program that trains in both phases."""

    def call():
        params, state = holder
        if count is not None:
            state = optax.tree_utils.tree_set(state, cage_count=jnp.int32(count))
        holder[:] = jax.block_until_ready(step(params, state, gradients))

    return call


# --- PyTorch --------------------------------------------------------------------------


def torch_int4_error(x):
    """The error x - Q(x) for int4 with one absmax scale for each group of a column."""
    groups = x.view(-1, GROUP, x.shape[-1])
    scale = groups.abs().amax(1, keepdim=True).div_(7).clamp_(min=1e-38)
    rounded = (groups / scale).round_().clamp_(-7, 7).mul_(scale)
    return (groups - rounded).view_as(x)


def torch_quest_error(x, hadamard):
    """The error x - Q(x) for QuEST's 4 bits: blocks rotated, an RMS scale a column."""
    block = len(hadamard)
    rotated = torch.matmul(hadamard, x.view(-1, block, x.shape[-1])).view_as(x)
    bound = 2.5139305786 * rotated.square().mean(0, keepdim=True).sqrt_()
    scale = bound.mul_(2 / 15).clamp_(min=1e-38)
    level = (rotated / scale).add_(0.5).round_().sub_(0.5).clamp_(-7.5, 7.5)
    error = rotated.sub_(level.mul_(scale))
    # The rotation is orthonormal and symmetric, so the error rotates back by it.
    return torch.matmul(hadamard, error.view(-1, block, x.shape[-1])).view_as(x)


def torch_hadamard(block: int):
    """Sylvester's matrix, orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]
        )
    return matrix / math.sqrt(block)


def torch_steps(size: str) -> dict[str, Callable[[], None]]:
    """AdamW as PyTorch has it, and with the correction written in eager PyTorch."""
    torch.set_num_threads(measurement.cpus())
    hadamard = torch_hadamard(128)
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes(size).values():
        param = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        param.grad = 1e-3 * torch.randn(shape, generator=generator)
        params.append(param)
    betas = (ADAMW["b1"], ADAMW["b2"])
    options = {"lr": LEARNING_RATE, "betas": betas, "weight_decay": 0.1}
    default = torch.optim.AdamW(params, **options)
    fused = torch.optim.AdamW(params, fused=True, **options)

    def corrected(error):
        def call():
            fused.step()
            with torch.no_grad():
                for param in params:
                    param.add_(error(param), alpha=-LEARNING_RATE * STRENGTH)

        return call

    return {
        "torch, AdamW": default.step,
        "torch, AdamW fused": fused.step,
        "torch, int4, active": corrected(torch_int4_error),
        "torch, quest, active": corrected(lambda x: torch_quest_error(x, hadamard)),
    }


# --- figures --------------------------------------------------------------------------

SILENT_BOUND = 1.15


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Medians of all contestants, and their ratios within this run."""
    steps = jax_steps(size)
    if torch is not None:
        steps |= torch_steps(size)
    times = measurement.interleaved(steps, rounds)
    count = sum(math.prod(shape) for shape in shapes(size).values())
    rows = []
    for name in times:
        row = {
            "step": name,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "to_optax": measurement.median_ratio(times, name, "optax, AdamW"),
            "to_torch": None,
        }
        rival = _rival(name)
        if rival in times:
            row["to_torch"] = measurement.median_ratio(times, name, rival)
        rows.append(row)
    return {"size": size, "parameters": count, "rounds": rounds, "steps": rows}


def _rival(name: str) -> str | None:
    """The same step in PyTorch; with AdamW as PyTorch chooses it, where that is all."""
    if name.startswith("torch"):
        return None
    if name.endswith("active"):
        return name.replace("cage_jax", "torch")
    return "torch, AdamW"


def targets_of(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """The bounds of one size, met or not."""
    found = []
    for row in figure["steps"]:
        name = f"{figure['size']}, {row['step']}"
        if row["step"].endswith("silent"):
            text = f"{name}: time over optax.adamw's"
            found.append(measurement.target(text, row["to_optax"], SILENT_BOUND))
        if row["to_torch"] is not None and row["step"].startswith("cage_jax"):
            text = f"{name}: time over {_rival(row['step'])}'s"
            found.append(measurement.target(text, row["to_torch"], 1.0))
    return found


def record_of(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is written to JSON."""
    return {
        "name": "optimizer_step",
        "benchmark": "optimizer_step",
        "title": "An optimizer step: median time, and median ratio to the same round's",
        "environment": measurement.environment(),
        "settings": {
            "quantizers": {name: str(q) for name, q in QUANTIZERS.items()},
            "dtype": "float32",
            "strength": STRENGTH,
        },
        "figures": figures,
        "targets": [each for figure in figures for each in targets_of(figure)],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    cells = []
    for figure in record["figures"]:
        for row in figure["steps"]:
            to_torch = row["to_torch"]
            cells.append(
                [
                    f"{figure['parameters'] / 1e6:.1f}M, {row['step']}",
                    f"{row['milliseconds']:.1f}",
                    f"{row['to_optax']:.2f}",
                    "" if to_torch is None else f"{to_torch:.2f}",
                ]
            )
    return Rows(["step", "ms", "to optax.adamw", "to PyTorch"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    sizes = ("tiny",) if settings.tiny else settings.sizes
    try:
        for size in sizes:
            if size not in SIZES:
                raise ValueError(
                    f"`--sizes` must be among {list(SIZES)}; got {size!r}. Use 10M."
                )
        if settings.rounds < 3:
            raise ValueError(
                f"`--rounds` must be at least 3, for a median; got {settings.rounds}. "
                f"Use 21."
            )
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    console.print(
        f"Optimizer steps at {', '.join(sizes)} parameters. 10M takes half a minute, "
        f"100M three minutes and 8 GB.",
        highlight=False,
    )
    if torch is None:
        console.print("PyTorch is not installed, so nothing is compared with it.")
    figures = []
    for size in sizes:
        rounds = {"tiny": 2, "100M": max(3, 2 * settings.rounds // 3)}.get(
            size, settings.rounds
        )
        figures.append(measure(size, rounds))
    record = record_of(figures)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
