"""Functions of the rows of a large matrix, such as the logits of many tokens.

On one CPU the rows are taken a chunk at a time: that is faster, and what the function
needs on its way has the size of a chunk. Other programs have all rows at once, since a
compiler for an accelerator fuses what is written for it, and one that divides a program
over devices divides rows as it likes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.dispatch import Variant, Variants, dispatch, if_divided
from cage_jax.arrays.sharding import varying_alike

# Numbers in a chunk: 2 MiB of float32, which stay in the cache of a core.
_AT_ONCE = 2**19


def by_rows(function: Callable, x: jax.Array, beside: Any = ()) -> Any:
    """Computes `function(x, beside, whole=True)`, or the same in chunks.

    Args:
      function: takes rows of `x` and of the arrays in `beside`, and whether these are
        all; returns a tree of arrays with an entry for each row. If the first one is
        like `x`, it takes the memory of `x` where nothing else needs that.
      x: (rows, columns).
      beside: a tree of arrays with an entry for each row.
    """
    whole = functools.partial(function, whole=True)
    chunked = Variant("cpu", functools.partial(_chunked, function), if_divided(1))
    return dispatch(whole, Variants((chunked,)), x, beside)


def _chunked(function, x, beside):
    """Computes a function of rows in a loop, whose first result replaces `x`."""
    of_chunk = functools.partial(function, whole=False)
    given, beside_structure = jax.tree.flatten(beside)
    shapes, structure = jax.tree.flatten(jax.eval_shape(of_chunk, x, beside))
    in_place = shapes[0].shape == x.shape and shapes[0].dtype == x.dtype
    empty = [jnp.zeros(each.shape, each.dtype) for each in shapes[in_place:]]
    words = [_as_words(each) for each in varying_alike(x, *given, *empty)]
    read, results = words[: 1 + len(given)], words[1 + len(given) :]
    if in_place:
        results = [read.pop(0), *results]
    size = min(x.shape[0], max(1, _AT_ONCE // max(1, x.shape[1])))

    def one_more(start, results, size):
        sources = [results[0], *read] if in_place else read
        rows, *parts = (
            _as_dtype(lax.dynamic_slice_in_dim(array, start, size), each.dtype)
            for array, each in zip(sources, [x, *given])
        )
        found = of_chunk(rows, jax.tree.unflatten(beside_structure, parts))
        return [
            lax.dynamic_update_slice_in_dim(every, _as_words(part), start, 0)
            for every, part in zip(results, jax.tree.leaves(found))
        ]

    if size:
        chunks, rest = divmod(x.shape[0], size)
        results = lax.fori_loop(
            0, chunks, lambda i, results: one_more(i * size, results, size), results
        )
        if rest:
            results = one_more(x.shape[0] - rest, results, rest)
    found = [_as_dtype(each, shape.dtype) for each, shape in zip(results, shapes)]
    return jax.tree.unflatten(structure, found)


def _as_words(x):
    """Returns floats of two bytes as their bits.

    XLA computes these in float32 on a CPU, and would convert the whole array each time
    that a part of it is read or written.
    """
    two_bytes = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2
    return lax.bitcast_convert_type(x, np.uint16) if two_bytes else x


def _as_dtype(words, dtype):
    return words if words.dtype == dtype else lax.bitcast_convert_type(words, dtype)
