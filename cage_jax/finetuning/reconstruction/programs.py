"""The programs of one block: its target, its output, and a step of its training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.exact import compute_dtype
from cage_jax.core.quantize import fake_quant
from cage_jax.finetuning.reconstruction.blocks import Part
from cage_jax.program.activations import quantize_activations


class Programs(NamedTuple):
    """The compiled functions of a block.

    Trained are `floats`, in the form of `with_grids`, with None in place of the other
    parameters; these are `rest`.

    Attributes:
      target: `(params, x) -> x`, in full precision.
      output: `(floats, rest, x, target) -> (x, error, size)`: the output, its squared
        distance from the target, and the target's square.
      start: `floats -> state`.
      step: `(floats, state, rest, x, target) -> (floats, state, loss)`. The first two
        are donated.
    """

    target: Callable
    output: Callable
    start: Callable
    step: Callable


def programs_of(
    part: Part, dtypes: tuple[Any, ...], optimizer: optax.GradientTransformation
) -> Programs:
    """Makes the programs of a block.

    Args:
      part: the block and its rules.
      dtypes: the dtypes of its inputs, which may be kept in others.
      optimizer: the transformation.
    """
    block = part.block

    def on_part(function, places, x):
        if block.row is not None:
            places = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), places)
        structure: Any
        leaves, structure = jax.tree.flatten(x)
        x = structure.unflatten(leaf.astype(d) for leaf, d in zip(leaves, dtypes))
        return function(places[0] if isinstance(block.paths, str) else places, x)

    def student(places, x):
        return on_part(block.function, places, x)

    def outputs(floats, rest, x):
        variables = fake_quant(joined(floats, rest), part.rules)
        if any(rule.inputs for rule in part.rules):
            return quantize_activations(student, part.rules)(variables, x)
        return student(variables["params"], x)

    @jax.jit
    def target(params, x):
        return on_part(block.teacher or block.function, params, x)

    @jax.jit
    def output(floats, rest, x, target):
        x = outputs(floats, rest, x)
        error, size, _ = _distance(x, target)
        return x, error, size

    def step(floats, state, rest, x, target):
        def loss(floats):
            error, _, count = _distance(outputs(floats, rest, x), target)
            return error / count

        value, gradients = jax.value_and_grad(loss)(floats)
        with jax.numpy_dtype_promotion("standard"):  # on which Optax's AdamW relies
            updates, state = optimizer.update(gradients, state, floats)
        return optax.apply_updates(floats, updates), state, value

    start = jax.jit(optimizer.init)
    return Programs(target, output, start, jax.jit(step, donate_argnums=(0, 1)))


def split(variables: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Separates the floats, which are trained, from the other parameters."""
    params = variables["params"]
    floats = jax.tree.map(lambda x: x if is_float(x) else None, params)
    rest = jax.tree.map(lambda x: None if is_float(x) else x, params)
    return variables | {"params": floats}, rest


def joined(floats: dict[str, Any], rest: Any) -> dict[str, Any]:
    """Undoes `split`."""
    params = jax.tree.map(
        lambda x, other: other if x is None else x,
        floats["params"],
        rest,
        is_leaf=lambda x: x is None,
    )
    return floats | {"params": params}


def is_float(x: Any) -> bool:
    """Tells whether an array is of real floats."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _distance(outputs, targets):
    """Returns the squared distance, the targets' square, and the number of floats."""
    shapes = [jax.tree.map(lambda x: jnp.shape(x), each) for each in (outputs, targets)]
    if shapes[0] != shapes[1] or not any(map(is_float, jax.tree.leaves(outputs))):
        raise ValueError(
            f"a block must return floats, of the same shapes when it is quantized and "
            f"in full precision; got {shapes[0]} and {shapes[1]}. Look at its "
            f"function, and at its `teacher`."
        )
    error: Any = 0.0
    size: Any = 0.0
    count = 0
    for x, target in zip(jax.tree.leaves(outputs), jax.tree.leaves(targets)):
        if is_float(x):
            wide = compute_dtype(x.dtype)
            difference = x.astype(wide) - target.astype(wide)
            error += jnp.sum(jnp.square(difference))
            size += jnp.sum(jnp.square(target.astype(wide)))
            count += x.size
    return error, size, count
