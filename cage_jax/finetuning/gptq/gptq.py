"""GPTQ: codes that keep the outputs of each product, a start better than rounding."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import check_number, first_lines, warn
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.finite import check_finite
from cage_jax.core.grids import grid_at
from cage_jax.core.inputs import quantize_input
from cage_jax.core.quantize import quantize
from cage_jax.core.quantized_array import QuantizedArray, check_no_codes
from cage_jax.core.rules import Rules, check_rules
from cage_jax.finetuning.batches import Progress, checked_batches
from cage_jax.finetuning.gptq.lockstep import Batched, Lockstep, Weight
from cage_jax.finetuning.gptq.matrices import (
    form_of_input,
    input_matrices,
    matrix_of_row,
    places_of,
    products_by_matrix,
    products_of,
    weight_matrices,
    why_no_matrices,
)
from cage_jax.finetuning.gptq.parameters import Parameter
from cage_jax.finetuning.gptq.repeated_products import used_again
from cage_jax.program.following import follow
from cage_jax.program.origins import Origin, of_data
from cage_jax.program.products import product_of
from cage_jax.program.resolving import weight_axes
from cage_jax.program.tracing import check_function, split_arrays, split_grids, trace
from cage_jax.program.visiting import INPUTS
from cage_jax.quantizers.axes import CONTRACTED

_quantize_input = jax.jit(quantize_input, static_argnums=(1, 2))


@names_checked
def gptq(
    function: Callable,
    rules: Rules,
    params: Any,
    batches: Iterable[tuple],
    *,
    damping: float = 0.01,
    inputs: bool = True,
    strict: bool = True,
    rounded: bool = True,
    progress: Progress | None = None,
) -> Any:
    """Quantizes parameters so that their products with data change little.

    Each matrix is rounded one input after the other, and each error is spread over the
    inputs that follow, so that the error of the matrix's outputs is least for the data
    in `batches`. This is done in one pass through `function`: each product sees inputs
    from parameters that are quantized already. The scale of a group is found by its own
    rule when the first of its inputs is rounded.

    If `rules` have a quantizer that is `idempotent`, `dequantize` of the result lies on
    the grid that `fake_quant` finds in it: to the bit for float32 and without a
    rotation, else up to rounding. To this end the value that sets the scale of a group
    keeps its code. With another quantizer, such as `quest`, `fake_quant` finds other
    scales. `with_grids(codes, rules)` makes the scales of codes the first ones of a
    learned quantizer. Train from what `rounded=False` returns.

    Args:
      function: a function of parameters and any other arguments, of any framework, as
        in `quantize_activations`. Products are found under `jax.jit`, `jax.checkpoint`,
        custom derivatives and `jax.lax.scan`, whose repetitions are taken one by one: a
        stack takes the memory of its codes and of one layer.
      rules: the table of quantizers.
      params: the parameters, or what `with_grids` or `calibrate` returned: a parameter
        whose grid is given keeps it.
      batches: the arguments of `function` after the parameters, a tuple for each batch,
        of the same shapes. Their number of tokens should be a multiple of the inputs of
        the widest matrix.
      damping: what is added to the mean products of the inputs, in units of the mean
        square of an input. More of it makes the result more like plain rounding.
      inputs: whether inputs are quantized too, as the rules say.
      strict: whether a matrix that cannot be reached is an error. With False it is
        rounded, and there is one warning.
      rounded: whether codes are returned. With False the parameters that are rounded
        to them are returned, to train from: `fake_quant` of these gives the values of
        the codes. They lie on the grid only if their quantizer is not `idempotent`.
      progress: called with a path, the number of weights that are rounded and that of
        all that have a rule, after each matrix.

    Returns:
      What `quantize(params, rules)` returns, with other codes and scales, or `params`
      with other values (`rounded=False`). Vectors, and what is only looked up, such as
      embeddings, have the codes of `quantize`, or their own values. A parameter in
      several products, such as a recurrent one, is rounded for all of them: their
      inputs are taken from one more pass through `function`, in which such parameters
      are not rounded.

    Raises:
      TypeError: for anything but `Rules` and a function.
      ValueError: without batches; for batches of several shapes; for inputs with NaN or
        infinity, with the path of their weight; for a parameter that `function` does
        not use, or that is in no product that can be looked into; for stochastic
        rounding.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> w = jax.random.normal(keys[0], (64, 32))
      >>> x = jax.random.normal(keys[1], (256, 8)) @ jax.random.normal(keys[2], (8, 64))
      >>> rules = cage.Rules([(r"w", cage.int3())])
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> codes = cage.gptq(apply, rules, {"w": w}, [(x,)])
      >>> start = cage.dequantize(codes)
      >>> bool(jnp.allclose(cage.fake_quant(start, rules)["w"], start["w"]))
      True
      >>> def error(params):
      ...     return float(jnp.linalg.norm(apply(params, x) - x @ w))
      >>> error(start) < 0.5 * error(cage.fake_quant({"w": w}, rules))
      True

    Source: Frantar et al., arXiv 2210.17323.
    """
    check_rules(rules)
    check_function(function, "gptq(model.apply, rules, ...)", "Use model.apply.")
    check_number("damping", damping, "Use 0.01.", least=0)
    _check_params(rules, params)
    arrays, first = _arrays_of(batches)
    search = _Search(
        rules, params, damping, inputs, len(arrays), progress, keeps=not rounded
    )
    traced = trace(function, search.params, first, {})
    _check_axes(rules, traced)
    search.collect(traced, arrays)
    search.run(traced, arrays)
    search.check_reached(strict)
    return search.result(rounded)


def _check_params(rules, params):
    check_no_codes(params=params)
    quantized = rules.quantized(params)
    check_finite({path: x for path, (_, x) in quantized.items()}, "params")
    for path, (quantizer, _) in quantized.items():
        if quantizer.rounding != "nearest":
            raise ValueError(
                f"`{path}`: `rules` must round to the nearest; got {quantizer}. Use "
                f"dataclasses.replace(quantizer, rounding='nearest') here."
            )


def _check_axes(rules, traced):
    """Warns of matrices whose scales lie along the outputs because of a default."""
    axes = weight_axes(follow(traced.program, traced.origins), traced.shapes)
    found = [
        path
        for path, shape in traced.shapes.items()
        if (quantizer := rules.match(path)) is not None
        and quantizer.axis == CONTRACTED
        and len(shape) == 2
        and path in axes
        and axes[path].contracted == (1,)
    ]
    if found:
        more = f" and {len(found) - 1} more" * (len(found) > 1)
        warn(
            f"`{found[0]}`{more}: `rules` have scales along axis -2, the default, and "
            f"its product sums over axis -1. Use rules = cage.resolve(rules, function, "
            f"params, *batch), here and in the training."
        )


def _arrays_of(batches):
    """Returns the arrays of each batch, and the first batch."""
    batches = [*checked_batches(batches)]
    found = [split_arrays(batch, {}) for batch in batches]

    def shapes(number):
        arrays, static = found[number]
        return [(x.shape, np.dtype(x.dtype)) for x in arrays], static

    for number in range(len(batches)):
        if shapes(number) != shapes(0):
            raise ValueError(
                f"`batches` must have the same shapes, dtypes and other arguments; got "
                f"{[*map(str, shapes(0)[0])]} and, in batch {number}, "
                f"{[*map(str, shapes(number)[0])]}. Cut them to one length, and leave "
                f"out the last one if it is shorter."
            )
    return [arrays for arrays, _ in found], batches[0]


def _key_of(path, places):
    """Returns what products of equal matrices of a parameter have in common."""
    matrices = tuple(np.unique(places.matrices).tolist())
    return path, places.axes, matrices, tuple(places.rows), tuple(places.columns)


def _by_matrix(matrices, sums):
    """Adds up the sums of each matrix, in the order of their numbers."""
    numbers, owners = np.unique(matrices, return_inverse=True)
    return jax.ops.segment_sum(sums, owners, len(numbers))


class _Search:
    """One pass through the program of a model, which rounds its parameters."""

    def __init__(self, rules, params, damping, inputs, count, progress, keeps):
        self.rules, self.damping, self.progress = rules, damping, progress
        self.with_inputs = inputs
        start = quantize(params, rules)
        paths, leaves, self._structure = flatten_with_paths(start, QuantizedArray)
        self._start = dict(zip(paths, leaves))
        self.parameters = {
            path: Parameter(x, self._start[path], grid_at(path, params, None), keeps)
            for path, (_, x) in rules.quantized(params).items()
        }
        self._start |= dict.fromkeys(self.parameters)  # which alone hold their codes
        self.params, self.grids = split_grids(params)
        self.count = count
        self.too_few: dict[str, tuple[int, int]] = {}
        self.blocked: dict[str, str] = {}
        self.used: set[str] = set()
        # Sums of all products, for parameters with several of them.
        self._collected: dict[Any, jax.Array] = {}
        # The last inputs, one and the same quantized, and what was found of each:
        # queries, keys and values share it.
        self._last: list[tuple[Any, dict]] = []

    def result(self, rounded):
        """Returns the tree with codes, or with the weights that get them."""
        done = {
            path: each.finished() if rounded else each.unrounded()
            for path, each in self.parameters.items()
        }
        return self._structure.unflatten((self._start | done).values())

    def collect(self, traced, arrays):
        """Sums the products of inputs of parameters that are used several times."""
        again = used_again(traced.program, traced.origins) & self.parameters.keys()

        def visit(eqn, values, side, repeats):
            return self._collect(eqn, values, side, repeats, again)

        if again:
            self._run(traced, arrays, visit, lambda path, at: self.others[path][at])

    def run(self, traced, arrays):
        """Rounds all parameters."""
        self._run(traced, arrays, self._visit, self._value_of)

    def _run(self, traced, arrays, visit, value_of):
        self.lockstep = Lockstep(self.count, visit, value_of)
        self._last = []
        paths = [*traced.shapes]
        self.others = dict(zip(paths, traced.values))
        wanted = [path for path in paths if self._is_wanted(path)]
        values = [
            Weight(path) if path in wanted else value
            for path, value in zip(paths, traced.values)
        ]
        values += [Batched(each) for each in zip(*arrays)]
        jaxpr = traced.program.jaxpr
        read = {id(a) for eqn in jaxpr.eqns for a in eqn.invars}
        self.used = {p for p, a in zip(paths, jaxpr.invars) if id(a) in read}
        self.lockstep.run(traced.program, values, [False] * len(jaxpr.outvars))

    def _is_wanted(self, path):
        inputs = self.with_inputs and self.rules.match_inputs(path) is not None
        return path in self.parameters or inputs

    def _value_of(self, path, layer):
        if path in self.parameters:
            return self.parameters[path].values(layer)
        return self.others[path][layer]

    def _collect(self, eqn, values, side, repeats, again):
        """Adds to the sums of a parameter with several products."""
        path = values[side].path
        with path_in_errors(path):
            values = [*values]
            x = values[1 - side] = self._input(eqn, values, side, repeats)
            if path in again and why_no_matrices(eqn, side) is None:
                found = self._matrices(eqn, values, side, x)
                if isinstance(found, tuple):
                    key, sums = _key_of(path, found[0]), _by_matrix(*found[1:])
                    before = self._collected.get(key)
                    self._collected[key] = sums if before is None else before + sums
        return values

    def _visit(self, eqn, values, side, repeats):
        """Rounds the weight of a product; returns the factors to multiply."""
        path, why = values[side].path, why_no_matrices(eqn, side)
        with path_in_errors(path):
            values = [*values]
            x = values[1 - side] = self._input(eqn, values, side, repeats)
            if path in self.parameters and why is None:
                why = self._round(eqn, values, side, x)
            if why is not None:
                self.blocked.setdefault(path, why)
        return values

    def _input(self, eqn, values, side, repeats):
        """Returns the input of a product, quantized if the rules say so."""
        x, path = values[1 - side], values[side].path
        quantizer = self.rules.match_inputs(path) if self.with_inputs else None
        if quantizer is None:
            return x
        origins = [of_data(0)] * len(values)
        ndim = eqn.invars[side].aval.ndim
        origins[side] = Origin((path,), (frozenset(),) * ndim)
        found = product_of(eqn, origins)
        assert found is not None
        axes = found[0].axes_for(quantizer)
        grid = self.grids.get(path + INPUTS)
        grid = jax.tree.map(lambda part: part[repeats], grid)

        def quantized(x):
            return [_quantize_input(x, axes, quantizer, grid).astype(x.dtype)]

        def compute():
            return self.lockstep.every(quantized, [x])[0]

        if grid is not None:
            return compute()
        return self._shared(x, (axes, quantizer), compute)

    def _shared(self, x, key, compute):
        """Returns what `compute` finds of an input, found once for each key."""
        found = next((found for known, found in self._last if known is x), None)
        if found is None:
            found = {}
            self._last = [*self._last[-1:], (x, found)]
        if key not in found:
            found[key] = compute()
        return found[key]

    def _round(self, eqn, values, side, x):
        """Rounds a weight for its input; returns why not, or None."""
        path = values[side].path
        found = self._matrices(eqn, values, side, x)
        if not isinstance(found, tuple):
            return found
        places, matrices, sums = found
        if (known := self._collected.get(_key_of(path, places))) is not None:
            matrices, sums = np.unique(matrices), known
        else:
            self._count_rows(eqn, values, side)
        if not bool(jnp.isfinite(sums).all()):
            raise ValueError(
                "`batches` must give inputs whose products are finite; got NaN or "
                "infinity in those of this weight. Look for it, or for numbers as "
                "large as 1e19, in the data or the parameters."
            )
        self.parameters[path].round(places, matrices, sums, self.damping)
        if self.progress is not None:
            parameters = self.parameters.values()
            counts = [[each.count, each.codes.codes.size] for each in parameters]
            self.progress(path, *map(sum, zip(*counts)))
        return None

    def _matrices(self, eqn, values, side, x):
        """Returns the places of matrices, their numbers, and the sums of their inputs.

        Returns why not if they cannot be rounded, and None if they are.
        """
        weight, parameter = values[side], self.parameters[values[side].path]
        if parameter.is_done():
            return None
        shape = parameter.codes.shape

        def places(batch=0):
            numbers, first = parameter.numbers(weight.layer)
            moved = weight_matrices(eqn, side, weight.of(numbers, batch))
            small = math.prod(shape) <= np.iinfo(np.int32).max
            dtype = np.int32 if small else np.int64
            return places_of(np.add(moved, first, dtype=dtype), shape)

        found = places()
        if found is None or not parameter.takes(found):
            return "it is multiplied in parts, or not along its axes"
        if parameter.is_done(found):
            return None
        owners, matrices = None, found.matrices
        if weight.chosen:
            count = math.prod(shape[axis] for axis in found.stack)
            owners, matrices = lambda batch: places(batch).matrices, np.arange(count)
        elif eqn.primitive.name == "ragged_dot_general":
            rows = eqn.invars[0].aval.shape[0]

            def owners(batch):
                return matrix_of_row(self.lockstep.at(values[2], batch), rows)

        if owners is None:
            key = form_of_input(eqn, 1 - side)
            sums = self._shared(x, key, lambda: self._sums(eqn, 1 - side, x))
        else:
            sums = self._sums(eqn, 1 - side, x, owners, len(matrices))
        return found, matrices, sums

    def _sums(self, eqn, side, x, owners=None, count=0):
        """Sums the products of inputs over all batches, for each matrix."""
        total = None
        for batch in range(self.lockstep.count):
            rows = input_matrices(eqn, side, self.lockstep.at(x, batch))
            if owners is None:
                found = products_of(rows)
            else:
                found = products_by_matrix(rows, jnp.asarray(owners(batch)), count)
            total = found if total is None else total + found
        return total

    def _count_rows(self, eqn, values, side):
        """Notes a matrix that has more inputs than there are rows of data.

        How many rows an expert gets is not counted.
        """
        weight = values[side]
        if weight.chosen or eqn.primitive.name == "ragged_dot_general":
            return
        like = jax.eval_shape(
            lambda x: input_matrices(eqn, 1 - side, x), eqn.invars[1 - side].aval
        )
        rows = like.shape[1] * self.lockstep.count
        if not rows:
            raise ValueError(
                "`batches` must have rows of data; got none for this weight. Leave out "
                "empty batches."
            )
        if rows < like.shape[2]:
            self.too_few.setdefault(weight.path, (rows, like.shape[2]))

    def check_reached(self, strict):
        """Raises, or warns unless `strict`, for parameters that were not rounded."""
        found = [
            f"`{path}`: {why}"
            for path, parameter in self.parameters.items()
            if not parameter.is_done() and (why := self._why_not(path))
        ]
        if found and strict:
            raise ValueError(
                f"{first_lines(found)} Use strict=False to round such parameters to "
                f"the nearest, or give them a rule with None."
            )
        if found:
            warn(f"{first_lines(found)} Such parameters are rounded to the nearest.")
        if self.too_few:
            path, (rows, inputs) = max(
                self.too_few.items(), key=lambda each: each[1][1] / each[1][0]
            )
            warn(
                f"`batches` have fewer rows than {len(self.too_few)} of the matrices "
                f"have inputs, such as {rows} rows for the {inputs} inputs of "
                f"`{path}`, so that the result fits these rows more than others. Use "
                f"more batches, or damping=0.1."
            )

    def _why_not(self, path):
        """Returns why a parameter was not rounded; None if it needs no product."""
        loss = self.lockstep.lost.get(path)
        if path not in self.used:
            return "`function` must use each quantized parameter; it does not use it."
        if len(self.parameters[path].codes.shape) < 2 or (loss and loss.rows):
            return None
        if path in self.blocked:
            return f"it cannot be rounded for its inputs: {self.blocked[path]}."
        if loss is None:
            part = "a part of it" if self.parameters[path].count else "it"
            return f"{part} is in no product with data."
        return f"its products are out of reach, behind `{loss.operation}`."
