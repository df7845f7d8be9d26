"""Times an optimizer step with CAGE against plain AdamW, in JAX and in PyTorch.

Float32, a Llama's matrices, all steps with donated buffers. The contestants take
turns in one process, so their ratios hold where their times do not.
"""

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping
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
STEPS = 2 * SILENT_STEPS
# The first of the timed steps.
PHASES = {"silent": 0, "active": 3 * SILENT_STEPS // 2}
# Recommended gradients and `statistics=10` are read at every tenth step.
PERIOD = 10
READS_IN_TURN = ("recommended", "coupled", "statistics=10")
# Layers, width and feed-forward width.
SIZES = {
    "10M": (2, 640, 1792),
    "30M": (6, 640, 1792),
    "100M": (8, 1024, 2816),
    "tiny": (1, 128, 256),
}
QUANTIZERS = {"int4": cage.int4(group_size=GROUP), "quest": cage.quest(4)}

Shapes = Mapping[str, tuple[int, int]]
Optimizers = dict[str, optax.GradientTransformationExtraArgs]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times an optimizer step with CAGE against plain AdamW, in JAX and in PyTorch."""

    sizes: tuple[str, ...] = ("30M", "100M")
    """Numbers of parameters: 10M, 30M, 100M or tiny."""
    periods: int = 5
    """Timed periods of ten steps of each contestant; 3 at 100M."""
    tiny: bool = False
    """Ten steps with 0.2M parameters, to see that everything works; not written."""


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """The (in, out) shapes of a Llama's matrices."""
    return llama_shapes(*SIZES[size])


def llama_shapes(layers: int, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """The (in, out) shapes of the matrices of so many layers."""
    kinds = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    kinds |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        f"{layer}/{name}/kernel": shape
        for layer in range(layers)
        for name, shape in kinds.items()
    }


# --- JAX ------------------------------------------------------------------------------


def random_tree(shapes: Shapes, scale: float, seed: int) -> dict[str, jax.Array]:
    """Normal float32 arrays of the given shapes."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: scale * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items())
    }


def adamw_and_cage() -> Optimizers:
    """AdamW without and with the correction, as published and as recommended."""
    strength = cage.silence_then_constant(STEPS, STRENGTH, silence=0.5)
    found = {"optax, AdamW": optax.adamw(LEARNING_RATE, **ADAMW)}
    for name, rules in _rules().items():
        form = f"cage_jax, {name}"
        found[form] = cage.cage_adamw(LEARNING_RATE, rules, strength=strength, **ADAMW)
        found[f"{form}, recommended"] = cage.cage_adamw(
            LEARNING_RATE, rules, total_steps=STEPS, **ADAMW
        )
    return found


def groups() -> list[Optimizers]:
    """The contestants that take turns; the first of a group is the base of others."""
    rules = _rules()["int4"]
    pull = cage.coupled(rules, learning_rate=LEARNING_RATE, total_steps=STEPS)
    adam = optax.adam(LEARNING_RATE)
    first = adamw_and_cage()
    strength = cage.silence_then_constant(STEPS, STRENGTH, silence=0.5)
    measured = {
        f"cage_jax, int4, statistics={period}": cage.cage_adamw(
            LEARNING_RATE, rules, strength=strength, statistics=period, **ADAMW
        )
        for period in (True, PERIOD)
    }
    return [
        first,
        {"optax, Adam": adam, "cage_jax, int4, coupled": optax.chain(pull, adam)},
        {"cage_jax, int4": first["cage_jax, int4"], **measured},
    ]


def _rules() -> dict[str, cage.Rules]:
    return {name: cage.Rules([(r".*kernel", q)]) for name, q in QUANTIZERS.items()}


class Program:
    """The compiled step of an optimizer, and what it trains.

    Args:
      tx: the optimizer.
      gradients: the gradients of every step.

    Attributes:
      memory: the bytes of intermediate results, over those of the parameters.
    """

    def __init__(self, tx: optax.GradientTransformation, gradients: dict):
        shapes = {name: x.shape for name, x in gradients.items()}
        self._gradients = gradients
        self._params: Any = random_tree(shapes, 0.02, seed=0)
        self._state = tx.init(self._params)
        self._step = jitted_step(tx).lower(*arguments(tx, shapes)).compile()
        bytes_of = self._step.memory_analysis()
        size = sum(x.nbytes for x in gradients.values())
        self.memory = bytes_of.temp_size_in_bytes / size

    def from_step(self, first: int | None) -> Callable[[], None]:
        """Returns what makes one step and waits for it, as if `first` had been done.

        The very program trains before and after the pull begins. With None, the state
        has no count of CAGE.
        """
        count = itertools.count(first or 0)

        def call():
            if first is not None:
                now = jnp.int32(next(count))
                self._state = optax.tree_utils.tree_set(self._state, cage_count=now)
            self._params, self._state = jax.block_until_ready(
                self._step(self._params, self._state, self._gradients)
            )

        return call


def jitted_step(tx: optax.GradientTransformation) -> Any:
    """Returns `(params, state, gradients) -> (params, state)`, jitted."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def arguments(tx: optax.GradientTransformation, shapes: Shapes) -> tuple:
    """Returns abstract arguments of `jitted_step`."""
    params = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in shapes.items()}
    return params, jax.eval_shape(tx.init, params), params


def steps_of(programs: Mapping[str, Program], phase: str) -> dict[str, Callable]:
    """A function for each contestant that makes one step of a phase."""
    return {
        name: program.from_step(PHASES[phase] if name.startswith("cage_jax") else None)
        for name, program in programs.items()
    }


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


def torch_steps(shapes: Shapes, phase: str) -> dict[str, Callable[[], None]]:
    """AdamW as PyTorch has it, or with the correction written in eager PyTorch."""
    torch.set_num_threads(measurement.cpus())
    hadamard = torch_hadamard(128)
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes.values():
        param = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        param.grad = 1e-3 * torch.randn(shape, generator=generator)
        params.append(param)
    betas = (ADAMW["b1"], ADAMW["b2"])
    options = {"lr": LEARNING_RATE, "betas": betas, "weight_decay": 0.1}
    fused = torch.optim.AdamW(params, fused=True, **options)
    if phase == "silent":
        default = torch.optim.AdamW(params, **options)
        return {"torch, AdamW": default.step, "torch, AdamW fused": fused.step}

    def corrected(error):
        def call():
            fused.step()
            with torch.no_grad():
                for param in params:
                    param.add_(error(param), alpha=-LEARNING_RATE * STRENGTH)

        return call

    return {
        "torch, int4": corrected(torch_int4_error),
        "torch, quest": corrected(lambda x: torch_quest_error(x, hadamard)),
    }


# --- figures --------------------------------------------------------------------------

SILENT_BOUND = 1.15
# At 30M, of the time to the base.
BOUNDS = {
    "cage_jax, int4, recommended, silent": 1.1,
    "cage_jax, int4, recommended, active": 1.45,
    "cage_jax, quest, active": 3.0,
    "cage_jax, quest, recommended, active": 3.2,
    "cage_jax, int4, coupled, silent": 1.1,
    "cage_jax, int4, coupled, active": 1.6,
    "cage_jax, int4, statistics=True, active": 1.6,
}
# At 30M, of the intermediate memory over the parameters.
MEMORY_BOUNDS = {
    "cage_jax, int4, active": 0.35,
    "cage_jax, int4, recommended, active": 0.35,
}


def measure(size: str, periods: int) -> dict[str, Any]:
    """Times of all contestants, and their ratios within this run."""
    rows: dict[str, dict[str, Any]] = {}
    gradients = random_tree(shapes(size), 1e-3, seed=1)
    for group in groups():
        programs = {name: Program(tx, gradients) for name, tx in group.items()}
        timed = {}
        for phase in PHASES:
            steps = steps_of(programs, phase)
            if torch is not None and "optax, AdamW" in group:
                steps |= torch_steps(shapes(size), phase)
            timed[phase] = measurement.interleaved(steps, PERIOD * periods)
        for name in dict.fromkeys(itertools.chain(*timed.values())):
            memory = programs[name].memory if name in programs else None
            for phase, times in timed.items():
                if name in times:
                    row = _row(name, phase, times) | {"memory": memory}
                    rows.setdefault(row["step"], row)
    count = sum(math.prod(shape) for shape in shapes(size).values())
    return {
        "size": size,
        "parameters": count,
        "rounds": PERIOD * periods,
        "steps": list(rows.values()),
    }


def _row(name, phase, times):
    """The figures of a contestant in a phase; the first one is the base."""
    base, rival = next(iter(times)), _rival(name, phase)
    ratios = measurement.ratios_in_period(times, name, base, PERIOD)
    to_torch = None
    if rival in times and not name.startswith("torch"):
        to_torch = measurement.median_ratio(times, name, rival)
    return {
        "step": _named(name, phase),
        "milliseconds": 1e3 * statistics.median(times[name]),
        "base": _named(base, phase),
        "to_base": statistics.mean(ratios),
        "in_period": ratios,
        "rival": _named(rival, phase),
        "to_torch": to_torch,
    }


def _named(name, phase):
    return name if "Adam" in name else f"{name}, {phase}"


def _rival(name, phase):
    """The same step in PyTorch; with AdamW as PyTorch chooses it, where that is all."""
    return "torch, AdamW" if phase == "silent" else name.replace("cage_jax", "torch")


def targets_of(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """The bounds of one size, met or not."""
    found = []
    for row in figure["steps"]:
        step = row["step"]
        name = f"{figure['size']}, {step}"
        bound = BOUNDS.get(step) if figure["size"] == "30M" else None
        if bound is None and step.endswith("silent") and "statistics" not in step:
            bound = SILENT_BOUND
        if bound is not None:
            text = f"{name}: time over {row['base']}'s"
            found.append(measurement.target(text, row["to_base"], bound))
        if figure["size"] == "30M" and step in MEMORY_BOUNDS:
            text = f"{name}: intermediate memory over the parameters"
            bound = MEMORY_BOUNDS[step]
            found.append(measurement.target(text, row["memory"], bound))
        if row["to_torch"] is not None and step.startswith("cage_jax"):
            text = f"{name}: time over {row['rival']}'s"
            found.append(measurement.target(text, row["to_torch"], 1.0))
    return found


def record_of(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is written to JSON."""
    return {
        "name": "optimizer_step",
        "benchmark": "optimizer_step",
        "title": "An optimizer step: median ms, and mean ratio of ten steps to a base",
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
    header = ["step", "ms", "base", "to it", "slowest of ten", "memory", "to PyTorch"]
    cells = []
    for figure in record["figures"]:
        for row in figure["steps"]:
            differ = any(word in row["step"] for word in READS_IN_TURN)
            cells.append(
                [
                    f"{figure['parameters'] / 1e6:.1f}M, {row['step']}",
                    f"{row['milliseconds']:.1f}",
                    "" if row["step"] == row["base"] else row["base"],
                    f"{row['to_base']:.2f}",
                    _cell(max(row["in_period"]) if differ else None),
                    _cell(row["memory"]),
                    _cell(row["to_torch"]),
                ]
            )
    return Rows(header, cells)


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    sizes = ("tiny",) if settings.tiny else settings.sizes
    try:
        for size in sizes:
            if size not in SIZES:
                raise ValueError(
                    f"`--sizes` must be among {list(SIZES)}; got {size!r}. Use 30M."
                )
        if settings.periods < 3:
            raise ValueError(
                f"`--periods` must be at least 3, for a median; got "
                f"{settings.periods}. Use 5."
            )
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    console.print(
        f"Optimizer steps at {', '.join(sizes)} parameters. 30M takes two minutes, "
        f"100M four minutes and 9 GB.",
        highlight=False,
    )
    if torch is None:
        console.print("PyTorch is not installed, so nothing is compared with it.")
    figures = []
    for size in sizes:
        periods = {"tiny": 1, "100M": 3}.get(size, settings.periods)
        figures.append(measure(size, periods))
    record = record_of(figures)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
