"""The command `cage-jax`, for models on disk.

    cage-jax report SmolLM2.gguf
    cage-jax quantize SmolLM2.gguf codes/ --weights q4_0
    cage-jax eval codes/ --text speech.txt
    cage-jax export codes/ SmolLM2-q4_0.gguf
    cage-jax check SmolLM2-q4_0.gguf --same-as codes/
    cage-jax audit SmolLM2-q4_0.gguf --trained floats/ --rules rules.json
    cage-jax tune SmolLM2.gguf --weights q4_0

`cage-jax COMMAND --help` describes the arguments of each command.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from cage_jax.cli import audit, check, evaluate, export, quantize, report, tune
from cage_jax.cli.terminal import Terminal, prepare_streams, run

_MODULES = (report, quantize, export, evaluate, check, audit, tune)
COMMANDS = tuple(module.COMMAND for module in _MODULES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0: success; 1: failure, explained in one line; 2: wrong flags; 3: `check` or `audit`
    found a difference; 129, 130 and 143: stopped by the end of the terminal, Ctrl-C or
    `kill`.
    """
    prepare_streams()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser().print_help()
        return 2
    options = parser().parse_args(arguments)
    terminal = Terminal(json=options.json, quiet=options.quiet)
    return run(
        lambda: options.command.run(options, terminal),
        terminal,
        debug=options.debug,
        more=options.command.failure_fields,
        writes="out" in options,
    )


def parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands and flags."""
    top = argparse.ArgumentParser(
        prog="cage-jax",
        description="Inspects, quantizes, evaluates and exports models on disk.",
        epilog="`cage-jax COMMAND --help` has an example of each.",
    )
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("cage_jax", "jax")
    )
    top.add_argument("--version", action="version", version=", ".join(versions))
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example:\n  cage-jax {command.name} {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(command=command)
        subparser.add_argument(
            "model",
            metavar="MODEL",
            help="a transformers folder (floats or compressed-tensors), a GGUF, what "
            "`quantize` or cage_jax.export wrote, or a name on the Hugging Face hub, "
            "such as HuggingFaceTB/SmolLM2-135M",
        )
        for flag, text in {
            "--json": "print only JSON to stdout",
            "--quiet": "hide progress",
            "--debug": "show the traceback of an error",
        }.items():
            subparser.add_argument(flag, action="store_true", help=text)
        command.add_arguments(subparser)
    return top


if __name__ == "__main__":
    sys.exit(main())
