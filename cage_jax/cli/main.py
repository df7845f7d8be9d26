"""The command `cage-jax`, for models on disk.

    cage-jax report SmolLM2.gguf
    cage-jax quantize SmolLM2.gguf codes/ --weights q4_0
    cage-jax eval codes/ --text speech.txt
    cage-jax export codes/ SmolLM2-q4_0.gguf
    cage-jax check SmolLM2-q4_0.gguf --same-as codes/

`cage-jax COMMAND --help` describes the arguments of each command.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import inspect
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from cage_jax.cli.terminal import Terminal, run

DIFFERENT = 3
TARGETS = ("compressed-tensors", "gguf")


class _Preset(NamedTuple):
    """A preset for `--weights`, and the targets that hold its codes."""

    summary: str
    targets: tuple[str, ...]


_CT, _GGUF = TARGETS
WEIGHTS = {
    "q4_0": _Preset("4 bits, groups of 32, as llama.cpp has them", TARGETS),
    "q4_1": _Preset("the same with an offset", (_GGUF,)),
    "q8_0": _Preset("8 bits, groups of 32", TARGETS),
    "ct_w4a16": _Preset("4 bits, groups of 128", (_CT,)),
    "ct_w8a8": _Preset("8 bits, a scale for each output", (_CT,)),
    "fp8": _Preset("e4m3, a scale for each output", (_CT,)),
    "mxfp4": _Preset("e2m1, groups of 32", (_CT,)),
    "nvfp4": _Preset("e2m1, groups of 16", (_CT,)),
    "int8": _Preset("8 bits, a scale for each output, or of groups", (_CT,)),
    "int4": _Preset("the same with 4 bits", (_CT,)),
    "int3": _Preset("the same with 3 bits; the file has 4", (_CT,)),
    "int2": _Preset("the same with 2 bits; the file has 4", (_CT,)),
    "nf4": _Preset("quantiles of a normal distribution, groups of 64", ()),
    "ternary": _Preset("-1, 0 and 1, a scale for each output", (_CT,)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0: success; 1: failure, explained in one line; 2: wrong flags; 3: `check` found a
    difference; 129, 130 and 143: stopped by the end of the terminal, Ctrl-C or `kill`.
    """
    if not (sys.argv[1:] if arguments is None else arguments):
        parser().print_help()
        return 2
    options = parser().parse_args(arguments)
    # Set before jax is loaded, to hide its logs from users of the command.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    terminal = Terminal(json=options.json, quiet=options.quiet)
    more = {"well_formed": False} if options.run is check else {}
    return run(
        lambda: options.run(options, terminal),
        terminal,
        debug=options.debug,
        more=more,
        writes="out" in options,
    )


def parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands and flags."""
    whole = argparse.ArgumentParser(
        prog="cage-jax",
        description="Quantized models on disk: look at them, make them, ship them.",
        epilog="`cage-jax COMMAND --help` has an example of each.",
    )
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("cage_jax", "jax")
    )
    whole.add_argument("--version", action="version", version=", ".join(versions))
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "model",
        metavar="MODEL",
        help="a folder of transformers (floats or compressed-tensors), a GGUF, what "
        "`quantize` or cage_jax.export wrote, or a name on the Hugging Face hub such "
        "as HuggingFaceTB/SmolLM2-135M",
    )
    model.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else, to stdout"
    )
    model.add_argument(
        "--quiet", action="store_true", help="say nothing of progress, on stderr"
    )
    model.add_argument(
        "--debug", action="store_true", help="show where in the program an error is"
    )
    rules = _rules_flags()

    def add(name, command, summary, example, *parents, closing=""):
        flags = commands.add_parser(
            name,
            parents=[model, *parents],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"{closing}example:\n  cage-jax {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        flags.set_defaults(run=command)
        return flags

    add(
        "report",
        report,
        "show of each parameter its quantizer, bits, bytes and error",
        "model.gguf --weights int4 --group-size 32",
        rules,
        closing=_of_presets(),
    )
    add(
        "quantize",
        quantize,
        "round the weights of a model of floats, and save their codes in a folder",
        "HuggingFaceTB/SmolLM2-135M codes/ --weights ct_w4a16 --group-size 32",
        _out("a folder for the other commands to read; it must not exist"),
        rules,
        closing=_of_presets(),
    )
    flags = add(
        "export",
        export,
        "write a model's codes for transformers and vLLM, or for llama.cpp",
        "codes/ model.gguf",
        _out("a folder, or a file that ends in .gguf; it must not exist"),
    )
    flags.add_argument(
        "--format",
        choices=TARGETS,
        help="by default gguf where OUT ends so, else compressed-tensors",
    )
    flags = add(
        "eval",
        evaluate,
        "perplexity of a model on a text",
        "model.gguf --text moby-dick.txt --context 512",
    )
    flags.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="files of UTF-8"
    )
    flags.add_argument(
        "--context", type=_at_least(2), default=512, help="tokens of a window (512)"
    )
    flags.add_argument(
        "--tokens", type=_at_least(2), help="take no more than so many (all)"
    )
    flags.add_argument(
        "--batch", type=_at_least(1), default=1, help="windows at a time (1)"
    )
    flags = add(
        "check",
        check,
        "read a model from beginning to end, and say whether it is well-formed",
        "model.gguf --same-as codes/",
    )
    flags.add_argument(
        "--same-as",
        metavar="OTHER",
        help="a model that must have the same codes and scales; exit code 3 if not",
    )
    return whole


def _out(text):
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("out", metavar="OUT", help=text)
    flags.add_argument(
        "--overwrite", action="store_true", help="replace OUT where it exists"
    )
    return flags


def _rules_flags():
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("which weights become what")
    group.add_argument(
        "--weights", choices=WEIGHTS, metavar="PRESET", help="of the layers' matrices"
    )
    group.add_argument(
        "--group-size", type=_at_least(1), help="how many weights share a scale"
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="with a zero point, for int and ct_w4"
    )
    group.add_argument(
        "--embedding",
        choices=WEIGHTS,
        metavar="PRESET",
        help="of the embedding, else left alone; only gguf has room for its codes",
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


def _of_presets():
    """Formats the presets in `WEIGHTS` for the end of a help text."""
    target = {_GGUF: "llama.cpp", _CT: "transformers, vLLM"}
    lines = [
        f"  {name:9} {preset.summary:50} "
        f"{', '.join(target[each] for each in preset.targets) or '-'}"
        for name, preset in WEIGHTS.items()
    ]
    title = f"  {'PRESET':9} {'codes':50} `export` writes it for"
    return "\n".join([title, *lines]) + "\n\n"


def _at_least(least):
    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    number.__name__ = "whole number"
    return number


# --- the commands ---------------------------------------------------------------------


def report(options: argparse.Namespace, terminal: Terminal) -> int:
    """Prints how each parameter is stored, or how the flags would quantize it."""
    from cage_jax.core.weight_report import Report, table
    from cage_jax.llama.tensors import by_path

    rules, errors = _rules(options), {}
    model = _loaded(options.model, terminal)
    if rules is None:
        rows = [_row_of(path, leaf) for path, leaf in by_path(model.params).items()]
    else:
        floats = by_path(model.floats())
        found = _quantized(options, rules, floats)
        rows = list(rules.report(floats).rows)
        for path in terminal.track(found, "measuring errors", len(found)):
            quantizer, leaf = found[path]
            errors[path] = _relative(*_squares(leaf, _rounded(leaf, quantizer)))
    whole = Report(tuple(rows), ())
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
    cells = [("path", "shape", "quantizer", "bits", "bytes", "error")]
    for row in rows:
        error = f"{errors[row.path]:.2%}" if row.path in errors else ""
        bits, size = f"{row.bits_per_weight:.2f}", f"{row.bytes_after:,}"
        what = str(row.quantizer or f"{row.dtype.name}")
        cells.append((row.path, _times(row.shape), what, bits, size, error))
    size = sum(row.size for row in rows)
    bits = f"{whole.bits_per_weight:.2f}"
    cells.append(("total", f"{size:,}", "", bits, f"{whole.bytes_after:,}", ""))
    # Codes have no errors, because the original floats are unknown.
    columns = slice(None if errors else -1)
    content = _totals(whole) | {"parameters": parameters}
    terminal.result(content, table([line[columns] for line in cells], left=3))
    return 0


def quantize(options: argparse.Namespace, terminal: Terminal) -> int:
    """Rounds a model's floats and saves the codes."""
    from cage_jax.core.quantize import quantize as codes_of
    from cage_jax.core.quantized_array import QuantizedArray, decoded
    from cage_jax.export.native import save
    from cage_jax.llama.tensors import by_path

    rules = _rules(options)
    if rules is None:
        raise ValueError(
            "`--weights` must say what the weights become; got none of --weights, "
            "--embedding and --head. Use --weights q4_0."
        )
    if _suffix(options.out) in (".gguf", ".safetensors"):
        raise ValueError(
            f"`OUT` must be the name of a folder; got {options.out}. Use codes/, and "
            f"then cage-jax export codes/ {options.out}."
        )
    _check_out(options, is_folder=True)
    model = _llama(options.model, terminal)
    # Parameters without a flag stay unchanged, also if they are codes.
    params, floats = by_path(model.params), by_path(model.floats())
    before = _whole(model.params)
    found = _quantized(options, rules, floats)
    again = [path for path in found if isinstance(params[path], QuantizedArray)]
    error, total = 0.0, 0.0
    for path in terminal.track(found, "rounding", len(found)):
        quantizer, leaf = found[path]
        params[path] = codes_of(leaf, quantizer)
        squares = _squares(leaf, decoded(params[path]))
        error, total = error + squares[0], total + squares[1]
    if again:
        terminal.warn(
            f"{len(again)} parameters, such as {again[0]}, were codes and are rounded "
            f"once more, which adds to their error. Begin with the model of floats."
        )
    model = model._replace(params=_nested(params))
    with terminal.doing(f"writing {options.out}"):
        save(model, options.out, overwrite=options.overwrite)
    relative = _relative(error, total)
    bits = _whole(model.params).bits_per_weight
    return _written(
        options,
        terminal,
        {
            "bits_per_weight": bits,
            "bytes_before": before.bytes_after,
            "relative_error": relative,
        },
        f", {bits:.2f} bits a weight ({before.bytes_after:,} bytes before); relative "
        f"error of the rounded weights {relative:.2%}",
    )


def export(options: argparse.Namespace, terminal: Terminal) -> int:
    """Writes a model for another program."""
    from cage_jax.export.compressed_tensors import compressed_tensors
    from cage_jax.export.gguf import gguf

    target = options.format
    if target is None:
        target = _GGUF if _suffix(options.out) == ".gguf" else _CT
    _check_out(options, is_folder=target == _CT)
    model = _llama(options.model, terminal)
    write: Any = gguf if target == _GGUF else compressed_tensors
    if not model.tokenizer:
        terminal.warn(
            "the model came without a tokenizer, so that programs which answer in text "
            "cannot run what is written."
        )
    quantizers = [row.quantizer for row in _whole(model.params).rows]
    if target == _CT and any("fp4" in str(quantizer) for quantizer in quantizers):
        terminal.warn(
            "FP4 is decoded as bfloat16, to which all that is not codes is rounded."
        )
    with terminal.doing(f"writing {options.out}"), _of_presets_in_errors():
        write(
            model.params,
            model.config,
            options.out,
            tokenizer=model.tokenizer,
            overwrite=options.overwrite,
        )
    return _written(options, terminal, {"format": target}, f", {target}")


def evaluate(options: argparse.Namespace, terminal: Terminal) -> int:
    """Prints the perplexity of a text."""
    from cage_jax.export.text import encoded
    from cage_jax.llama.perplexity import perplexity, windows

    text = "".join(_text(path) for path in options.text)
    model = _llama(options.model, terminal)
    if options.context > model.config.context:
        raise ValueError(
            f"`--context` must be at most the {model.config.context} tokens that the "
            f"model is made for; got {options.context}. Use --context 512."
        )
    tokens = encoded(model.tokenizer, text)[: options.tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"`--text` must have at least two tokens, of which one is guessed; got "
            f"{len(tokens)}. Give a longer text."
        )
    params = model.floats()
    count = -(-len(windows(tokens, options.context)) // options.batch)
    started = time.perf_counter()
    found = perplexity(
        params,
        tokens,
        model.config,
        context=options.context,
        batch=options.batch,
        track=lambda parts: terminal.track(parts, "guessing windows", count),
    )
    seconds = time.perf_counter() - started
    content = {
        "perplexity": found.value,
        "loss": found.loss,
        "tokens": found.tokens,
        "context": options.context,
        "seconds": seconds,
    }
    terminal.result(
        content,
        f"perplexity {found.value:.3f} ({found.loss:.4f} nats a token, of "
        f"{found.tokens:,} tokens in windows of {min(options.context, len(tokens))}; "
        f"{seconds:.0f} s)",
    )
    return 0


def check(options: argparse.Namespace, terminal: Terminal) -> int:
    """Reads a whole model, checks it and compares it."""
    from cage_jax.export.checking import differences, problems
    from cage_jax.export.loading import find
    from cage_jax.export.text import tokenizer_of
    from cage_jax.llama.tensors import by_path

    if options.same_as is not None:  # checked before the first model is read
        try:
            find(options.same_as)
        except FileNotFoundError as error:
            message = str(error).replace("`path`", "`--same-as`")
            raise FileNotFoundError(message) from error
    model = _loaded(options.model, terminal)
    params = by_path(model.params)
    found = []
    for path in terminal.track(params, "checking", len(params)):
        found += problems(path, params[path])
    if found:
        raise ValueError("; ".join(found[:3]) + (" ..." if found[3:] else ""))
    if "tokenizer.json" in model.tokenizer:
        tokenizer_of(model.tokenizer)
    elif model.config is not None:
        terminal.warn("the model has no tokenizer.json, and so cannot read text.")
    whole, others = _whole(params), []
    size = sum(row.size for row in whole.rows)
    lines = [
        f"well-formed: {size:,} weights at {whole.bits_per_weight:.2f} bits, "
        f"{whole.bytes_after:,} bytes"
    ]
    if options.same_as is not None:
        others = differences(params, by_path(_loaded(options.same_as, terminal).params))
        lines += [f"not as in {options.same_as}: {line}" for line in others] or [
            f"the same codes and scales as {options.same_as}"
        ]
    content = _totals(whole) | {"well_formed": True, "differences": others}
    terminal.result(content, "\n".join(lines))
    return DIFFERENT if others else 0


# --- flags to rules -------------------------------------------------------------------


# The parameters of each flag, and the axis along which their groups run.
_PARTS = {
    "weights": (r"layers/.*/kernel", -2),
    "embedding": (r"embedding/embedding", -1),
    "head": (r"head/kernel", -2),
}


def _rules(options):
    """Converts the flags to rules; None if no flag says what to quantize."""
    from cage_jax.core.rules import Rules

    table = [_skip(pattern) for pattern in options.skip]
    for pattern in options.skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`--skip` must be a regular expression; got {pattern!r}: {error}."
            ) from error
    parts = [
        (getattr(options, flag), pattern, axis)
        for flag, (pattern, axis) in _PARTS.items()
    ]
    if not any(name for name, _, _ in parts):
        for flag in ("group_size", "asymmetric", "skip"):
            if getattr(options, flag):
                raise ValueError(
                    f"`--{flag.replace('_', '-')}` has no meaning without --weights, "
                    f"--embedding or --head. Add --weights int4."
                )
        return None
    for name, pattern, axis in parts:
        if name is not None:
            table.append((pattern, _preset(name, axis, options)))
    return Rules([*table, (".*", None)])


def _preset(name, axis, options):
    preset = getattr(importlib.import_module("cage_jax.quantizers.presets"), name)
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


def _skip(pattern):
    """Returns a rule that leaves the matching parameters unquantized."""
    return f".*(?:{pattern}).*", None


def _quantized(options, rules, params):
    """Returns quantizer and array of each quantized parameter by path.

    Raises:
      ValueError: if a flag matches none of the parameters.
    """

    def matches(pattern):
        return any(re.fullmatch(pattern, path) for path in params)

    for flag, (pattern, _) in _PARTS.items():
        if getattr(options, flag) and not matches(pattern):
            head = flag == "head" and matches(_PARTS["embedding"][0])
            raise ValueError(
                f"`--{flag}` must be for parameters of the model; got one that has no "
                f"{pattern}. "
                + (
                    "Its head is its embedding: use --embedding."
                    if head
                    else "See its parameters with cage-jax report."
                )
            )
    for pattern in options.skip:
        if not matches(_skip(pattern)[0]):
            raise ValueError(
                f"`--skip` must match a part of a parameter's path; got {pattern!r}, "
                f"which does not. See the paths with cage-jax report."
            )
    try:
        return rules.quantized(params)
    except ValueError as error:
        if parts := _GROUPS.match(str(error)):
            path, size, inputs = parts.groups()
            raise ValueError(
                f"`--group-size` must divide the {inputs} inputs of {path}; got {size}."
                f" Use --group-size {math.gcd(int(inputs), 128)}, or another preset."
            ) from error
        raise


# The rules' error about groups, which names Python arguments instead of flags.
_GROUPS = re.compile(
    r"`(.+?)`: `group_size` must divide .*group_size=(\d+),.* divisor of (\d+)"
)


# --- what the commands share ----------------------------------------------------------


def _loaded(path, terminal):
    from cage_jax.export.loading import load

    with terminal.doing(f"reading {path}"):
        return load(path)


def _llama(path, terminal):
    """Loads a model; raises if it has no dimensions."""
    model = _loaded(path, terminal)
    if model.config is None:
        raise ValueError(
            f"`MODEL` must be a Llama for this command; got {path}, a tree of arrays "
            f"without its dimensions. See what it has with cage-jax report, or save it "
            f"with them by cage_jax.export.native.save."
        )
    return model


def _check_out(options, *, is_folder):
    """Checks `OUT` early, because reading a model first may take minutes."""
    from cage_jax.export.files import is_free, strangers

    out = pathlib.Path(options.out)
    if not options.out or not _can_be_made(out):
        raise ValueError(
            f"`OUT` must be in a folder that can be written to; got {options.out!r}. "
            f"Use another name."
        )
    if is_free(out):
        if not is_folder and out.is_dir():
            raise ValueError(
                f"`OUT` must be a file for this format; got {out}, a folder. Use "
                f"model.gguf."
            )
        return
    if not options.overwrite:
        raise FileExistsError(
            f"`OUT` must not be there yet; got {options.out}. Use --overwrite, or "
            f"another name."
        )
    place = pathlib.Path(options.model)
    if place.exists() and place.resolve() == out.resolve():
        raise ValueError(
            f"`OUT` must be another place than MODEL; got {options.out} for both. Use "
            f"another name."
        )
    if is_folder:
        strange = strangers(out)
    else:
        strange = "a folder" if out.is_dir() else ""
    if strange:
        raise FileExistsError(
            f"`OUT` must be an export to be replaced; got {options.out}: {strange}. "
            f"Remove it yourself, or use another name."
        )


def _can_be_made(path):
    """Returns whether the folders above a path exist or can be made."""
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    return above.is_dir() and os.access(above, os.W_OK)


def _suffix(name):
    return pathlib.Path(name).suffix.lower()


@contextlib.contextmanager
def _of_presets_in_errors():
    """Adds to errors where to find the presets of each target."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error} `cage-jax quantize --help` has the presets of each target."
        ) from error


def _nested(params):
    """Converts parameters by path to a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *inner, last = path.split("/")
        node = tree
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _rounded(leaf, quantizer):
    from cage_jax.core.quantize import fake_quant

    return fake_quant(leaf, quantizer)


def _squares(leaf, rounded):
    """Returns the sums of squares of an array's error and of the array."""
    import jax.numpy as jnp

    return [float(jnp.sum(jnp.square(each))) for each in (leaf - rounded, leaf)]


def _relative(error, total):
    return math.sqrt(error / max(total, 1e-60))


def _whole(params):
    """Reports the parameters in their current form."""
    from cage_jax.core.weight_report import Report
    from cage_jax.llama.tensors import by_path

    rows = (_row_of(path, leaf) for path, leaf in by_path(params).items())
    return Report(tuple(rows), ())


def _row_of(path, leaf):
    from cage_jax.core.quantized_array import QuantizedArray
    from cage_jax.core.weight_report import Row

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
    except OSError as error:
        raise ValueError(
            f"`--text` must be files that can be read; got {path}: {error.strerror}. "
            f"Check the name."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--text` must be UTF-8; got {path}, which is not at byte "
            f"{error.start}. Convert it first."
        ) from error


def _written(options, terminal, more, text):
    path = pathlib.Path(options.out)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    content = {"out": str(path), "bytes": size} | more
    terminal.result(content, f"{path}: {size:,} bytes{text}")
    return 0


def _times(shape):
    return " x ".join(map(str, shape))


if __name__ == "__main__":
    sys.exit(main())
