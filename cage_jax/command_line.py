"""`cage-jax`: models on disk, from the shell.

    cage-jax report SmolLM2.gguf
    cage-jax quantize SmolLM2.gguf codes/ --weights q4_0
    cage-jax eval codes/ --text speech.txt
    cage-jax export codes/ SmolLM2-q4_0.gguf
    cage-jax check SmolLM2-q4_0.gguf --same-as codes/

MODEL is a folder of transformers (floats or compressed-tensors), a GGUF, a folder that
`quantize` wrote, or a name on the Hugging Face hub.
"""

import argparse
import inspect
import json
import os
import pathlib
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

# What a shell expects of a program that was stopped by Ctrl-C.
STOPPED = 130
FAILED, DIFFERENT = 1, 3

WEIGHTS = (
    "q4_0",
    "q4_1",
    "q8_0",
    "ct_w4a16",
    "ct_w8a8",
    "mxfp4",
    "nvfp4",
    "fp8",
    "int8",
    "int4",
    "int3",
    "int2",
    "nf4",
    "ternary",
)
TARGETS = ("compressed-tensors", "gguf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0: all is well; 1: it could not be done, and one line says why; 2: the flags are
    wrong; 3: `check` found a difference; 130: stopped by Ctrl-C.
    """
    options = parser().parse_args(arguments)
    # Before jax is imported: what it logs is not for those who run a command.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return options.run(options)
    except KeyboardInterrupt:
        print("stopped; nothing was written.", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # what reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if options.debug:
            traceback.print_exc()
        message = (
            f"the package {error.name!r} must be installed, and is not. Run pip "
            f'install "cage_jax[export]".'
        )
    except (ValueError, TypeError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        message = str(error)
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return FAILED


def parser() -> argparse.ArgumentParser:
    """The flags of all commands."""
    whole = argparse.ArgumentParser(
        prog="cage-jax",
        description="Quantized models on disk: look at them, make them, ship them.",
        epilog="`cage-jax COMMAND --help` has an example of each.",
    )
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model",
        metavar="MODEL",
        help="a folder of transformers, a GGUF, a folder that `quantize` wrote, or a "
        "name on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M",
    )
    model.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, to stdout"
    )
    model.add_argument(
        "--debug", action="store_true", help="show where in the program an error is"
    )
    rules = _rules_flags()
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("out", metavar="OUT", help="what to write; it must not exist")
    written.add_argument(
        "--overwrite", action="store_true", help="replace OUT where it exists"
    )

    def add(name, run, summary, example, *parents):
        command = commands.add_parser(
            name,
            parents=[model, *parents],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: cage-jax {name} {example}",
        )
        command.set_defaults(run=run)
        return command

    add(
        "report",
        report,
        "show of each parameter its quantizer, bits, bytes and error",
        "model.gguf --weights int4 --group-size 32",
        rules,
    )
    add(
        "quantize",
        quantize,
        "round the weights of a model of floats, and save their codes",
        "HuggingFaceTB/SmolLM2-135M codes/ --weights ct_w4a16 --group-size 32",
        written,
        rules,
    )
    command = add(
        "export",
        export,
        "write a model's codes for transformers and vLLM, or for llama.cpp",
        "codes/ model.gguf",
        written,
    )
    command.add_argument(
        "--format",
        choices=TARGETS,
        help="by default gguf where OUT ends so, else compressed-tensors",
    )
    command = add(
        "eval",
        evaluate,
        "perplexity of a model on a text",
        "model.gguf --text moby-dick.txt --context 512",
    )
    command.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="files of UTF-8"
    )
    command.add_argument(
        "--context", type=_positive, default=512, help="tokens of a window (512)"
    )
    command.add_argument(
        "--tokens", type=_positive, help="take no more than so many (all)"
    )
    command.add_argument(
        "--batch", type=_positive, default=1, help="windows at a time (1)"
    )
    command = add(
        "check",
        check,
        "read a model from beginning to end, and say whether it is well-formed",
        "model.gguf --same-as codes/",
    )
    command.add_argument(
        "--same-as",
        metavar="OTHER",
        help="a model that must have the same codes and scales; exit code 3 if not",
    )
    return whole


def _rules_flags():
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("which weights become what")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        metavar="PRESET",
        help=f"of the layers' matrices: {', '.join(WEIGHTS)}",
    )
    group.add_argument(
        "--group-size", type=_positive, help="how many weights share a scale"
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="with a zero point, for int and ct_w4"
    )
    group.add_argument(
        "--embedding",
        choices=WEIGHTS,
        metavar="PRESET",
        help="of the embedding, else left alone",
    )
    group.add_argument(
        "--head",
        choices=WEIGHTS,
        metavar="PRESET",
        help="of a head that is not the embedding, else left alone",
    )
    group.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave alone what this matches a part of, such as down/kernel; repeatable",
    )
    return flags


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


# --- the commands ---------------------------------------------------------------------


def report(options: argparse.Namespace) -> int:
    """Prints what each parameter is, or what the flags would make of it."""
    from cage_jax.export.loading import load
    from cage_jax.export.tensors import by_path
    from cage_jax.report import Report, table

    model = load(options.model)
    rules, errors = _rules(options), {}
    if rules is None:
        rows = [_row_of(path, leaf) for path, leaf in by_path(model.params).items()]
    else:
        floats = by_path(model.floats())
        rows = list(rules.report(floats).rows)
        for path, quantizer, leaf in _quantized(options, rules, floats, "measuring"):
            errors[path] = _error(leaf, quantizer)
    whole = Report(tuple(rows), ())
    if options.json:
        parameters = [
            {
                "path": row.path,
                "shape": row.shape,
                "quantizer": str(row.quantizer) if row.quantizer else None,
                "bits_per_weight": row.bits_per_weight,
                "bytes": row.bytes_after,
                "relative_error": errors.get(row.path),
            }
            for row in rows
        ]
        _print_json(_totals(whole) | {"parameters": parameters})
        return 0
    cells = [("path", "shape", "quantizer", "bits", "bytes", "error")]
    for row in rows:
        error = f"{errors[row.path]:.2%}" if row.path in errors else ""
        bits, size = f"{row.bits_per_weight:.2f}", f"{row.bytes_after:,}"
        what = str(row.quantizer or f"{row.dtype.name}")
        cells.append((row.path, _times(row.shape), what, bits, size, error))
    size = sum(row.size for row in rows)
    bits = f"{whole.bits_per_weight:.2f}"
    cells.append(("total", f"{size:,}", "", bits, f"{whole.bytes_after:,}", ""))
    print(table(cells, left=3))
    return 0


def quantize(options: argparse.Namespace) -> int:
    """Rounds a model's floats and saves the codes."""
    from cage_jax.export.native import save
    from cage_jax.export.tensors import by_path
    from cage_jax.quantization import quantize as codes_of
    from cage_jax.quantized_array import QuantizedArray

    rules = _rules(options)
    if rules is None:
        raise ValueError(
            "`--weights` must say what the weights become; got none of --weights, "
            "--embedding and --head. Use --weights q4_0."
        )
    model = _llama(options.model)
    # What no flag is for stays as it is: codes, too.
    params, floats = by_path(model.params), by_path(model.floats())
    again = []
    for path, quantizer, leaf in _quantized(options, rules, floats, "rounding"):
        again += [path] if isinstance(params[path], QuantizedArray) else []
        params[path] = codes_of(leaf, quantizer)
    if again:
        _warn(
            f"{len(again)} parameters, such as {again[0]}, were codes and are rounded "
            f"once more, which adds to their error. Begin with the model of floats."
        )
    model = model._replace(params=_nested(params))
    save(model, options.out, overwrite=options.overwrite)
    return _written(options)


def export(options: argparse.Namespace) -> int:
    """Writes a model for another program."""
    from cage_jax.export.compressed_tensors import compressed_tensors
    from cage_jax.export.gguf import gguf

    model = _llama(options.model)
    target = options.format
    if target is None:
        target = "gguf" if options.out.endswith(".gguf") else "compressed-tensors"
    write: Any = gguf if target == "gguf" else compressed_tensors
    write(
        model.params,
        model.config,
        options.out,
        tokenizer=model.tokenizer,
        overwrite=options.overwrite,
    )
    return _written(options)


def evaluate(options: argparse.Namespace) -> int:
    """Prints the perplexity of a text."""
    from cage_jax.export.text import encoded
    from cage_jax.perplexity import perplexity, windows

    model = _llama(options.model)
    text = "".join(_text(path) for path in options.text)
    tokens = encoded(model.tokenizer, text)[: options.tokens]
    params = model.floats()
    count = -(-len(windows(tokens, options.context)) // options.batch)
    started = time.perf_counter()
    found = perplexity(
        params,
        tokens,
        model.config,
        context=options.context,
        batch=options.batch,
        track=lambda parts: _progress(options, parts, "reading", count),
    )
    seconds = time.perf_counter() - started
    if options.json:
        _print_json(
            {
                "perplexity": found.value,
                "loss": found.loss,
                "tokens": found.tokens,
                "context": options.context,
                "seconds": seconds,
            }
        )
    else:
        print(
            f"perplexity {found.value:.3f} ({found.loss:.4f} nats a token, of "
            f"{found.tokens:,} tokens in windows of {options.context}; "
            f"{seconds:.0f} s)"
        )
    return 0


def check(options: argparse.Namespace) -> int:
    """Reads everything of a model, and compares it."""
    from cage_jax.export.checking import differences, problems
    from cage_jax.export.loading import load
    from cage_jax.export.tensors import by_path
    from cage_jax.report import Report

    model = load(options.model)
    params = by_path(model.params)
    found = []
    for path in _progress(options, params, "reading", len(params)):
        found += problems(path, params[path])
    if found:
        raise ValueError("; ".join(found[:3]) + (" ..." if found[3:] else ""))
    whole = Report(tuple(_row_of(path, leaf) for path, leaf in params.items()), ())
    others = []
    if options.same_as is not None:
        others = differences(params, by_path(load(options.same_as).params))
    if options.json:
        _print_json(_totals(whole) | {"well_formed": True, "differences": others})
    else:
        size = sum(row.size for row in whole.rows)
        print(
            f"well-formed: {size:,} weights at {whole.bits_per_weight:.2f} bits, "
            f"{whole.bytes_after:,} bytes"
        )
        if options.same_as is not None and not others:
            print(f"the same codes and scales as {options.same_as}")
        for line in others:
            print(f"another than in {options.same_as}: {line}")
    return DIFFERENT if others else 0


# --- flags to rules -------------------------------------------------------------------


def _rules(options):
    """The table that the flags are, or None where none says what to quantize."""
    from cage_jax.rules import Rules

    table = [(f".*(?:{pattern}).*", None) for pattern in options.skip]
    for pattern in options.skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`--skip` must be a regular expression; got {pattern!r}: {error}."
            ) from error
    parts = {
        "--weights": (options.weights, r"layers/.*/kernel", -2),
        "--embedding": (options.embedding, r"embedding/embedding", -1),
        "--head": (options.head, r"head/kernel", -2),
    }
    if not any(name for name, _, _ in parts.values()):
        for flag in ("group_size", "asymmetric", "skip"):
            if getattr(options, flag):
                raise ValueError(
                    f"`--{flag.replace('_', '-')}` has no meaning without --weights, "
                    f"--embedding or --head. Add --weights int4."
                )
        return None
    for name, pattern, axis in parts.values():
        if name is not None:
            table.append((pattern, _preset(name, axis, options)))
    return Rules([*table, (".*", None)])


def _preset(name, axis, options):
    preset = _presets()[name]
    known = inspect.signature(preset).parameters
    chosen = {"axis": axis}
    asked = {"group_size": options.group_size}
    if options.asymmetric:
        asked["symmetric"] = False
    for flag, value in asked.items():
        if value is None:
            continue
        if flag not in known:
            text = "--group-size" if flag == "group_size" else "--asymmetric"
            raise ValueError(
                f"`{text}` has no meaning for {name}, which is as its file has it. "
                f"Leave it out, or use int4."
            )
        chosen[flag] = value
    return preset(**chosen)


def _presets():
    """Those of `WEIGHTS` by name."""
    from cage_jax.presets import (
        ct_w4a16,
        ct_w8a8,
        fp8,
        int2,
        int3,
        int4,
        int8,
        mxfp4,
        nf4,
        nvfp4,
        q4_0,
        q4_1,
        q8_0,
        ternary,
    )

    every = (
        q4_0,
        q4_1,
        q8_0,
        ct_w4a16,
        ct_w8a8,
        mxfp4,
        nvfp4,
        fp8,
        int8,
        int4,
        int3,
        int2,
        nf4,
        ternary,
    )
    return dict(zip(WEIGHTS, every))


# --- what the commands share ----------------------------------------------------------


def _llama(path):
    """A model with its dimensions."""
    from cage_jax.export.loading import load

    model = load(path)
    if model.config is None:
        raise ValueError(
            f"`MODEL` must be a Llama for this command; got {path}, a tree of arrays "
            f"without its dimensions. See what it has with cage-jax report."
        )
    return model


def _nested(params):
    """Parameters by path as a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *inner, last = path.split("/")
        node = tree
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _quantized(options, rules, params, verb):
    """Path, quantizer and array of what is quantized, with progress."""
    found = rules.quantized(params)
    if not found:
        raise ValueError(
            f"the flags must quantize something; got {rules}. See the paths with "
            f"cage-jax report."
        )
    for path in _progress(options, found, verb, len(found)):
        quantizer, leaf = found[path]
        yield path, quantizer, leaf


def _error(leaf, quantizer):
    import jax.numpy as jnp

    from cage_jax.quantization import quantization_error

    error = jnp.linalg.norm(quantization_error(leaf, quantizer).ravel())
    return float(error / jnp.maximum(jnp.linalg.norm(leaf.ravel()), 1e-30))


def _row_of(path, leaf):
    from cage_jax.quantized_array import QuantizedArray
    from cage_jax.report import Row

    codes = isinstance(leaf, QuantizedArray)
    return Row(
        path,
        leaf.shape,
        leaf.dtype,
        leaf.quantizer if codes else None,
        8 * leaf.nbytes if codes else None,
        None if codes else "floats",
    )


def _totals(whole):
    return {
        "weights": sum(row.size for row in whole.rows),
        "bytes": whole.bytes_after,
        "bits_per_weight": whole.bits_per_weight,
    }


def _text(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--text` must be UTF-8; got {path}, which is not at byte "
            f"{error.start}. Convert it first."
        ) from error


def _written(options):
    path = pathlib.Path(options.out)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    if options.json:
        _print_json({"out": str(path), "bytes": size})
    else:
        print(f"{path}: {size:,} bytes")
    return 0


def _progress(options, parts, verb, count):
    """`parts`, with a bar on a terminal."""
    if options.json or not sys.stderr.isatty():
        yield from parts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(
        parts, verb, total=count, console=Console(stderr=True), transient=True
    )


def _times(shape):
    return " x ".join(map(str, shape))


def _print_json(content):
    print(json.dumps(content, indent=2))


def _warn(message, *_):
    print(f"warning: {_one_line(str(message))}", file=sys.stderr)


def _one_line(message):
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
