"""Grids that are given: learned ones beside the parameters, frozen ones by path."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.blocks import Blocks
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.quantized_array import QuantizedArray, decoded, grid_of
from cage_jax.core.rules import Rules
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer, check_has_codes
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.quantizers.scale_types import of_the_size_of_weights


@names_checked
def with_grids(params: Any, rules: Rules) -> dict[str, Any]:
    """Puts learned grids beside the parameters, so that any optimizer trains both.

    `fake_quant`, `quantize`, `quantization_error` and the CAGE transformations find
    them there.

    Args:
      params: a tree of parameters, or of their codes, as from `gptq`.
      rules: a table in which some quantizers are learned, such as `lsq()`.

    Returns:
      `{"params": params, "grids": {path: Grid}}`, with the grids that the scale rules
      find in the parameters, and those of codes, which become values. Learned scales
      are float32 here, whatever type they are stored in: they are rounded where they
      are used.

    Raises:
      ValueError: if no rule with a learned quantizer matches, and for codes of another
        format, rotation or groups.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.lsq(4))])
      >>> variables = cage.with_grids({"kernel": jnp.ones((8, 4))}, rules)
      >>> quantized = cage.fake_quant(variables, rules)["params"]
      >>> round(float(variables["grids"]["kernel"].scale[0, 0]), 4)
      0.7559

    Source: LSQ, arXiv 1902.08153, section 2.
    """
    paths, leaves, structure = flatten_with_paths(params, QuantizedArray)
    codes = {p: leaf for p, leaf in zip(paths, leaves) if _is_codes(leaf)}
    params = structure.unflatten(
        [decoded(leaf) if _is_codes(leaf) else leaf for leaf in leaves]
    )
    grids = {
        path: _grid_of(path, codes[path], quantizer)
        if path in codes
        else fit_grid(x, quantizer)
        for path, (quantizer, x) in rules.quantized(params).items()
        if quantizer.scale.needs_grid
    }
    if not grids:
        raise ValueError(
            f"`rules` must match a parameter with a learned quantizer; got {rules}. "
            f"Use lsq(), or leave the grids out."
        )
    return {"params": params, "grids": grids}


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)


def _grid_of(path, codes, quantizer):
    """Returns the grid of codes, for a learned quantizer."""
    with path_in_errors(path):
        own, shape = codes.quantizer, codes.shape
        same = own.format == quantizer.format
        if not (same and own.basis(shape) == quantizer.basis(shape)):
            raise ValueError(
                f"`params` must have codes of the format and rotation of the rule, "
                f"{quantizer}; got {own}. Use such a quantizer for the codes, or "
                f"with_grids(dequantize(codes), rules)."
            )
        grid = grid_of(codes)
        check_grid(grid, quantizer, quantizer.blocks(shape))
    return of_the_size_of_weights(grid)


def grid_at(path: str, x: Any, grid: Mapping[str, Grid] | None) -> Grid | None:
    """Returns the grid given for a path, else the one that `with_grids` put in `x`."""
    if grid is None:
        beside = isinstance(x, Mapping) and set(x) == {"params", "grids"}
        return x["grids"].get(path) if beside else None
    if not isinstance(grid, Mapping):
        raise TypeError(
            f"`grid` must map each path to its Grid; got {type(grid).__name__}. Use "
            f"the `grids` of the state, or a dict."
        )
    if path not in grid:
        raise ValueError(
            f"`grid` must have an entry for each quantized parameter; got the paths "
            f"{list(grid)}. Add this one, with scale 0 for a grid found in the array."
        )
    return grid[path]


def needed_grid(
    path: str, quantizer: Quantizer, x: Any, grid: Mapping[str, Grid] | None = None
) -> Grid | None:
    """Returns `grid_at`; raises if it is None and the quantizer needs a grid."""
    found = grid_at(path, x, grid)
    check_grid_given(quantizer, found)
    return found


def check_grid_given(quantizer: Quantizer, grid: Grid | None) -> None:
    """Raises if a learned or calibrated grid is not given."""
    if quantizer.scale.needs_grid and grid is None:
        raise missing_grid(quantizer)


def missing_grid(quantizer: Quantizer) -> ValueError:
    """Returns the error for a learned or calibrated grid that is not given."""
    kind = "learned" if quantizer.scale.learned else "calibrated"
    return ValueError(
        f"`grid` must be given for a {kind} scale; got None, quantizer {quantizer}. "
        f"Use variables = with_grids(params, rules) in place of the parameters; for "
        f"the inputs of a model, calibrate(model, rules, ...)."
    )


def check_grid(grid: Grid, quantizer: Quantizer, blocks: Blocks) -> None:
    """Raises unless a given grid has the parts and shapes that its quantizer needs."""
    check_has_codes(quantizer, "grid")
    if not isinstance(grid, Grid):
        raise TypeError(
            f"`grid` must be a Grid; got {type(grid).__name__}. Use Grid(scale) or "
            f"Grid(scale, zero_point) of `cage_jax.scales`, or Grid(**grid) for a dict "
            f"that was read from a file."
        )
    wants = {
        "zero_point": quantizer.asymmetric,
        "offset": quantizer.scale.has_offset,
        "tensor_divisor": quantizer.scale_type.has_tensor_divisor,
    }
    for name, wanted in wants.items():
        if (getattr(grid, name) is not None) != wanted:
            text = name.replace("_", " ")
            raise ValueError(
                f"`grid` must have a {text} when the quantizer has one, and none "
                f"otherwise; got {name}={getattr(grid, name)}, quantizer {quantizer}. "
                f"Take the grid from the state of the same rules."
            )
    for name, value in grid._asdict().items():
        tensor = name == "tensor_divisor"
        expected = blocks.tensor_shape if tensor else blocks.scale_shape
        if value is not None and jnp.shape(value) != expected:
            each = "tensor" if tensor else "group"
            raise ValueError(
                f"`grid` must have one {name} for each {each}, shape {expected}; got "
                f"shape {jnp.shape(value)}, x.shape={blocks.shape}. Take the grid from "
                f"the state of the same rules."
            )
    for name, value in grid._asdict().items():
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        if getattr(value, "is_fully_addressable", True):
            _check_values(name, np.asarray(value, np.float64), quantizer)


def _check_values(name, values, quantizer):
    """Raises if a part of a grid has values that no scale rule finds."""
    scale, format, right = quantizer.scale, quantizer.format, np.isfinite(values)
    if name == "zero_point":
        rule = f"whole numbers from {format.low:g} to {format.high:g}"
        right &= values == np.clip(np.round(values), format.low, format.high)
    elif name == "offset" or scale.signed:
        rule = "finite"
    elif name == "scale" and not scale.needs_grid:
        rule, right = "finite and at least 0", right & (values >= 0)
    else:
        rule, right = "finite and positive", right & (values > 0)
    if right.all():
        return
    remedy = "Look for NaN where it was found, or take it from the state of the rules."
    if scale.learned:
        remedy = "Lower the learning rate of grids, or restart them with with_grids."
    elif scale.needs_grid:
        remedy = "Calibrate again, on data without NaN and not only zeros."
    raise ValueError(
        f"`grid` must have {name.replace('_', ' ')}s that are {rule}; got "
        f"{values[~right][0]:g}, quantizer {quantizer}. {remedy}"
    )
