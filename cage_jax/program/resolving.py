"""The axes of weights, found in the program that multiplies them."""

from collections.abc import Callable, Mapping
from typing import Any

from cage_jax.core.rules import Rules, check_rules
from cage_jax.program.following import Followed
from cage_jax.program.origins import axes_of
from cage_jax.program.tracing import check_function, split_grids
from cage_jax.program.visiting import follow_function
from cage_jax.quantizers.axes import WeightAxes


def resolve(
    rules: Rules, function: Callable, params: Any, *args: Any, **kwargs: Any
) -> Rules:
    """Finds the axes along which the weights of a program share scales.

    `function` is traced once, without computing anything. A quantizer whose axis is
    "contracted", the default of most presets, gets the axes that the product of its
    parameter with data sums over, through transposes, reshapes, stacks of layers or
    experts, and convolutions. If there are several such products along different axes,
    as for a tied weight, the first one in the program decides; `report` lists them. A
    parameter that is only looked up, such as an embedding, shares scales along the rows
    that are looked up. A quantizer with `axis=None` gets all axes but those that number
    layers or experts, which stand before the axes that are summed over.

    Args:
      rules: a table by path.
      function: a function of parameters and any other arguments, as in
        `quantize_activations`.
      params: the parameters, or their shapes.
      args: an example of the arguments of `function` after the parameters: arrays, or
        shapes as `jax.ShapeDtypeStruct`.
      kwargs: an example of its keyword arguments.

    Returns:
      The same rules, with a quantizer for each quantized parameter in `resolved`, whose
      axes are numbers. Paths that are resolved already stay as they are.

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: for parameters of more than two dimensions that are in no product with
        data, and for groups that do not divide, all of them at once.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*", "int4")])
      >>> params = {"heads": jnp.ones((64, 4, 8)), "out": jnp.ones((4, 8, 64))}
      >>> def apply(params, x):
      ...     x = jnp.einsum("td,dhk->thk", x, params["heads"])
      ...     return jnp.einsum("thk,hkd->td", x, params["out"])
      >>> rules = cage.resolve(rules, apply, params, jnp.ones((3, 64)))
      >>> print(rules.match("heads"))
      int4 absmax, axis -3, identity
      >>> print(rules.match("out"))
      int4 absmax, axis (-3, -2), identity
    """
    check_rules(rules)
    check_function(
        function,
        "resolve(rules, model.apply, params, x)",
        "Use cage_jax.flax.resolve(rules, model, x).",
    )
    params, _ = split_grids(params)
    followed, shapes = follow_function(function, params, args, kwargs)
    return rules.at(params, weight_axes(followed, shapes))


def weight_axes(
    followed: Followed, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightAxes]:
    """Returns the part of each parameter's axes in its first product, by path."""
    found: dict[str, WeightAxes] = {}
    for path, axes in _all_axes(followed, shapes):
        if axes.contracted:
            found.setdefault(path, axes)
    for path, loss in followed.lost.items():
        if rows := axes_of(loss.rows, path):
            found.setdefault(path, WeightAxes(rows))
    return found


def _all_axes(followed, shapes):
    """Yields the part of a parameter's axes in each product."""
    for product in followed.products:
        for path in product.paths:
            contracted = axes_of(product.contracted, path)
            kept = axes_of(product.kept, path)
            if contracted and any(axis > contracted[-1] for axis in kept):
                # Of (experts, in, out), all experts may be computed, and be outputs.
                kept = tuple(axis for axis in kept if axis > contracted[0])
            part = {*contracted, *kept}
            stack = tuple(a for a in range(len(shapes[path])) if a not in part)
            # Of factors such as those of LoRA, other products sum over some axes.
            alone = len(product.paths) == 1
            yield path, WeightAxes(contracted, stack if alone else ())
