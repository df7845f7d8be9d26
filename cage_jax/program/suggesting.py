"""Rules for a model that nobody has written rules for yet."""

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cage_jax.core.rules import Rules
from cage_jax.core.tables import table
from cage_jax.program.following import Followed
from cage_jax.program.resolving import weight_axes
from cage_jax.program.roles import is_router
from cage_jax.program.tracing import check_function, split_grids
from cage_jax.program.visiting import follow_function
from cage_jax.quantizers.axes import WeightAxes
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.registry import named, takes_groups

_GROUPS = (128, 64, 32)  # for codes of at most 4 bits, the first that divides
_MOST_BITS_IN_GROUPS = 4
_FEWEST_WEIGHTS = 1024  # smaller parameters are not worth it
_ENDS = (
    "\nNo layer is left alone for being the first or the last one, since there would "
    "be no others."
)


def suggest(
    function: Callable,
    params: Any,
    *args: Any,
    weights: Quantizer | str = "int4",
    inputs: Quantizer | str | None = "int8",
    show: bool = True,
    **kwargs: Any,
) -> Rules:
    """Suggests rules for a program, with the axes that its products sum over.

    `function` is traced once, without computing anything. Each parameter that is
    multiplied with data gets the quantizers, except for what is usually left alone: the
    first layer, which is the embedding if there is one; the last layer; routers of
    experts; and what has fewer than 1024 weights. Norms and biases are in no product.
    If nothing is left, as in a model of two layers, the first and the last layer get
    quantizers too; an embedding that is looked up stays alone.
    Codes of at most 4 bits share scales in groups of 128, 64 or 32, the first that
    divides what is summed over, and otherwise along all of it.

    Args:
      function: a function of parameters and any other arguments, as in
        `quantize_activations`.
      params: the parameters, or their shapes.
      args: an example of the arguments of `function` after the parameters, or shapes.
      weights: the quantizer of weights, or the name of a preset. Groups that do not
        divide a weight are replaced by smaller ones.
      inputs: the quantizer of their inputs, the name of a preset, or None.
      show: whether the rules are printed, with what is left alone and why, and the cost
        in bits.
      kwargs: an example of the keyword arguments of `function`.

    Returns:
      `Rules`, resolved as by `resolve`.

    Raises:
      TypeError: for anything but a function, and for quantizers of the wrong kind.
      ValueError: for the name of no preset, and if no parameter is left to quantize.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> params = [jnp.ones((64, 288)), jnp.ones((288, 96)), jnp.ones((96, 10))]
      >>> def apply(params, x):
      ...     for kernel in params:
      ...         x = jnp.tanh(x @ kernel)
      ...     return x
      >>> rules = cage.suggest(apply, params, jnp.ones((2, 64)), show=False)
      >>> print(rules.match("1"))
      int4 absmax, group 32 of axis -2, identity
    """
    check_function(
        function,
        "suggest(model.apply, params, x)",
        "Use cage_jax.flax.suggest(model, x).",
    )
    params, _ = split_grids(params)
    followed, shapes = follow_function(function, params, args, kwargs)
    axes = weight_axes(followed, shapes)
    choose = _Chooser(
        _candidates("weights", weights, (*_GROUPS, None)),
        [] if inputs is None else _candidates("inputs", inputs, (None,)),
        followed,
        axes,
        _reasons(followed, shapes, axes),
    )
    choices, remark = choose.all(shapes), ""
    if not any(choice.weights for choice in choices.values()):
        # The ends are all that there is.
        choose = choose._replace(reasons=_reasons(followed, shapes, axes, ends=False))
        choices, remark = choose.all(shapes), _ENDS
    if not any(choice.weights for choice in choices.values()):
        told = ", ".join(f"{path}: {c.reason}" for path, c in [*choices.items()][:4])
        raise ValueError(
            f"`function` must multiply parameters with data, other than those that are "
            f"left alone; got {told or 'no parameters'}. Write rules yourself, such as "
            f"Rules([('.*kernel', 'int4', 'int8'), ('.*', None)])."
        )
    patterns = _patterns(choices)
    entries = [
        (pattern, choice.weights, choice.inputs)
        for pattern, (choice, _) in patterns.items()
        if choice.weights
    ]
    rules = Rules([*entries, (".*", None)]).at(params, axes)
    if show:
        print(_text(rules, params, patterns, axes) + remark)
    return rules


class _Choice(NamedTuple):
    """The quantizers of a parameter and its input, and why one of them is None."""

    weights: Quantizer | None
    inputs: Quantizer | None
    reason: str | None


class _Chooser(NamedTuple):
    """Chooses quantizers for a parameter.

    Attributes:
      weights, inputs: the quantizers to try, the best one first.
      followed, axes: what the program does with the parameters.
      reasons: why parameters are left alone, by path.
    """

    weights: list[Quantizer]
    inputs: list[Quantizer]
    followed: Followed
    axes: dict[str, WeightAxes]
    reasons: dict[str, str]

    def all(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Choice]:
        """Returns the choice for each parameter, by path."""
        return {path: self(path, shape) for path, shape in shapes.items()}

    def __call__(self, path: str, shape: tuple[int, ...]) -> _Choice:
        if path in self.reasons:
            return _Choice(None, None, self.reasons[path])
        weights = _first_that_fits(self.weights, [(shape, self.axes[path])])
        if weights is None:
            return _Choice(None, None, f"{self.weights[-1]} does not divide it")
        products = [p for p in self.followed.products if path in p.paths]
        if blocked := [p.blocked_by for p in products if p.blocked_by]:
            return _Choice(weights, None, f"out of reach in {blocked[0]}")
        matrices = [((1, p.count_features()), WeightAxes((1,))) for p in products]
        inputs = _first_that_fits(self.inputs, matrices)
        return _Choice(weights, inputs, None if inputs else "not quantized")


def _reasons(followed, shapes, axes, ends=True) -> dict[str, str]:
    """Returns why parameters are left alone, by path; without `ends` no layer is."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    products = [p for p in followed.products if p.contracted]
    multiplied = {path for product in products for path in product.paths}
    large = {path for path, size in sizes.items() if size >= _FEWEST_WEIGHTS}
    looked_up = {path for path, loss in followed.lost.items() if loss.rows} & large
    found = {}
    for path in sizes:
        if path in looked_up:
            found[path] = "the first layer, an embedding"
        elif path not in multiplied:
            found[path] = "in no product with data"
        elif path not in axes:
            found[path] = "a factor of a weight, of which no product with data sums"
        elif path not in large:
            found[path] = f"fewer than {_FEWEST_WEIGHTS} weights"
        elif is_router(path, shapes[path], products):
            found[path] = "a router of experts"
    if not products or not ends:
        return found
    # In a stack of layers no layer is the first or the last.
    if not looked_up and not products[0].repeats:
        found |= dict.fromkeys(products[0].paths, "the first layer")
    if not products[-1].repeats:
        found |= dict.fromkeys(products[-1].paths, "the last layer")
    return found


def _candidates(argument, quantizer, groups) -> list[Quantizer]:
    """Returns the quantizers to try, the best one first.

    Args:
      argument: its name.
      quantizer: a quantizer, or the name of a preset.
      groups: the sizes of groups for a preset of few bits that has none of its own.
    """
    name = quantizer if isinstance(quantizer, str) else None
    if name is not None:
        quantizer = named(name)
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"`{argument}` must be a Quantizer or the name of a preset; got "
            f"{quantizer!r}. Use {argument}='int4'."
        )
    sizes = [quantizer.group_size]
    if name is not None and takes_groups(name):
        few = quantizer.bits <= _MOST_BITS_IN_GROUPS and quantizer.axis is not None
        sizes = [*groups] if few and sizes == [None] else _halves(sizes[0])
    return [
        dataclasses.replace(quantizer, group_size=size, hadamard=block)
        for block in _halves(quantizer.hadamard)
        for size in sizes
    ]


def _halves(size):
    """Returns a size and its halves, down to 16."""
    if not isinstance(size, int):
        return [size]
    return [size >> i for i in range(size.bit_length()) if i == 0 or size >> i >= 16]


def _first_that_fits(candidates, arrays) -> Quantizer | None:
    """Returns the first quantizer that divides arrays, given by shape and axes."""
    for quantizer in candidates:
        with contextlib.suppress(ValueError):
            for shape, axes in arrays:
                quantizer.at(shape, axes).blocks(shape)
            return quantizer
    return None


def _patterns(choices: dict[str, _Choice]) -> dict[str, tuple[_Choice, list[str]]]:
    """Groups paths that differ only in their first number, if treated alike."""
    groups: dict[str, list[str]] = {}
    for path in choices:
        first, number, rest = re.fullmatch(r"(\D*)(\d*)(.*)", path).groups()  # type: ignore[union-attr]
        pattern = re.escape(first) + (r"\d+" if number else "") + re.escape(rest)
        groups.setdefault(pattern, []).append(path)
    found = {}
    for pattern, paths in groups.items():
        if len(paths) > 1 and len({choices[path] for path in paths}) == 1:
            found[pattern] = choices[paths[0]], paths
        else:
            found |= {re.escape(path): (choices[path], [path]) for path in paths}
    return found


def _text(rules, params, patterns, axes) -> str:
    """Writes the rules as a table, with what is left alone and the cost in bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sharding, and of a last rule without use
        report = rules.report(params)
    rows = {row.path: row for row in report.rows}
    lines = [("pattern", "arrays", "shape", "sums over", "weights", "inputs", "bits")]
    alone: dict[str, list[str]] = {}
    for pattern, (choice, paths) in patterns.items():
        if choice.weights is None:
            alone.setdefault(choice.reason, []).extend(paths)
            continue
        row = rows[paths[0]]
        lines.append(
            (
                pattern,
                str(len(paths)),
                str(row.shape),
                ", ".join(map(str, axes[paths[0]].contracted)),
                str(row.quantizer),
                str(choice.inputs or f"- {choice.reason}"),
                f"{row.bits_per_weight:.2f}",
            )
        )
    return "\n".join(
        [
            table(lines, 6),
            *(
                f"left alone: {paths[0]}"
                f"{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
                for reason, paths in alone.items()
            ),
            f"total: {report.bits_per_weight:.2f} bits a weight, {report.bytes_before} "
            f"bytes become {report.bytes_after}",
        ]
    )
