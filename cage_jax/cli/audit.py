"""`cage-jax audit`: whether a shipped file is the model that was trained."""

import argparse
from typing import Any

from cage_jax.cli import weights
from cage_jax.cli.check import DIFFERENT
from cage_jax.cli.command import Command
from cage_jax.cli.export import NAMES
from cage_jax.cli.terminal import Terminal
from cage_jax.core.rules import Rules
from cage_jax.export.audit import audit
from cage_jax.export.compressed_tensors import TARGET as TRANSFORMERS
from cage_jax.export.files import MalformedFileError, as_path, read_bytes
from cage_jax.export.gguf import TARGET as GGUF
from cage_jax.export.loading import located
from cage_jax.export.rules_json import rules_from_json
from cage_jax.export.template_names import OF_TRANSFORMERS
from cage_jax.export.templates import read_tensors


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds --trained, --rules, --names and the flags of quantizers."""
    flags.add_argument(
        "--trained",
        metavar="TRAINED",
        help="the parameters of the training, floats or codes, in anything that MODEL "
        "may be, or in a transformers folder or a GGUF of any model; without it the "
        "floats of MODEL itself are looked at: whether they lie on the grid of the "
        "rules",
    )
    flags.add_argument(
        "--rules",
        metavar="JSON",
        help="the rules of the training, a file of cage_jax.export.rules_to_json; or "
        "the flags below, as in `quantize`",
    )
    flags.add_argument(
        "--names", choices=NAMES, help="what TRAINED calls the tensors of MODEL"
    )
    weights.add_arguments(flags)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Compares MODEL with TRAINED and prints the table."""
    rules = _rules(options)
    if rules is None and options.trained is None:
        raise ValueError(
            "one of `--trained`, `--rules` and `--weights` must be given; got none. "
            "Use --trained with codes, or with floats and their rules."
        )
    trained = options.model if options.trained is None else options.trained
    flag = "MODEL" if options.trained is None else "--trained"
    with terminal.doing(f"reading {trained}"):
        try:
            params = _parameters(trained, rules, options.names)
        except (FileNotFoundError, ValueError) as error:
            message = str(error)
            for name in ("`path`", "`folder`"):
                message = message.replace(name, f"`{flag}`")
            absent = isinstance(error, FileNotFoundError)
            raise (FileNotFoundError if absent else ValueError)(message) from error
    with terminal.doing(f"comparing {options.model}"):
        found = audit(options.model, params, rules, names=options.names)
    content = {
        "ok": found.ok,
        "findings": [finding._asdict() for finding in found.findings],
        "tensors": [
            row._asdict() | {"grid": row.grid and row.grid._asdict()}
            for row in found.rows
        ],
    }
    terminal.result(content, str(found))
    return 0 if found.ok else DIFFERENT


def _rules(options):
    """Returns the rules of the flags or of the file, or None."""
    rules = weights.rules_of(options)
    if options.rules is None:
        return rules
    if rules is not None:
        raise ValueError(
            "`--rules` must be given alone; got --weights, --embedding or --head too. "
            "Leave one of them out."
        )
    try:
        text = read_bytes(as_path(options.rules, "--rules")).decode()
        return rules_from_json(text)
    except ValueError as error:
        raise ValueError(str(error).replace("`text`", "`--rules`")) from error


def _parameters(path: str, rules: Rules | None, names: str | None) -> Any:
    """Reads parameters by our names, or those of the files if only they have rules."""
    location, target = located(path)
    if target not in (TRANSFORMERS, GGUF):
        return target.read(location).params
    if names != OF_TRANSFORMERS:
        try:
            params = target.read(location).params
            if rules is None or not rules.misses(params):
                return params
        except MalformedFileError:  # no Llama, or damaged, which is found below
            pass
    return read_tensors(location)


COMMAND = Command(
    "audit",
    "tell whether a shipped file has the codes, scales and floats of a training; exit "
    f"code {DIFFERENT} if it has others",
    "model.gguf --trained floats/ --rules rules.json",
    add_arguments,
    run,
    {"ok": False},
)
