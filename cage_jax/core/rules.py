"""`Rules`: one table that says, by path, how each parameter is quantized."""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cage_jax.arrays.checks import check_byte_order, first_lines, warn
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.paths import flatten_with_paths, is_nnx_module, path_in_errors
from cage_jax.arrays.sharding import Placement, is_automatic
from cage_jax.core.rule import REMEDY, Entry, Rule, rule_of_entry
from cage_jax.core.unused import unused_text
from cage_jax.core.weight_report import Report, Row, split_text
from cage_jax.quantizers.axes import UnknownAxesError, WeightAxes
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

_NO_PRODUCT = (
    "`axis` must be given, since it is in no product with data here, so that it is not "
    "known what is summed over; got axis='contracted' (the default of most presets). "
    "Name the axes, such as axis=-1, or leave it alone by a rule with None."
)
INPUT_GRIDS = "input_grids"  # where NNX modules keep grids; no rule applies to them


class Rules:
    """A table of patterns and quantizers; the first pattern that matches wins.

    One table drives the straight-through forward pass, the CAGE correction, the
    report and the export, so that they cannot disagree. It is immutable and hashable.

    Args:
      rules: tuples of a regular expression, which must match the whole path of a
        parameter (`re.fullmatch`), and a `Quantizer`, or None to leave the parameter
        alone. A parameter that no pattern matches is left alone too. A third entry is
        the `Quantizer` of the parameter's input, the array that it is multiplied with,
        see `quantize_activations`. The name of a preset, such as "int4", stands for the
        preset with its default settings. Paths are joined by "/", such as
        "layers/0/mlp/up/kernel", and read alike for dicts, lists, dataclasses, Flax
        Linen and NNX: a leading "params" and a trailing ".value" are dropped from the
        path; leave them out of patterns.
      resolved: quantizers by path, which come before those of the patterns, as
        `resolve` finds them; or None.

    Raises:
      TypeError: for anything but tuples of a string and a `Quantizer`, a name or None.
      ValueError: for a pattern that is not a regular expression, and for the name of
        no preset.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([
      ...     (r".*(attention|mlp)/.*kernel", cage.int4(group_size=32)),
      ...     (r".*", None),
      ... ])
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((64, 32))}}, "norm": jnp.ones(64)}
      >>> print(rules.report(params))
      path           shape     quantizer                                    bits  bytes  becomes
      mlp/up/kernel  (64, 32)  int4 absmax, group 32 of axis -2, identity   5.00   8192     1280
      norm           (64,)     - left alone by rule 2 '.*'                 32.00    256      256
      total          2112                                                   5.82   8448     1536
    """

    __slots__ = ("_compiled", "_placements", "_resolved", "_rules")

    def __init__(
        self,
        rules: Iterable[tuple[str, Entry] | tuple[str, Entry, Entry]],
        *,
        resolved: Mapping[str, Quantizer] | None = None,
    ):
        if isinstance(rules, (str, dict, Quantizer)) or not isinstance(rules, Iterable):
            raise TypeError(
                f"`rules` must be a list of (pattern, quantizer) pairs; got {rules!r}. "
                f"{REMEDY}"
            )
        self._rules = tuple(map(rule_of_entry, rules))
        self._compiled = tuple(re.compile(rule.pattern) for rule in self._rules)
        self._resolved = dict(resolved or {})
        self._placements: dict[str, Placement] = {}

    @property
    def resolved(self) -> Mapping[str, Quantizer]:
        """Quantizers by path that come before those of the patterns."""
        return types.MappingProxyType(self._resolved)

    def match(self, path: str) -> Quantizer | None:
        """Returns the quantizer of the parameter at `path`, or None.

        Args:
          path: the parameter's path, joined by "/".

        Example:
          >>> import cage_jax as cage
          >>> cage.Rules([(r".*bias", None), (r".*", cage.int8())]).match("up/bias")
        """
        rule = self.rule_of(path)
        return None if rule is None else self._resolved.get(path, rule.weights)

    def match_inputs(self, path: str) -> Quantizer | None:
        """Returns the quantizer of the input of the parameter at `path`, or None.

        Args:
          path: the parameter's path, joined by "/".

        Example:
          >>> import cage_jax as cage
          >>> rules = cage.Rules([(r".*kernel", cage.int4(), cage.int8(axis=-1))])
          >>> print(rules.match_inputs("up/kernel"))
          int8 absmax, axis -1, identity
        """
        rule = self.rule_of(path)
        return None if rule is None else rule.inputs

    def rule_of(self, path: str) -> Rule | None:
        """Returns the first rule whose pattern matches the whole path, or None."""
        index = self._index(path)
        return None if index is None else self._rules[index]

    def at(self, params: Any, axes: Mapping[str, WeightAxes]) -> "Rules":
        """Returns these rules with axes by number for each quantized parameter.

        Args:
          params: a tree of arrays, or of their shapes.
          axes: what is known about the parameters' axes, by path.

        Raises:
          TypeError, ValueError: as in `quantized`, and for axes that are not known.
        """
        paths, leaves, _ = _flatten(params)
        quantizers = self._quantizers(paths, leaves, axes)
        found = {path: each for path, each in zip(paths, quantizers) if each}
        rules = Rules(self._rules, resolved={**self.resolved, **found})
        rules._placements.update(self._placements)
        return rules

    @property
    def placements(self) -> Mapping[str, Placement]:
        """Shape and sharding of each parameter by path, as `placed` was told."""
        return types.MappingProxyType(self._placements)

    def placed(self, params: Any) -> "Rules":
        """Returns these rules with the sharding of each quantized parameter.

        Under `jax.jit` on an automatic mesh no function can see how an array is
        sharded, and compilers cannot partition kernels. With these rules `fake_quant`
        and `fused_step` run kernels on each device's part, where the parts hold whole
        groups and rotation blocks. Gradients and moments are placed alike. Everything
        else stays as it is.

        Args:
          params: the parameters of the training step, or their shapes, with
            `NamedSharding`; parameters with other shardings are left to the compiler.

        Example:
          >>> import cage_jax as cage
          >>> import jax
          >>> import jax.numpy as jnp
          >>> from jax.sharding import NamedSharding, PartitionSpec as P
          >>> kinds = (jax.sharding.AxisType.Auto,)
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=kinds)
          >>> columns = NamedSharding(mesh, P(None, "data"))
          >>> params = {"kernel": jax.device_put(jnp.ones((64, 512)), columns)}
          >>> rules = cage.Rules([(".*", cage.int4())]).placed(params)
          >>> rules.placements["kernel"].sharding.spec
          P(None, 'data')
        """
        found = Rules(self._rules, resolved=self._resolved)
        for path, (_, x) in self.quantized(params).items():
            sharding = getattr(x, "sharding", None)
            if isinstance(sharding, NamedSharding) and is_automatic(sharding.mesh):
                found._placements[path] = Placement(x.shape, sharding)
        return found

    def map(self, function: Callable, tree: Any, *rest: Any) -> Any:
        """Calls `function(path, quantizer, leaf, *rest)` on each quantized parameter.

        Args:
          function: gets the path, the `Quantizer`, the leaf of `tree`, and the part of
            each of `rest` in the same place (which may be None or a subtree).
          tree: a tree of arrays. Scalars and arrays without elements have nothing to
            quantize and are left alone.
          rest: trees with the structure of `tree` down to its leaves.

        Returns:
          `tree` with the results in place. The other leaves are returned as they are,
          or replaced by those of the first of `rest` if there is one.

        Raises:
          TypeError, ValueError: the errors of `function`, with the parameter's path in
            front, and TypeError for a matched parameter that is not real floating.

        Example:
          >>> import cage_jax as cage
          >>> import jax.numpy as jnp
          >>> rules = cage.Rules([(r"kernel", cage.int8())])
          >>> rules.map(lambda path, quantizer, x: quantizer.bits,
          ...           {"kernel": jnp.ones((4, 4)), "bias": None})
          {'bias': None, 'kernel': 8}
        """
        paths, leaves, structure = _flatten(tree)
        others = [structure.flatten_up_to(each) for each in rest]
        results = []
        quantizers = self._quantizers(paths, leaves)
        for path, quantizer, leaf, *other in zip(paths, quantizers, leaves, *others):
            if quantizer is None:
                results.append(other[0] if other else leaf)
                continue
            with path_in_errors(path):
                results.append(function(path, quantizer, leaf, *other))
        return structure.unflatten(results)

    def misses(self, tree: Any) -> bool:
        """Returns whether the table has a quantizer, but none for any leaf of `tree`.

        Example:
          >>> import cage_jax as cage
          >>> cage.Rules([(r"up/kernel", cage.int8())]).misses({"kernel": 1.0})
          True
        """
        if not any(rule.weights for rule in self._rules):
            return False
        return not any(map(self.match, _flatten(tree)[0]))

    def quantized(self, tree: Any, *rest: Any) -> dict[str, tuple]:
        """Returns the quantizer and the leaf of each quantized parameter, by path.

        The dict has the order of the tree's leaves. With `rest`, as in `map`, the parts
        of these trees in the same place follow the leaf.

        Raises:
          TypeError: for a matched parameter that is not real floating.
          ValueError: for two parameters with the same path, and for one that its
            quantizer cannot divide into groups.

        Example:
          >>> import cage_jax as cage
          >>> import jax.numpy as jnp
          >>> list(cage.Rules([(r".*", cage.int8())]).quantized([jnp.ones((4, 4))]))
          ['0']
        """
        found: dict[str, tuple] = {}
        paths, leaves, structure = _flatten(tree)
        others = [structure.flatten_up_to(each) for each in rest]
        quantizers = self._quantizers(paths, leaves)
        for path, quantizer, leaf, *other in zip(paths, quantizers, leaves, *others):
            if quantizer is None:
                continue
            found[path] = (quantizer, leaf, *other)
        return found

    def report(self, params: Any) -> Report:
        """Reports each parameter's quantizer, bits and bytes, or why it is skipped.

        Warns of a rule that matches nothing, with the nearest path if one is near, and
        of shardings that cut a rotated block or groups, so that devices send each other
        weights at each step.

        Args:
          params: a tree of arrays or of `jax.ShapeDtypeStruct`, with their shardings if
            they have any. What is neither, such as a function in an Equinox module, is
            left out.

        Returns:
          A `Report`; print it, or read its `rows`.

        Raises:
          TypeError, ValueError: for a parameter that its rule cannot quantize, with
            its path.

        Example:
          >>> import cage_jax as cage
          >>> import jax.numpy as jnp
          >>> report = cage.Rules([(r".*", cage.int8(axis=None))]).report(jnp.ones(96))
          >>> report.rows[0].bits_per_weight
          8.333333333333334
        """
        leaves = {
            path: leaf
            for path, leaf in zip(*_flatten(params)[:2])
            if hasattr(leaf, "dtype") or isinstance(leaf, complex | float | int)
        }
        paths = [*leaves]
        quantizers = self._quantizers(paths, leaves.values())
        rows = tuple(map(self._row, paths, leaves.values(), quantizers))
        unused = tuple(
            rule.pattern
            for i, rule in self._unused(paths)
            # A closing (".*", None) may have nothing left to decide.
            if rule.weights
            or rule.inputs
            or not any(map(self._compiled[i].fullmatch, paths))
        )
        report = Report(rows, unused)
        for text in [*(unused_text(each, paths) for each in unused), *report.splits]:
            warn(text)
        return report

    def why_unused(self, tree: Any) -> tuple[str, ...]:
        """Explains why rules with a quantizer match nothing, in a sentence for each.

        Args:
          tree: a tree of arrays. If `optax.masked` has hidden a part of it, there are
            no sentences.

        Example:
          >>> import cage_jax as cage
          >>> rules = cage.Rules([(r"kernal", cage.int8()), (r".*", cage.int4())])
          >>> print(*rules.why_unused({"kernel": 1.0}))
          the rule 'kernal' matches no parameter. The nearest path is 'kernel'.
        """
        paths, leaves, _ = flatten_with_paths(tree, (Grid, optax.MaskedNode))
        if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
            return ()
        return tuple(
            unused_text(rule.pattern, paths)
            for _, rule in self._unused(paths)
            if rule.weights
        )

    def _unused(self, paths):
        used = set(map(self._index, paths))
        return [(i, rule) for i, rule in enumerate(self._rules) if i not in used]

    def _row(self, path, leaf, quantizer) -> Row:
        shape = np.shape(leaf)
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        bits, reason, split = None, None, None
        if quantizer is not None:
            with path_in_errors(path):
                bits = quantizer.storage_bits(shape, compute_dtype(dtype))
            split = split_text(quantizer, shape, getattr(leaf, "sharding", None))
        elif 0 in shape or not shape:
            reason = "no elements" if shape else "a scalar"
        elif (index := self._index(path)) is None:
            reason = "no rule matches"
        else:
            reason = f"left alone by rule {index + 1} {self._rules[index].pattern!r}"
        inputs = self.match_inputs(path)
        return Row(path, shape, dtype, quantizer, bits, reason, inputs, split)

    def _index(self, path: str) -> int | None:
        matches = (i for i, each in enumerate(self._compiled) if each.fullmatch(path))
        return next(matches, None)

    def _quantizers(self, paths, leaves, axes=None) -> list[Quantizer | None]:
        """Returns the quantizer of each leaf, with axes by number, or None.

        Raises:
          ValueError: for those that do not fit their parameters, all of them at once.
        """
        found: list[Quantizer | None] = []
        errors: list[str] = []
        unknown: list[str] = []
        for path, leaf in zip(paths, leaves):
            quantizer = self._quantizer(path, leaf)
            if quantizer is not None:
                try:
                    quantizer = quantizer.at(leaf.shape, (axes or {}).get(path))
                    quantizer.blocks(leaf.shape)
                except UnknownAxesError as error:
                    unknown.append(f"`{path}`")
                    if len(unknown) == 1:
                        text = str(error) if axes is None else _NO_PRODUCT
                        errors.append(f"`{path}`: {text}")
                except ValueError as error:
                    errors.append(f"`{path}`: {error}")
            found.append(quantizer)
        if unknown[1:]:
            errors.append(f"Nor are the axes of {', '.join(unknown[1:])} known.")
        if errors:
            raise ValueError(first_lines(errors))
        return found

    def _quantizer(self, path, leaf) -> Quantizer | None:
        is_grid = isinstance(leaf, Grid) or INPUT_GRIDS in path.split("/")
        quantizer = None if is_grid else self.match(path)
        if quantizer is None:
            return None
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"`{path}`: a quantized parameter must be an array; got "
                f"{type(leaf).__name__}. Convert it with `jnp.asarray`, or give it a "
                f"rule with None before the one that matches."
            )
        check_byte_order(f"`{path}`: a quantized parameter", leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"`{path}`: a quantized parameter must be real floating; got dtype "
                f"{leaf.dtype}. Give it a rule ({re.escape(path)!r}, None) before the "
                f"one that matches."
            )
        return None if leaf.size == 0 or leaf.ndim == 0 else quantizer

    def __iter__(self) -> Iterator["Rule"]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rules)
            and self._rules == other._rules
            and self.resolved == other.resolved
            and self.placements == other.placements
        )

    def __hash__(self) -> int:
        by_path = self._resolved.items(), self._placements.items()
        return hash((self._rules, *map(frozenset, by_path)))

    @property
    def in_words(self) -> str:
        """Name of the table in warnings, after its first rule if it has many."""
        if len(self) < 3:
            return repr(self)
        return f"the {len(self)} rules from {self._rules[0].pattern!r} on"

    def __repr__(self) -> str:
        told = [str(rule) for rule in self._rules[:2]]
        if more := len(self) - len(told):
            told.append(f"... {more} more")
        resolved = f", resolved for {len(self.resolved)} paths" if self.resolved else ""
        return f"Rules([{', '.join(told)}]{resolved})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo) -> Self:
        return self


def check_rules(rules: Any, remedy: str = "") -> None:
    """Raises for anything but `Rules`."""
    if not isinstance(rules, Rules):
        raise TypeError(
            f"`rules` must be Rules; got {type(rules).__name__}. Build them with "
            f"Rules([(pattern, quantizer), ...]).{remedy}"
        )


def nothing_quantized(rules: Rules, tree: Any, so: str = "") -> str:
    """Says that no parameter of a tree is quantized, what follows of it, and why."""
    why = "".join(
        f" {text[0].upper()}{text[1:]}" for text in rules.why_unused(tree)[:1]
    )
    return (
        f"no parameter is quantized by {rules.in_words}{so}.{why} Print "
        f"rules.report(params) to see all paths. They begin at the tree that is given, "
        f"so that they are shorter in a part of a model."
    )


def _flatten(tree):
    """Flattens a tree; learned grids are leaves, as their parts are not parameters."""
    if is_nnx_module(tree):
        raise TypeError(
            f"a tree of parameters must be given; got the NNX module "
            f"{type(tree).__name__}, which has other state too. Use "
            f"nnx.state(model, nnx.Param)."
        )
    return flatten_with_paths(tree, Grid)
