"""The straight-through gradients of one array and of a learned grid."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.dispatch import Variants, dispatch, kernel_required
from cage_jax.arrays.exact import divide, select
from cage_jax.arrays.sharding import shards_of
from cage_jax.pallas.candidates import fake_quant_kernels, masked_gradient_kernels
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import dequantized, rounding


def straight_through(
    quantizer, x, grid, noise, implementation=None, path="", placement=None
):
    """Quantizes and dequantizes `x`, with the quantizer's gradients."""

    # On shards with a kernel there are no grid and no noise, which kernels do not take.
    def local(x, grid=None, noise=None):
        # If nothing is traced the error is raised at once, and its caller has the path.
        if path and implementation == "pallas" and isinstance(x, jax.core.Tracer):
            kernels = fake_quant_kernels(quantizer, x, grid, noise, masked=False)
            x = kernel_required(kernels, x, path)
        return _fake_quant(quantizer, implementation, x, grid, noise)

    if placement is None and jax.typeof(x).sharding.mesh.empty:
        return local(x, grid, noise)
    shards = shards_of(x, quantizer.blocks(x.shape).pieces, placement)
    if shards is None or not _has_kernel(quantizer, shards.shape, x, grid, noise):
        return local(x, grid, noise)
    # A kernel cannot be partitioned, but runs on each shard.
    return jax.shard_map(
        local, mesh=shards.mesh, in_specs=shards.spec, out_specs=shards.spec
    )(x)


def _has_kernel(quantizer, shape, x, grid, noise):
    x = jax.ShapeDtypeStruct(shape, x.dtype)
    return bool(fake_quant_kernels(quantizer, x, grid, noise, masked=False).found)


def _cage_jax_fake_quant(quantizer, implementation, x, grid, noise):
    return _straight_through(quantizer, implementation, x, grid, noise)


# Under `jax.jit` a program with many arrays of one shape traces this once.
_fake_quant = jax.jit(_cage_jax_fake_quant, static_argnums=(0, 1))
# Its name in a program, by which `program/following.py` finds quantized weights. No
# function of a user may have the same.
FAKE_QUANT = _cage_jax_fake_quant.__name__


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(quantizer, implementation, x, grid, noise):
    def value(x, grid, noise):
        found = rounding(x, quantizer, grid)
        return dequantized(found.code_values(noise), quantizer, found.grid, x)

    kernels = fake_quant_kernels(quantizer, x, grid, noise, masked=False)
    return dispatch(value, kernels, x, grid, noise, implementation=implementation)


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
      grid, noise: as they were given.
      x: the array, if its grid is learned; otherwise None.
      mask: the mask of the gradient, if it is known already; otherwise None.
    """

    grid: Grid | None
    noise: jax.Array | None
    x: jax.Array | None = None
    mask: jax.Array | None = None


def _forward(quantizer, implementation, x, grid, noise):
    # Reverse over reverse differentiates this code. So it calls functions with gradient
    # rules of their own, not their bodies, which keeps the second derivative.
    learned = quantizer.scale.learned
    if learned or quantizer.gradient == "identity":
        value = _straight_through(quantizer, implementation, x, grid, noise)
        return value, _Saved(grid, noise, x if learned else None)
    value, mask = _value_and_mask(quantizer, implementation, x, grid, noise)
    masked = _masked(quantizer, implementation, x, value, mask)
    return masked, _Saved(grid, noise, mask=mask)


def _value_and_mask(quantizer, implementation, x, grid, noise):
    """Returns the value and the mask; the mask is int8 if a kernel computes both."""
    kernels = fake_quant_kernels(quantizer, x, grid, noise, masked=True)

    def value_and_mask(x, grid, noise):
        found = rounding(x, quantizer, grid)
        value = dequantized(found.code_values(noise), quantizer, found.grid, x)
        mask = found.gradient_mask()
        return value, mask.astype(jnp.int8) if kernels.found else mask

    x = lax.stop_gradient(x)
    return dispatch(
        value_and_mask, kernels, x, grid, noise, implementation=implementation
    )


def _backward(quantizer, implementation, saved, cotangent):
    mask = saved.mask
    grid_gradient, noise_gradient = jax.tree.map(
        jnp.zeros_like, (saved.grid, saved.noise)
    )
    if quantizer.scale.learned:
        found = rounding(saved.x, quantizer, saved.grid)
        grid_gradient = _learned_gradient(cotangent, found, saved.noise, saved.grid)
        mask = found.gradient_mask()
    gradient = cotangent
    if quantizer.gradient != "identity":
        gradient = _masked_gradient(quantizer, implementation, mask, cotangent)
    return gradient, grid_gradient, noise_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _masked(quantizer, implementation, x, value, mask):
    """Returns `value`, a constant, with the gradient of `x` where the mask is set."""
    return value


def _masked_forward(quantizer, implementation, x, value, mask):
    return _masked(quantizer, implementation, x, value, mask), mask


def _masked_backward(quantizer, implementation, mask, cotangent):
    gradient = _masked_gradient(quantizer, implementation, mask, cotangent)
    return gradient, None, None


def _masked_gradient(quantizer, implementation, mask, cotangent):
    def gradient(mask, cotangent):
        passing = mask if mask.dtype == bool else lax.ne(mask, mask.dtype.type(0))
        basis = quantizer.basis(cotangent.shape)
        found = basis.within(lambda g: select(passing, g, 0), cotangent)
        return found.astype(cotangent.dtype)

    kernels = Variants()
    if mask.dtype != bool:  # there was a kernel for the forward pass, so there is one
        kernels = masked_gradient_kernels(quantizer, cotangent)
    return dispatch(gradient, kernels, mask, cotangent, implementation=implementation)


_masked.defvjp(_masked_forward, _masked_backward)


def _learned_gradient(cotangent, found, noise, grid):
    """Computes LSQ's gradient, that of `scale * round(x / scale)` straight through.

    The rounding of the scale to one that can be stored is passed straight through too.
    """
    quantizer, shape = found.quantizer, cotangent.shape
    blocks, gradient = quantizer.blocks(shape), quantizer.basis(shape).rotate(cotangent)
    gradient_scale = (blocks.count * quantizer.format.high) ** -0.5

    def of_group(parts):
        total = functools.partial(jnp.sum, keepdims=True)
        return blocks.reduce(total, parts) * gradient_scale

    inside = found.gradient_mask().astype(gradient.dtype)
    slope = found.code_values(noise) - inside * found.position()
    scale = of_group(gradient * slope).astype(grid.scale.dtype)
    if grid.tensor_divisor is not None:
        scale = divide(scale, jnp.broadcast_to(grid.tensor_divisor, scale.shape))
    learned = jax.tree.map(jnp.zeros_like, grid)._replace(scale=scale)
    if grid.offset is not None:
        offset = of_group(gradient * (1 - inside))
        learned = learned._replace(offset=offset.astype(grid.offset.dtype))
    return learned


_straight_through.defvjp(_forward, _backward)
