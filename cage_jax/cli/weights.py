"""The flags that say how weights are quantized, and the rules that they mean."""

import argparse
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.cli.command import at_least
from cage_jax.core.quantize import quantize
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.core.rules import Rules
from cage_jax.export.checking import problems
from cage_jax.export.target import targets
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.registry import PRESETS

# The parameters of each flag, and the axis along which their groups run.
_PARTS = {
    "weights": (r"layers/.*/kernel", -2),
    "embedding": (r"embedding/embedding", -1),
    "head": (r"head/kernel", -2),
}


def add_arguments(flags: argparse.ArgumentParser) -> None:
    """Adds the flags, and the table of presets at the end of the help."""
    group = flags.add_argument_group("quantization")
    offered = {name: line.summary for name, line in PRESETS.items() if line.summary}

    def add_preset(flag, text):
        group.add_argument(flag, choices=offered, metavar="PRESET", help=text)

    add_preset("--weights", "preset of the kernels in layers")
    group.add_argument(
        "--group-size", type=at_least(1), help="number of weights that share a scale"
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="with zero points; int and ct_w4a16"
    )
    add_preset("--embedding", "preset of the embedding; only gguf can hold its codes")
    add_preset("--head", "preset of the head, if it is not the embedding")
    group.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="do not quantize parameters whose path contains this regular expression, "
        "such as down/kernel; repeatable",
    )
    lines = [f"  {'PRESET':9} {'codes':50} `export` writes it for"]
    for name, text in offered.items():
        readers = [each.read_by for each in targets().values() if name in each.presets]
        lines.append(f"  {name:9} {text:50} {', '.join(readers) or '-'}")
    flags.epilog = "\n".join([*lines, "", flags.epilog or ""])


def rules_of(options: argparse.Namespace) -> Rules | None:
    """Converts the flags to rules; None if no flag says what to quantize."""
    table: list[tuple] = [_rule_to_skip(pattern) for pattern in options.skip]
    for pattern in options.skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`--skip` must be a regular expression; got {pattern!r}: {error}."
            ) from error
    given = [flag for flag in _PARTS if getattr(options, flag)]
    for flag in () if given else ("group_size", "asymmetric", "skip"):
        if getattr(options, flag):
            raise ValueError(
                f"`--{flag.replace('_', '-')}` has no effect without --weights, "
                f"--embedding or --head. Add --weights int4."
            )
    for flag in given:
        pattern, axis = _PARTS[flag]
        table.append((pattern, _quantizer(getattr(options, flag), axis, options)))
    return Rules([*table, (".*", None)]) if given else None


def _rule_to_skip(pattern):
    return f".*(?:{pattern}).*", None


def _quantizer(name, axis, options):
    make = PRESETS[name].make
    known = _arguments(name)
    asked: dict[str, tuple[str, Any]] = {}
    if options.group_size is not None:
        asked["group_size"] = "--group-size", options.group_size
    if options.asymmetric:
        asked["symmetric"] = "--asymmetric", False
    for argument, (flag, _) in asked.items():
        if argument not in known:
            raise ValueError(
                f"`{flag}` has no effect on {name}, whose file format fixes it. Leave "
                f"it out, or use int4."
            )
    return make(axis=axis, **{name: value for name, (_, value) in asked.items()})


def quantized_parameters(
    options: argparse.Namespace, rules: Rules, params: Mapping[str, Any]
) -> dict[str, tuple[Quantizer, jax.Array]]:
    """Returns the quantizer and the array of each quantized parameter by path.

    Raises:
      ValueError: if a flag matches no parameter, or if groups do not divide one.
    """

    def matches(pattern):
        return any(re.fullmatch(pattern, path) for path in params)

    for flag, (pattern, _) in _PARTS.items():
        if getattr(options, flag) and not matches(pattern):
            remedy = "See its parameters with cage-jax report."
            if flag == "head" and matches(_PARTS["embedding"][0]):
                remedy = "Its head is its embedding: use --embedding."
            raise ValueError(
                f"`--{flag}` must match parameters of the model; got a model that has "
                f"no {pattern}. {remedy}"
            )
    for pattern in options.skip:
        if not matches(_rule_to_skip(pattern)[0]):
            raise ValueError(
                f"`--skip` must match a part of a parameter's path; got {pattern!r}, "
                f"which does not. See the paths with cage-jax report."
            )
    for path, leaf in params.items():
        quantizer = rules.match(path)
        if quantizer is None or quantizer.group_size is None or leaf.ndim < 2:
            continue
        inputs, size = leaf.shape[quantizer.axis], quantizer.group_size
        if inputs % size:
            flag = next(flag for flag in _PARTS if re.fullmatch(_PARTS[flag][0], path))
            what, remedy = f"`--{flag}` {getattr(options, flag)} has groups that", ""
            if "group_size" in _arguments(getattr(options, flag)):
                what = "`--group-size`"
                remedy = f"Use --group-size {math.gcd(inputs, 128)}, or "
            raise ValueError(
                f"{what} must divide the {inputs} inputs of {path}; got {size}. "
                f"{remedy or 'Use '}--skip {path}, or another preset."
            )
    return rules.quantized(params)


def _arguments(preset):
    return inspect.signature(PRESETS[preset].make).parameters


def rounded(path: str, leaf: jax.Array, quantizer: Quantizer) -> QuantizedArray:
    """Rounds a parameter; raises ValueError if its scales cannot be stored."""
    codes = quantize(leaf, quantizer)
    if found := problems(path, codes):
        raise ValueError(
            f"{found[0]}, of {quantizer}. Use a preset with float32 scales, or --skip "
            f"{path}."
        )
    return codes


def squared_norms(leaf: jax.Array, codes: QuantizedArray) -> tuple[float, float]:
    """Returns the squared norms of the error of a rounded array and of the array."""
    largest = float(jnp.max(jnp.abs(leaf))) or 1.0  # so that no square overflows
    error, total = (
        float(jnp.sum(jnp.square(x / largest))) * largest**2
        for x in (leaf - decoded(codes), leaf)
    )
    return error, total


def relative_error(error: float, total: float) -> float:
    """Returns the norm of the error relative to that of the array."""
    return math.sqrt(error / max(total, 1e-60))
