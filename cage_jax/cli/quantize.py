"""`cage-jax quantize`: rounding of a model's weights."""

import argparse
import pathlib

from cage_jax.cli import weights
from cage_jax.cli.command import (
    Command,
    add_out,
    check_out,
    load_llama,
    print_written,
    report_of,
)
from cage_jax.cli.terminal import Terminal
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import native
from cage_jax.export.target import suffixes
from cage_jax.llama.tensors import by_path, nested


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds OUT and the flags of quantizers."""
    add_out(flags, "a folder for the other commands to read")
    weights.add_arguments(flags)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Rounds the weights and saves their codes."""
    rules = weights.rules_of(options)
    if rules is None:
        raise ValueError(
            "one of `--weights`, `--embedding` and `--head` must be given; got none. "
            "Use --weights q4_0."
        )
    if pathlib.Path(options.out).suffix.lower() in suffixes():
        raise ValueError(
            f"`OUT` must be the name of a folder; got {options.out}. Use codes/, and "
            f"then cage-jax export codes/ {options.out}."
        )
    check_out(options)
    model, _ = load_llama(options.model, terminal)
    # Parameters without a flag stay unchanged, also if they are codes.
    params, floats = by_path(model.params), by_path(model.floats())
    bytes_before = report_of(params).bytes_after
    found = weights.quantized_parameters(options, rules, floats)
    again = [path for path in found if isinstance(params[path], QuantizedArray)]
    error, total = 0.0, 0.0
    for path in terminal.track(found, "rounding", len(found)):
        quantizer, leaf = found[path]
        params[path] = codes = weights.rounded(path, leaf, quantizer)
        norms = weights.squared_norms(leaf, codes)
        error, total = error + norms[0], total + norms[1]
    if again:
        terminal.warn(
            f"{len(again)} parameters, such as {again[0]}, were codes and are rounded "
            f"once more, which adds to their error. Begin with the unquantized model."
        )
    with terminal.doing(f"writing {options.out}"):
        model = model._replace(params=nested(params))
        native.save(model, options.out, overwrite=options.overwrite)
    bits, relative = (
        report_of(params).bits_per_weight,
        weights.relative_error(error, total),
    )
    print_written(
        options,
        terminal,
        {
            "bits_per_weight": bits,
            "bytes_before": bytes_before,
            "relative_error": relative,
        },
        f", {bits:.2f} bits per weight ({bytes_before:,} bytes before); relative error "
        f"of the rounded weights {relative:.2%}",
    )
    return 0


COMMAND = Command(
    "quantize",
    "round the weights of a model and save their codes in a folder",
    "HuggingFaceTB/SmolLM2-135M codes/ --weights ct_w4a16 --group-size 32",
    add_arguments,
    run,
)
