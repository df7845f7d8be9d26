"""`cage-jax export`: files for other programs."""

import argparse
import pathlib

from cage_jax.cli.command import Command, add_out, check_out, load_llama, print_written
from cage_jax.cli.terminal import Terminal
from cage_jax.export.target import Target, targets


def targets_to_write() -> dict[str, Target]:
    """Returns the targets that the command can write, by name."""
    return {name: target for name, target in targets().items() if target.write}


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds OUT and --format."""
    found = targets_to_write()
    endings = {target.suffix: name for name, target in found.items() if target.suffix}
    add_out(flags, f"a folder, or a file that ends in {' or '.join(endings)}")
    default = ", ".join(f"{name} for {ending}" for ending, name in endings.items())
    flags.add_argument(
        "--format",
        choices=found,
        help=f"by default {default}, and {_default_format('')} for a folder",
    )


def _default_format(suffix):
    found = targets_to_write()
    matching = [name for name, target in found.items() if target.suffix == suffix]
    return matching[0] if matching else _default_format("")


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Writes the model."""
    name = options.format or _default_format(pathlib.Path(options.out).suffix.lower())
    target = targets_to_write()[name]
    check_out(options, target.is_export if target.suffix else None)
    model, config = load_llama(options.model, terminal)
    if not model.tokenizer:
        terminal.warn(
            "the model has no tokenizer; programs that answer in text cannot run it."
        )
    assert target.write is not None
    if lacks := target.lacks(model.params):
        terminal.warn(lacks)
    with terminal.doing(f"writing {options.out}"):
        try:
            target.write(
                model.params,
                config,
                options.out,
                tokenizer=model.tokenizer,
                overwrite=options.overwrite,
            )
        except ValueError as error:
            raise ValueError(
                f"{error} `cage-jax quantize --help` lists the presets of each format."
            ) from error
    print_written(options, terminal, {"format": name}, f", {name}")
    return 0


COMMAND = Command(
    "export",
    "write a model for other programs, such as vLLM and llama.cpp",
    "codes/ model.gguf",
    add_arguments,
    run,
)
