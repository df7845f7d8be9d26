"""What quantization has to find, in float64 NumPy. Written once, for all tests.

Nothing here calls the code under test.
"""

import numpy as np
import scipy.linalg


def hadamard(size):
    """The orthonormal Hadamard matrix of Sylvester's construction, (size, size)."""
    return scipy.linalg.hadamard(size) / np.sqrt(size)


def rotate(x, block, axis=-2):
    """Rotates each block of an axis; a `block` of None leaves `x` as it is."""
    x = np.asarray(x, np.float64)
    if block is None:
        return x
    moved = np.moveaxis(x, axis, -1)
    turned = moved.reshape(*moved.shape[:-1], -1, block) @ hadamard(block)
    return np.moveaxis(turned.reshape(moved.shape), -1, axis)


def absmax_scale(x, top=7, group=None, axis=-2):
    """The symmetric absmax scale of each weight's group, in the shape of `x`.

    Args:
      x: weights.
      top: the largest code, 7 for int4.
      group: how many neighbours along `axis` share a scale; None for all of them.
      axis: along which weights share scales.
    """
    moved = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    group = group or moved.shape[-1]
    largest = np.abs(moved.reshape(*moved.shape[:-1], -1, group)).max(-1)
    return np.moveaxis(largest.repeat(group, -1) / top, -1, axis)


def absmax_round(x, top=7, group=None, axis=-2):
    """`x` rounded to the grid of `absmax_scale`, ties to even."""
    scale = absmax_scale(x, top, group, axis)
    return np.round(np.asarray(x, np.float64) / scale) * scale
