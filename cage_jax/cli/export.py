"""`cage-jax export`: files for other programs."""

import argparse
import pathlib

from cage_jax.cli.command import (
    Command,
    add_out,
    check_out,
    load_llama,
    load_model,
    print_written,
)
from cage_jax.cli.terminal import Terminal
from cage_jax.export.target import Target, targets
from cage_jax.export.template_names import OF_TRANSFORMERS, TABLES

NAMES = (*TABLES, OF_TRANSFORMERS)
# The flags by the names of the arguments, for errors.
_FLAGS = {"config": "--template", "names": "--names", "codes": "MODEL"}


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
    flags.add_argument(
        "--template",
        metavar="FLOATS",
        help="the model's own file of floats: a GGUF, or a transformers folder, of any "
        "architecture; all but what MODEL has as codes or floats is copied from it. "
        "MODEL may then be a tree of any model",
    )
    flags.add_argument(
        "--names",
        choices=NAMES,
        help="what MODEL calls the tensors of --template; without it as the template, "
        "or as this library's Llama",
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
    write = _by_template if options.template is not None else _llama
    if options.names is not None and write is _llama:
        raise ValueError(
            f"`--names` has no effect without --template; got {options.names}. Leave "
            f"it out, or give the model's own file as --template."
        )
    write(options, terminal, target)
    print_written(options, terminal, {"format": name}, f", {name}")
    return 0


def _llama(options, terminal, target):
    """Writes a Llama with its own dimensions and tokenizer."""
    model, config = load_llama(options.model, terminal)
    if not model.tokenizer:
        terminal.warn(
            "the model has no tokenizer; programs that answer in text cannot run it."
        )
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


def _by_template(options, terminal, target):
    """Writes a model of any architecture like its own file or folder of floats."""
    if not target.takes_template:
        raise ValueError(
            f"`--template` must be left out for what {target.written_by} writes; got "
            f"{options.template}. Use --format gguf or compressed-tensors."
        )
    params = load_model(options.model, terminal).params
    with terminal.doing(f"writing {options.out}"):
        try:
            target.write(
                params,
                options.template,
                options.out,
                names=options.names,
                overwrite=options.overwrite,
            )
        except (FileNotFoundError, ValueError) as error:
            message = str(error)
            for argument, flag in _FLAGS.items():
                message = message.replace(f"`{argument}`", f"`{flag}`")
            absent = isinstance(error, FileNotFoundError)
            raise (FileNotFoundError if absent else ValueError)(message) from error


COMMAND = Command(
    "export",
    "write a model for other programs, such as vLLM and llama.cpp",
    "codes/ model.gguf",
    add_arguments,
    run,
)
