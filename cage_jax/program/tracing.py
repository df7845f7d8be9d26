"""Programs traced from functions of parameters and of other arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.program.origins import Origin, of_data, of_parameter
from cage_jax.quantizers.grid import Grid


class Traced(NamedTuple):
    """A function traced to a program.

    Attributes:
      program: the program.
      origins: the origins of its inputs.
      values: its inputs, the parameters first.
      structure: the structure of the function's result.
      shapes: the shapes of the parameters by path.
    """

    program: ClosedJaxpr
    origins: list[Origin]
    values: list[Any]
    structure: Any
    shapes: dict[str, tuple[int, ...]]


def trace(function: Callable, params: Any, args: tuple, kwargs: dict) -> Traced:
    """Traces `function`; its arguments may be arrays, or shapes of arrays."""
    paths, leaves, structure = flatten_with_paths(params)
    arrays, static = split_arrays(args, kwargs)

    def flat(leaves, arrays):
        args, kwargs = static.joined(arrays)
        return function(structure.unflatten(leaves), *args, **kwargs)

    program, shape = jax.make_jaxpr(flat, return_shape=True)(leaves, arrays)
    shapes = dict(zip(paths, map(np.shape, leaves)))
    origins = [of_parameter(path, len(shape)) for path, shape in shapes.items()]
    origins += map(of_data, range(len(arrays)))
    return Traced(
        program, origins, [*leaves, *arrays], jax.tree.structure(shape), shapes
    )


def check_function(function: Any, name: str, remedy: str) -> None:
    """Raises for anything but a function of parameters, such as a Flax module."""
    if any(base.__module__.startswith("flax.") for base in type(function).__mro__):
        raise TypeError(
            f"`function` must be a function of the parameters and of data; got the "
            f"module {type(function).__name__}. {remedy}"
        )
    if hasattr(function, "params") and hasattr(function, "module"):
        raise TypeError(
            f"`function` must be a function of the parameters and of data; got the "
            f"model {type(function).__name__}, which holds its parameters. Use "
            f"lambda params, *args: model(*args, params=params), with model.params."
        )
    if not callable(function):
        raise TypeError(
            f"`function` must be a function of the parameters and of data; got a "
            f"{type(function).__name__}. Use {name}."
        )


def split_grids(params: Any) -> tuple[Any, dict[str, Grid]]:
    """Returns the parameters, and the grids beside them if there are any."""
    if isinstance(params, dict) and set(params) == {"params", "grids"}:
        return params["params"], params["grids"]
    return params, {}


class _Static(NamedTuple):
    """Arguments without their arrays; hashable if the rest is."""

    structure: Any
    leaves: tuple[Any, ...]

    def joined(self, arrays):
        """Returns the arguments and keyword arguments with their arrays put back."""
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return self.structure.unflatten(leaves)


_ARRAY = object()


def split_arrays(args: tuple, kwargs: dict) -> tuple[list[Any], _Static]:
    """Separates the arrays, or their shapes, among arguments from the rest."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    types = jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct
    kinds = [isinstance(leaf, types) for leaf in leaves]
    arrays = [leaf for leaf, is_array in zip(leaves, kinds) if is_array]
    rest = [_ARRAY if is_array else leaf for leaf, is_array in zip(leaves, kinds)]
    return arrays, _Static(structure, tuple(rest))
