"""`cage-jax check`: whether a model is well-formed, and the same as another."""

import argparse

from cage_jax.cli.command import Command, load_model, report_of, totals
from cage_jax.cli.terminal import Terminal
from cage_jax.export.checking import differences
from cage_jax.export.loading import find
from cage_jax.export.text import tokenizer_of
from cage_jax.llama.tensors import by_path

DIFFERENT = 3


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds --same-as."""
    flags.add_argument(
        "--same-as",
        metavar="OTHER",
        help=f"a model that must have the same codes and scales; exit code {DIFFERENT} "
        f"if it has others",
    )


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Reads the whole model, checks it and compares it."""
    if options.same_as is not None:  # checked before the first model is read
        try:
            find(options.same_as)
        except (FileNotFoundError, ValueError) as error:
            message = str(error).replace("`path`", "`--same-as`")
            raise type(error)(message) from error
    model = load_model(options.model, terminal)
    params = by_path(model.params)
    if "tokenizer.json" in model.tokenizer:
        tokenizer_of(model.tokenizer)
    elif model.config is not None:
        terminal.warn("the model has no tokenizer.json, so it cannot read text.")
    report, others = report_of(params), []
    content = totals(report)
    lines = [
        f"well-formed: {content['weights']:,} weights at {report.bits_per_weight:.2f} "
        f"bits, {report.bytes_after:,} bytes"
    ]
    if options.same_as is not None:
        other = load_model(options.same_as, terminal)
        others = differences(params, by_path(other.params))
        lines += [f"differs from {options.same_as}: {line}" for line in others] or [
            f"the same codes and scales as {options.same_as}"
        ]
    content |= {"well_formed": True, "differences": others}
    terminal.result(content, "\n".join(lines))
    return DIFFERENT if others else 0


COMMAND = Command(
    "check",
    "read a whole model and tell whether it is well-formed",
    "model.gguf --same-as codes/",
    add_arguments,
    run,
    {"well_formed": False},
)
