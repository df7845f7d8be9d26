"""The increase of the loss by the quantization of one parameter, estimated."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.paths import flatten_with_paths, path_in_errors
from cage_jax.core.quantize import fake_quant, quantization_error
from cage_jax.core.rules import Rules
from cage_jax.finetuning.batches import Progress, checked_batches
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import fit_grid

Options = Mapping[str, Sequence[Quantizer]]


def by_curvature(
    rules: Rules,
    params: Any,
    options: Options,
    curvature: Any | None,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """Returns half the sum of curvature times squared error, by path, for each option.

    Without curvature: the sum of squared errors over the mean square of the parameter.
    """
    trees = (params,) if curvature is None else (params, curvature)
    found = {}
    try:
        quantized = rules.quantized(*trees)
    except ValueError as error:  # the table was applied to the parameters before
        raise ValueError(
            "`curvature` must be a tree like `params`; got one of another structure. "
            "Use cage.finetuning.fisher(loss, params, batches), or the second moment "
            "of Adam for these parameters."
        ) from error
    for done, (path, (_, x, *given)) in enumerate(quantized.items()):
        with path_in_errors(path):
            weights = _checked_curvature(given[0], x) if given else None
            found[path] = np.array([_increase(x, weights, q) for q in options[path]])
            if not np.isfinite(found[path]).all():
                raise ValueError(
                    f"`params` must have finite values; got an increase of "
                    f"{found[path].tolist()}. Look for NaN or infinity in it."
                )
        if progress is not None:
            progress(path, done + 1, len(options))
    if curvature is not None and not any(each.any() for each in found.values()):
        raise ValueError(
            "`curvature` must be positive somewhere; got an increase of 0 for all "
            "parameters. The divergence of a model from itself has no gradient: use "
            "the cross-entropy of labels, or `loss` and `batches`."
        )
    return found


def _checked_curvature(curvature, x):
    if jnp.shape(curvature) != x.shape:
        raise ValueError(
            f"`curvature` must have the shape of its parameter, {x.shape}; got "
            f"{jnp.shape(curvature)}. Use a tree like `params`."
        )
    curvature = jnp.asarray(curvature, compute_dtype(x.dtype))
    if not bool(jnp.all(jnp.isfinite(curvature) & (curvature >= 0))):
        raise ValueError(
            "`curvature` must be finite and at least 0; got NaN, an infinity or a "
            "negative value. Leave out batches whose gradients are not finite, and "
            "use jnp.maximum(curvature, 0) for a Hessian's diagonal."
        )
    return curvature


def _increase(x, curvature, quantizer) -> float:
    return float(_jitted_increase(jnp.asarray(x), curvature, quantizer))


@functools.partial(jax.jit, static_argnums=2)
def _jitted_increase(x, curvature, quantizer):
    grid = fit_grid(x, quantizer) if quantizer.scale.needs_grid else None
    error = quantization_error(x, quantizer, grid=grid)
    squared = jnp.square(error.astype(compute_dtype(x.dtype)))
    if curvature is not None:
        return jnp.sum(curvature * squared) / 2
    mean = jnp.mean(jnp.square(x.astype(squared.dtype)))
    return jnp.sum(squared) / jnp.where(mean == 0, 1, mean)


def by_loss(
    loss: Callable,
    params: Any,
    batches: Iterable[tuple],
    options: Options,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """Returns the mean change of the loss over batches, by path, for each option."""
    paths, leaves, structure = flatten_with_paths(params)
    by_path = dict(zip(paths, leaves))
    evaluate = jax.jit(loss)
    tasks = [(path, k) for path, each in options.items() for k in range(len(each))]
    changes = {path: np.zeros(len(each)) for path, each in options.items()}
    number = 0
    for number, batch in enumerate(checked_batches(batches), 1):
        before = _checked_loss(evaluate(params, *batch), "`loss`")
        for done, (path, k) in enumerate(tasks, 1):
            rounded = _rounded(jnp.asarray(by_path[path]), options[path][k])
            tree = structure.unflatten((by_path | {path: rounded}).values())
            now = _checked_loss(evaluate(tree, *batch), f"`{path}`: `loss`")
            changes[path][k] += now - before
            if progress is not None:
                progress(f"batch {number}: {path}", done, len(tasks))
    return {path: each / number for path, each in changes.items()}


@functools.partial(jax.jit, static_argnums=1)
def _rounded(x, quantizer):
    grid = fit_grid(x, quantizer) if quantizer.scale.needs_grid else None
    return fake_quant(x, quantizer, grid=grid)


def _checked_loss(value, name) -> float:
    kind = jax.typeof(value) if isinstance(value, jax.Array) else value
    is_number = isinstance(value, jax.Array) and not value.shape
    is_number = is_number and jnp.issubdtype(value.dtype, jnp.floating)
    if not is_number or not np.isfinite(value):
        raise ValueError(
            f"{name} must return a finite scalar, a float; got "
            f"{value if is_number else kind}. Use the mean over the batch, and look "
            f"for NaN in the parameters and the batch."
        )
    return float(value)
