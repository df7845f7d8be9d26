"""The loss of a quantized student that learns from a teacher."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_float_dtype, check_number
from cage_jax.arrays.exact import compute_dtype, times
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.quantize import fake_quant
from cage_jax.core.quantized_array import check_no_codes
from cage_jax.core.rules import Rules, check_rules
from cage_jax.finetuning.distillation.divergence import kl, mean_where
from cage_jax.finetuning.distillation.top_logits import TopLogits, check_temperature
from cage_jax.program.activations import quantize_activations
from cage_jax.program.tracing import check_function, split_grids


@names_checked
def distill(
    function: Callable,
    rules: Rules,
    teacher: Any = None,
    *,
    temperature: float = 1.0,
    where: Callable[..., jax.Array] | None = None,
    features: float = 0.0,
    dtype: jax.typing.DTypeLike | None = "bfloat16",
) -> Callable[..., jax.Array]:
    """Makes the loss of a quantized student that learns from a teacher's predictions.

    It is `kl` of the logits of `function(fake_quant(params, rules), *args)`, whose
    inputs are quantized too where the rules say so. The gradient goes to `params`
    alone, learned grids among them. The teacher runs without any.

    The result is a pytree: its leaves are the teacher's parameters. `jax.jit` compiles
    what it closes over into the program, a copy of it, so make the loss of a large
    teacher an argument: `jax.jit(lambda loss, params, x: jax.grad(loss)(params, x))`.

    Args:
      function: a function of parameters, and of the arguments of a batch, that returns
        logits, (..., vocabulary).
      rules: which parameters and inputs of the student are quantized, and how.
      teacher: parameters for the same function, as before quantization; or a function
        of the arguments of a batch, which returns the logits of another model; or None
        for what the loss is called with. A tree that can be called, such as an Equinox
        module, is parameters if it has the structure of `params`.
      temperature: what all logits are divided by.
      where: a function of the arguments of a batch that returns bools, (...): the
        tokens that count, such as `lambda tokens: tokens != 0`.
      features: weight of the distance between features. Unless 0, functions return
        `(logits, features)`, features being a tree of arrays such as hidden states:
        their squared error over the teacher's mean square is added, the mean of all
        arrays. With `where`, their first axes are those of tokens.
      dtype: what the teacher's parameters are converted to, and so what a function
        computes in that does not convert them; None leaves them as they are, and then
        none of them may be donated.

    Returns:
      `loss(params, *args, teacher=None)`, a scalar of float32. `params` may be what
      `with_grids` or `calibrate` returns. `teacher` is what the teacher returned for
      this batch, in place of running it: logits, `TopLogits` or these with features.

    Raises:
      TypeError, ValueError: for arguments of the wrong kind or out of range. In a call
        without a teacher; as `kl`, `fake_quant` and `quantize_activations`; and for
        features that are not those of the teacher.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def apply(params, tokens):
      ...     return params["embedding"][tokens] @ params["head"]
      >>> keys = jax.random.split(jax.random.key(0))
      >>> params = {
      ...     "embedding": jax.random.normal(keys[0], (300, 16)),
      ...     "head": jax.random.normal(keys[1], (16, 300)),
      ... }
      >>> rules = cage.Rules([("head", "int4"), (".*", None)])
      >>> loss = cage.distill(apply, rules, params)
      >>> tokens = jnp.arange(12).reshape(2, 6)
      >>> value, gradient = jax.value_and_grad(loss)(params, tokens)
      >>> bool(value < 0.1), gradient["head"].shape
      (True, (16, 300))

    Source: Hinton et al., arXiv 1503.02531; for quantized students, Mishra and Marr,
    arXiv 1711.05852.
    """
    check_function(function, "distill(model.apply, rules, params)", "Use its apply.")
    check_rules(rules)
    check_temperature(temperature)
    check_number("features", features, "0 leaves them out.", least=0)
    if where is not None and not callable(where):
        raise TypeError(
            f"`where` must be a function of a batch's arguments; got "
            f"{type(where).__name__}. Use where=lambda tokens: tokens != 0."
        )
    check_no_codes(teacher=teacher)
    _check_teacher(teacher)
    if dtype is not None:
        check_float_dtype("dtype", dtype)
    student = function
    if any(rule.inputs for rule in rules):
        student = quantize_activations(function, rules)

    def predict(teacher_params, params, args):
        forms = {*map(jax.tree.structure, (teacher_params, split_grids(params)[0]))}
        if callable(teacher) and len(forms) == 2:
            return teacher(*args)
        if teacher is None:
            raise ValueError(
                "`teacher` must be given, here or in the call of the loss; got None in "
                "both. Use loss(params, *args, teacher=logits)."
            )
        if _is_array(teacher_params) and not _is_array(params):
            raise TypeError(
                f"`teacher` must be parameters like those of the student; got an array "
                f"of shape {teacher_params.shape}. If these are logits of a batch, use "
                f"loss(params, *args, teacher=logits)."
            )
        return function(teacher_params, *args)

    def loss(teacher_params, params, *args, teacher=None):
        outputs = teacher
        if outputs is None:
            outputs = predict(teacher_params, params, args)
        params = fake_quant(params, rules)
        if student is function:
            params, _ = split_grids(params)
        own = student(params, *args)
        outputs = jax.tree.map(lax.stop_gradient, outputs)
        mask = None if where is None else where(*args)
        if not features:
            return kl(own, outputs, temperature=temperature, where=mask)
        (own, mine), (outputs, theirs) = map(_with_features, (own, outputs))
        value = kl(own, outputs, temperature=temperature, where=mask)
        return value + times(_distance(mine, theirs, mask), float(features))

    # A callable tree of arrays may be parameters: each call tells by its structure.
    leaves = jax.tree.leaves(teacher)
    arrays = leaves and all(map(_is_array, leaves))
    if teacher is None or (callable(teacher) and not arrays):
        return jax.tree_util.Partial(loss, None)
    return jax.tree_util.Partial(loss, _converted(split_grids(teacher)[0], dtype))


def _check_teacher(teacher):
    """Raises for anything but parameters with values and what can be called."""
    if isinstance(teacher, TopLogits):
        raise TypeError(
            "`teacher` must be parameters or a function; got TopLogits, which belong "
            "to one batch. Use loss(params, *args, teacher=top)."
        )
    if callable(teacher):
        return
    paths, leaves, _ = flatten_with_paths(teacher)
    for path, leaf in zip(paths, leaves):
        if not (_is_array(leaf) or isinstance(leaf, np.generic | int | float)):
            raise TypeError(
                f"`teacher` must be parameters with values, or a function of a "
                f"batch's arguments; got {type(leaf).__name__} at {path!r}. Use the "
                f"parameters before quantization, or, of a cache, "
                f"loss(params, *args, teacher=cache.at(number, *args))."
            )


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray)


def _converted(params, dtype):
    """Converts the floats in a tree, unless `dtype` is None."""

    def convert(x):
        floats = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.array(x, dtype) if floats else x

    return params if dtype is None else jax.tree.map(convert, params)


def _with_features(outputs):
    """Returns logits and features; raises for outputs without features."""
    if isinstance(outputs, tuple) and len(outputs) == 2:
        return outputs
    raise TypeError(
        f"`function` and the teacher must return (logits, features) where `features` "
        f"has a weight; got {type(outputs).__name__}. Leave features=0, or return both."
    )


def _distance(mine, theirs, where):
    """Computes the mean over arrays of their relative squared error."""
    shapes = [jax.tree.map(jnp.shape, each) for each in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`features` of the student must have the shapes of the teacher's, "
            f"{shapes[1]}; got {shapes[0]}. Return the same hidden states."
        )
    if not jax.tree.leaves(mine):
        raise ValueError(
            "`features` must have an array; got none. Return hidden states, or leave "
            "features=0."
        )
    errors = []
    for x, y in zip(*map(jax.tree.leaves, (mine, theirs))):
        dtype = compute_dtype(x.dtype)
        x, y, mask = x.astype(dtype), y.astype(dtype), where
        if mask is not None:
            if x.shape[: mask.ndim] != mask.shape:
                raise ValueError(
                    f"`features` must have the axes of tokens first, {mask.shape}, "
                    f"where `where` chooses among these; got {x.shape}. Move the axes, "
                    f"or leave `where` out."
                )
            mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
            mask = jnp.broadcast_to(mask, x.shape)
        size = mean_where(jnp.square(y), mask)
        errors.append(
            mean_where(jnp.square(x - y), mask) / jnp.where(size == 0, 1, size)
        )
    return jnp.mean(jnp.stack(errors))
