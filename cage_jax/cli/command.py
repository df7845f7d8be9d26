"""Common parts of the commands: their description, reading models, checking OUT."""

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from cage_jax.cli.terminal import Terminal
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.core.weight_report import Report, Row
from cage_jax.export.checking import problems
from cage_jax.export.files import as_path
from cage_jax.export.loading import load
from cage_jax.export.writing import IsExport, check_place
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path


class Command(NamedTuple):
    """A command of `cage-jax`.

    Attributes:
      name: its name.
      summary: what it does, in one line.
      example: arguments of an example.
      add_arguments: adds all arguments but MODEL and the common flags to a parser.
      run: runs it; returns the exit code.
      failure_fields: entries of the JSON of an error.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Terminal], int]
    failure_fields: dict[str, Any] = {}  # noqa: RUF012 - never changed


def at_least(least: int) -> Callable[[str], int]:
    """Makes a type of arguments: ints of at least `least`."""

    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    number.__name__ = "whole number"
    return number


def add_out(flags: argparse.ArgumentParser, text: str) -> None:
    """Adds OUT, with a help text, and --overwrite."""
    flags.add_argument("out", metavar="OUT", help=f"{text}; must not exist")
    flags.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it exists"
    )


def load_model(path: str, terminal: Terminal) -> Model:
    """Loads a model and shows that.

    Raises:
      ValueError: as `load` does, and if a parameter has NaN, infinities or codes that
        its format does not have.
    """
    with terminal.doing(f"reading {path}"):
        model = load(path)
    params = by_path(model.params)
    tracked = terminal.track(params, "checking", len(params))
    found = [problem for each in tracked for problem in problems(each, params[each])]
    if found:
        more = f"; and {len(found) - 3} more" if found[3:] else ""
        raise ValueError(
            f"{'; '.join(found[:3])}{more}. Look at the last steps of the training, or "
            f"get an earlier checkpoint."
        )
    return model


def load_llama(path: str, terminal: Terminal) -> tuple[Model, LlamaConfig]:
    """Loads a model and its dimensions; raises ValueError if it has none."""
    model = load_model(path, terminal)
    if model.config is None:
        raise ValueError(
            f"`MODEL` must be a Llama for this command; got {path}, a tree of arrays "
            f"without dimensions. See its parameters with cage-jax report, or save it "
            f"with dimensions by cage_jax.export.native.save."
        )
    return model, model.config


def check_out(options: argparse.Namespace, is_export: IsExport | None = None) -> None:
    """Checks OUT early, because reading a model first may take minutes.

    Args:
      options: has `out`, `model` and `overwrite`.
      is_export: of the target, if it is a file; None for a folder.
    """
    out = as_path(options.out, "OUT")
    if not _is_writable(out):
        raise ValueError(
            f"`OUT` must be in a folder that can be written to; got {options.out!r}. "
            f"Use another name."
        )
    model = as_path(options.model, "MODEL")
    if options.overwrite and out.exists() and model.exists() and out.samefile(model):
        raise ValueError(
            f"`OUT` must differ from MODEL; got {options.out} for both. Use another "
            f"name."
        )
    check_place(
        out,
        "OUT",
        overwrite=options.overwrite,
        is_export=is_export,
        flag="--overwrite",
    )


def _is_writable(path):
    """Tells whether the folders above a path exist or can be made."""
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    return above.is_dir() and os.access(above, os.W_OK)


def print_written(
    options: argparse.Namespace, terminal: Terminal, more: dict[str, Any], text: str
) -> None:
    """Prints OUT and its bytes, with `more` in JSON and `text` behind them."""
    path = pathlib.Path(options.out)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    content = {"out": str(path), "bytes": size} | more
    terminal.result(content, f"{path}: {size:,} bytes{text}")


def report_of(params: Any) -> Report:
    """Reports how parameters are stored now."""
    rows = []
    for path, leaf in by_path(params).items():
        form: tuple = (None, None, "floats")
        if isinstance(leaf, QuantizedArray):
            form = leaf.quantizer, 8 * leaf.nbytes, None
        rows.append(Row(path, leaf.shape, leaf.dtype, *form))
    return Report(tuple(rows), ())


def totals(report: Report) -> dict[str, Any]:
    """Returns the totals of a report for JSON."""
    return {
        "weights": sum(row.size for row in report.rows),
        "bytes": report.bytes_after,
        "bits_per_weight": report.bits_per_weight,
    }
