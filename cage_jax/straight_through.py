"""The straight-through gradient of one array, and that of a learned grid."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.operations import select
from cage_jax.rounding import (
    back_from_basis,
    basis_factor,
    fit_and_round,
    in_basis,
    is_inside,
    of_groups,
    position_of,
    restore,
)


# Under `jax.jit` a program with many arrays of one shape traces this once.
@functools.partial(jax.jit, static_argnums=0)
def straight_through(quantizer, x, grid, noise):
    """`x` quantized and dequantized; its gradients are the quantizer's."""
    return _straight_through(quantizer, x, grid, noise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(quantizer, x, grid, noise):
    values, _, grid = fit_and_round(x, quantizer, grid, noise)
    return restore(values, quantizer, grid, x)


def _forward(quantizer, x, grid, noise):
    # Functions with a rule of their own, not what they do, keep the second derivative:
    # reverse over reverse differentiates this code.
    if quantizer.scale.learned:
        return _straight_through(quantizer, x, grid, noise), (grid, noise, x, None)
    if quantizer.gradient == "identity":
        return _straight_through(quantizer, x, grid, noise), (grid, noise, None, None)
    values, transformed, found = fit_and_round(
        lax.stop_gradient(x), quantizer, grid, noise
    )
    mask = _passes(transformed, quantizer, found)
    value = restore(values, quantizer, found, x)
    return _masked(quantizer, x, value, mask), (grid, noise, None, mask)


def _backward(quantizer, saved, cotangent):
    grid, noise, x, mask = saved
    grid_gradient = jax.tree.map(jnp.zeros_like, grid)
    if x is not None:
        values, transformed, found = fit_and_round(x, quantizer, grid, noise)
        position = position_of(transformed, quantizer, found)
        passes = _passes(transformed, quantizer, found)
        gradient = in_basis(cotangent, quantizer) * basis_factor(quantizer)
        grid_gradient = _learned_gradient(
            gradient, values, position, passes, quantizer, grid
        )
        mask = None if quantizer.gradient == "identity" else passes
    gradient = cotangent
    if mask is not None:
        gradient = _masked_gradient(quantizer, mask, cotangent)
    return gradient, grid_gradient, jax.tree.map(jnp.zeros_like, noise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked(quantizer, x, value, mask):
    """`value`, a constant, with the gradient of `x` where the mask has it pass."""
    return value


def _masked_forward(quantizer, x, value, mask):
    return _masked(quantizer, x, value, mask), mask


def _masked_backward(quantizer, mask, cotangent):
    return _masked_gradient(quantizer, mask, cotangent), None, None


def _masked_gradient(quantizer, mask, cotangent):
    # The rotation is orthonormal: its transpose rotates back.
    gradient = select(mask, in_basis(cotangent, quantizer), 0)
    gradient = back_from_basis(gradient, quantizer) * basis_factor(quantizer) ** 2
    return gradient.astype(cotangent.dtype)


_masked.defvjp(_masked_forward, _masked_backward)


def _learned_gradient(gradient, values, position, mask, quantizer, grid):
    """LSQ's: of `scale * round(x / scale)` with a straight-through round."""
    shape = gradient.shape
    count = math.prod(quantizer.groups(shape).values())
    share = (count * quantizer.format.high) ** -0.5

    def of_group(parts):
        total = functools.partial(jnp.sum, keepdims=True)
        return of_groups(total, parts, quantizer) * share

    inside = mask.astype(gradient.dtype)
    found = jax.tree.map(jnp.zeros_like, grid)
    scale = of_group(gradient * (values - inside * position))
    found = found._replace(scale=scale.astype(grid.scale.dtype))
    if grid.offset is not None:
        offset = of_group(gradient * (1 - inside))
        found = found._replace(offset=offset.astype(grid.offset.dtype))
    return found


_straight_through.defvjp(_forward, _backward)


def _passes(transformed, quantizer, grid):
    """Where the gradient passes."""
    format = quantizer.format
    # A value at the very end of the grid, as absmax puts one into each group, must not
    # fall out of it because dividing by the scale rounds.
    widest = max(abs(format.low), format.high)
    slack = 4 * float(jnp.finfo(transformed.dtype).eps) * widest
    if quantizer.gradient == "trust":
        slack += format.edge
    return is_inside(transformed, quantizer, grid, slack)
