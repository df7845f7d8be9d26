"""`cage-jax tune`: which kernels run on this machine."""

import argparse

from cage_jax.cli import weights
from cage_jax.cli.command import Command, load_model
from cage_jax.cli.terminal import Terminal
from cage_jax.llama.tensors import by_path
from cage_jax.optim.optimizers import cage_adamw
from cage_jax.program.tuning import tune


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds --report and the flags of quantizers."""
    flags.add_argument(
        "--report",
        action="store_true",
        help="only show what runs and why; measures and keeps nothing",
    )
    weights.add_arguments(flags)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Times the kernels of `fake_quant` and of the recommended optimizer's step."""
    rules = weights.rules_of(options)
    if rules is None:
        raise ValueError(
            "`--weights`, `--embedding` or `--head` must be given; got none of them. "
            "Add --weights int4."
        )
    floats = by_path(load_model(options.model, terminal).floats())
    weights.quantized_parameters(options, rules, floats)  # its errors name the flags
    # Its numbers decide nothing here.
    optimizer = cage_adamw(1e-3, rules, total_steps=1000)
    with terminal.doing("timing kernels"):
        found = tune(floats, rules, optimizer=optimizer, report=options.report)
    forms = [
        each._asdict() | {"quantizer": str(each.quantizer)} for each in found.forms
    ]
    content = {"device": found.kind, "forms": forms, "faults": found.faults}
    terminal.result(content, str(found))
    return 0


COMMAND = Command(
    "tune",
    "time the kernels for a model on this TPU or GPU, and keep what is faster",
    "model.gguf --weights int4 --group-size 32",
    add_arguments,
    run,
)
