"""Bits for each parameter: the least increase of the loss within a budget."""

import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cage_jax.arrays.checks import check_callable, check_int, check_number, is_int
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import check_no_codes
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.core.tables import table
from cage_jax.finetuning.batches import Progress
from cage_jax.finetuning.bits.increases import by_curvature, by_loss
from cage_jax.finetuning.bits.knapsack import least_loss
from cage_jax.program.tracing import split_grids
from cage_jax.quantizers.axes import CONTRACTED
from cage_jax.quantizers.formats.evenly_spaced import EvenlySpaced
from cage_jax.quantizers.quantizer import Quantizer


class _Parameter(NamedTuple):
    """What there is to choose among for a parameter.

    Attributes:
      weights: the number of its weights.
      quantizers: one for each choice.
      sizes: bytes with each.
      increases: the estimated increase of the loss with each.
    """

    weights: int
    quantizers: list[Quantizer]
    sizes: np.ndarray
    increases: np.ndarray


@names_checked
def choose_bits(
    rules: Rules,
    params: Any,
    *,
    bits: float = 3.5,
    choices: Sequence[int | str | Quantizer] = (2, 3, 4, 8),
    curvature: Any = None,
    loss: Callable | None = None,
    batches: Iterable[tuple] | None = None,
    together: Sequence[str] = (),
    show: bool = True,
    progress: Progress | None = None,
) -> Rules:
    """Chooses the bits of each parameter, for the least loss within a budget.

    The increase of the loss is estimated for each quantized parameter and each choice,
    as if no other parameter were quantized, and the sum of the increases is made as
    small as it can be: exactly where layers have few shapes, and else nearly. What
    parameters do to each other is in no estimate. There are three:

    - with `curvature`, half the sum of curvature times squared error. It means little
      where errors are as large as the weights, as at 2 bits;
    - with `loss` and `batches`, the measured change of the loss. Each batch is
      evaluated once for each parameter and choice;
    - with neither, squared errors relative to the mean square of their parameter, which
      know nothing of the loss and tell only which parameters fit a grid badly.

    Args:
      rules: a table whose quantizers get other bits, resolved if it has to be. What it
        leaves alone stays alone.
      params: a tree of parameters with values; grids beside them are left out, as in
        `curvature`.
      bits: the most bits a weight, scales and zero points included, as the mean over
        all parameters that are quantized; bytes are those of `rules.report`.
      choices: widths, such as 3 or "int3", for which a quantizer keeps its groups,
        axes, rotation and scale rule and gets integers of so many bits; or quantizers,
        which take the place of the rule's, and its axis if theirs is "contracted".
      curvature: a tree like `params` with an estimate of the Hessian's diagonal, such
        as `cage.finetuning.fisher` returns, or Adam's second moment.
      loss: maps the parameters and the arguments of a batch to a scalar.
      batches: the arguments of `loss` after the parameters, a tuple for each batch.
      together: regular expressions for whole paths. Parameters that one of them matches
        with the same text in its groups get the same choice, as query, key and value
        must for vLLM: `r"(.*)/(?:query|key|value)/kernel"`.
      show: whether the choices are printed, with the estimated increases.
      progress: called with what is done, the number done and the number of all.

    Returns:
      `Rules` for these parameters: patterns for the choices, then what is left of
      `rules`.

    Raises:
      TypeError: for arguments of the wrong kind, and for batches that are no tuples.
      ValueError: for a budget below the fewest bits, a format without widths, a pattern
        that ties nothing, and curvature, weights or losses that are not finite, with
        the parameter's path.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = [jax.random.normal(key, (64, 64)) for key in keys]
      >>> steep = [jnp.full((64, 64), slope) for slope in (9.0, 1.0, 0.1)]
      >>> rules = cage.Rules([(".*", cage.int4())])
      >>> chosen = cage.choose_bits(rules, params, bits=4, curvature=steep, show=False)
      >>> [chosen.match(path).bits for path in "012"]
      [4, 4, 2]

    Source: HAWQ-V2, arXiv 1911.03852, for curvature times squared error.
    """
    check_rules(rules)
    check_number("bits", bits, "Use 3.5.", above=0)
    choices = _checked_choices(choices)
    _check_estimate(curvature, loss, batches)
    check_no_codes(params=params, curvature=curvature)
    (params, _), (curvature, _) = split_grids(params), split_grids(curvature)
    quantized = rules.quantized(params)
    if not quantized:
        raise ValueError(nothing_quantized(rules, params))
    check_finite({path: x for path, (_, x) in quantized.items()}, "params")
    options = {}
    for path, (_, x) in quantized.items():
        with path_in_errors(path):
            options[path] = _options(rules.match(path), x.shape, choices)
    sets = _tied(together, [*quantized])
    if loss is not None and batches is not None:
        increases = by_loss(loss, params, batches, options, progress)
    else:
        increases = by_curvature(rules, params, options, curvature, progress)
    found = {
        path: _Parameter(
            x.size,
            options[path],
            np.array([_bytes(each, x) for each in options[path]]),
            increases[path],
        )
        for path, (_, x) in quantized.items()
    }
    picks = _picks(found, sets, bits)
    chosen = {path: each[picks[path]] for path, each in options.items()}
    patterns = _patterns(rules, params, chosen)
    new = _rules(rules, params, chosen, patterns)
    if show:
        what = "error" if curvature is loss is None else "increase"
        print(_text(new, params, patterns, found, picks, choices, bits, what))
    return new


def _check_estimate(curvature, loss, batches):
    """Raises for estimates of which there are two, or a half."""
    if curvature is not None and loss is not None:
        raise ValueError(
            "`curvature` must not come with a `loss`; got both. Leave one of them out."
        )
    if (loss is None) != (batches is None):
        given, missing = ("loss", "batches") if batches is None else ("batches", "loss")
        raise ValueError(
            f"`{missing}` must come with `{given}`; got None. Use loss=loss, "
            f"batches=[(x, y)]."
        )
    if loss is not None:
        check_callable("loss", loss, "Use loss=lambda params, *batch: ...")


def _checked_choices(choices) -> list[int | Quantizer]:
    """Returns widths and quantizers."""
    remedy = "Use widths such as (2, 3, 4, 8), or quantizers such as (cage.nf4(),)."
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise TypeError(f"`choices` must be a list; got {choices!r}. {remedy}")
    found = []
    for choice in choices:
        if isinstance(choice, str) and (name := re.fullmatch(r"int([2-8])", choice)):
            choice = int(name[1])
        if not isinstance(choice, Quantizer):
            check_int("choices", choice, remedy)
        found.append(choice)
    return found


def _options(quantizer, shape, choices) -> list[Quantizer]:
    """Returns the quantizer of each choice for one parameter."""
    found = []
    for choice in choices:
        if not isinstance(choice, Quantizer):
            if not isinstance(quantizer.format, EvenlySpaced):
                raise ValueError(
                    f"`choices` must be quantizers where a format has no widths; got "
                    f"{choice}, {quantizer}. Use choices=(cage.nf4(), cage.int8()), or "
                    f"integers in the rule."
                )
            format = dataclasses.replace(quantizer.format, bits=choice)  # type: ignore[type-var]
            choice = dataclasses.replace(quantizer, format=format)
        elif choice.axis == CONTRACTED:
            choice = dataclasses.replace(choice, axis=quantizer.axis)
        choice.blocks(shape)  # raises if it does not fit
        found.append(choice)
    return found


def _bytes(quantizer, x) -> int:
    return -(-quantizer.storage_bits(x.shape, compute_dtype(x.dtype)) // 8)


def _tied(together, paths) -> list[list[str]]:
    """Returns the paths of each set of parameters that get the same choice."""
    if isinstance(together, str):
        raise TypeError(
            f"`together` must be a list of patterns; got a string. Use [{together!r}]."
        )
    name = {path: path for path in paths}  # of the set of a path: its first path
    for pattern in together:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`together` must be a regular expression in each entry; got "
                f"{pattern!r}: {error}. Write '.*' for any text."
            ) from None
        groups: dict[tuple, list[str]] = {}
        for path in paths:
            if match := re.fullmatch(pattern, path):
                groups.setdefault(match.groups(), []).append(path)
        if max(map(len, groups.values()), default=0) < 2:
            raise ValueError(
                f"`together` must match two or more quantized parameters with the same "
                f"text in the groups of a pattern; got {pattern!r}, which matches "
                f"{sum(map(len, groups.values()))} and ties none. Use "
                f"r'(.*)/(?:query|key|value)/kernel': a group with ?: may differ."
            )
        for group in groups.values():
            joined = {name[path] for path in group}
            name |= {path: name[group[0]] for path in paths if name[path] in joined}
    sets: dict[str, list[str]] = {}
    for path in paths:
        sets.setdefault(name[path], []).append(path)
    return [*sets.values()]


def _picks(found, sets, bits) -> dict[str, int]:
    """Returns the index of the choice of each path, within the budget."""
    sizes, increases = (
        np.array([sum(getattr(found[path], part) for path in paths) for paths in sets])
        for part in ("sizes", "increases")
    )
    weights = sum(each.weights for each in found.values())
    budget = int(bits * weights / 8 * (1 + 1e-12))  # which may be that of a report
    least = int(sizes.min(axis=1).sum())
    if budget < least:
        needed = math.ceil(8e3 * least / weights) / 1e3
        raise ValueError(
            f"`bits` must be at least {needed:g} here, the mean of the smallest "
            f"choices with their scales; got {bits:g}. Use bits={needed:g}, fewer bits "
            f"in `choices`, or larger groups."
        )
    picks = least_loss(sizes, increases, budget)
    return {path: pick for paths, pick in zip(sets, picks) for path in paths}


def _patterns(rules, params, chosen) -> dict[str, list[str]]:
    """Groups paths that differ only in their first number and are treated alike."""
    every = [row.path for row in _report(rules, params).rows]
    parts = {path: re.fullmatch(r"(\D*)(\d*)(.*)", path).groups() for path in every}  # type: ignore[union-attr]
    alike = Counter((first, bool(n), rest) for first, n, rest in parts.values())
    groups: dict[tuple, list[str]] = {}
    for path, quantizer in chosen.items():
        first, number, rest = parts[path]
        key = (first, bool(number), rest, quantizer, rules.match_inputs(path))
        groups.setdefault(key, []).append(path)
    found = {}
    for key, paths in groups.items():
        first, _, rest = map(re.escape, (key[0], "", key[2]))
        numbers = "|".join(parts[path][1] for path in paths)
        if len(paths) > 1:
            numbers = r"\d+" if len(paths) == alike[key[:3]] else f"({numbers})"
        found[first + numbers + rest] = paths
    return found


def _rules(rules, params, chosen, patterns) -> Rules:
    """Returns a rule for each pattern, and then those that decide anything else."""
    entries = [
        (pattern, chosen[paths[0]], rules.match_inputs(paths[0]))
        for pattern, paths in patterns.items()
    ]
    others = [row.path for row in _report(rules, params).rows if row.path not in chosen]
    replaced = {*map(rules.rule_of, chosen)} - {*map(rules.rule_of, others)}
    kept = [rule for rule in rules if rule not in replaced]
    resolved = {path: q for path, q in rules.resolved.items() if path not in chosen}
    return Rules([*entries, *kept], resolved=resolved)


def _report(rules, params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sharding, and of rules without use
        return rules.report(params)


def _text(rules, params, patterns, found, picks, choices, bits, what) -> str:
    """Writes the choices as a table, and what each width alone would come to."""
    report = _report(rules, params)
    rows = {row.path: row for row in report.rows}
    lines = [("pattern", "arrays", "shape", "weights", "bits", what)]
    for pattern, paths in patterns.items():
        row = rows[paths[0]]
        increase = sum(found[path].increases[picks[path]] for path in paths)
        lines.append(
            (
                pattern,
                str(len(paths)),
                str(row.shape),
                str(row.quantizer),
                f"{row.bits_per_weight:.2f}",
                f"{increase:.3g}",
            )
        )
    alone: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reason:
            alone.setdefault(row.reason, []).append(row.path)
    weights = sum(each.weights for each in found.values())

    def total(picks):
        size = sum(each.sizes[picks[path]] for path, each in found.items())
        increase = sum(each.increases[picks[path]] for path, each in found.items())
        return f"{8 * size / weights:.2f} bits a weight, {what} {increase:.3g}"

    return "\n".join(
        [
            table(lines, 4),
            *(
                f"not quantized: {paths[0]}"
                f"{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
                for reason, paths in alone.items()
            ),
            *(
                f"all with {choice}{' bits' if is_int(choice) else ''}: "
                f"{total(dict.fromkeys(found, i))}"
                for i, choice in enumerate(choices)
            ),
            f"chosen, at most {bits:g}: {total(picks)}",
            f"with what is left alone: {report.bits_per_weight:.2f} bits a weight, "
            f"{report.bytes_before} bytes become {report.bytes_after}",
        ]
    )
