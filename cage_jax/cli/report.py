"""`cage-jax report`: how each parameter is stored, or how flags would quantize it."""

import argparse

from cage_jax.cli import weights
from cage_jax.cli.command import Command, load_model, report_of, totals
from cage_jax.cli.terminal import Terminal
from cage_jax.core.tables import table
from cage_jax.llama.tensors import by_path


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Prints the table."""
    rules, errors = weights.rules_of(options), {}
    model = load_model(options.model, terminal)
    if rules is None:
        report = report_of(model.params)
    else:
        floats = by_path(model.floats())
        found = weights.quantized_parameters(options, rules, floats)
        report = rules.report(floats)
        for path in terminal.track(found, "measuring errors", len(found)):
            quantizer, leaf = found[path]
            codes = weights.rounded(path, leaf, quantizer)
            norms = weights.squared_norms(leaf, codes)
            errors[path] = weights.relative_error(*norms)
    parameters = [
        {
            "path": row.path,
            "shape": row.shape,
            "quantizer": str(row.quantizer) if row.quantizer else None,
            "bits_per_weight": row.bits_per_weight,
            "bytes": row.bytes_after,
            "relative_error": errors.get(row.path),
        }
        for row in report.rows
    ]
    content = totals(report)
    cells = [("path", "shape", "quantizer", "bits", "bytes", "error")]
    for row in report.rows:
        error = f"{errors[row.path]:.2%}" if row.path in errors else ""
        bits, size = f"{row.bits_per_weight:.2f}", f"{row.bytes_after:,}"
        shape, what = " x ".join(map(str, row.shape)), row.quantizer or row.dtype.name
        cells.append((row.path, shape, str(what), bits, size, error))
    bits, size = f"{report.bits_per_weight:.2f}", f"{report.bytes_after:,}"
    cells.append(("total", f"{content['weights']:,}", "", bits, size, ""))
    # Codes have no errors, because the original floats are unknown.
    columns = slice(None if errors else -1)
    text = table([line[columns] for line in cells], left=3)
    terminal.result(content | {"parameters": parameters}, text)
    return 0


COMMAND = Command(
    "report",
    "show the quantizer, bits, bytes and error of each parameter",
    "model.gguf --weights int4 --group-size 32",
    weights.add_arguments,
    run,
)
