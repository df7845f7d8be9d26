"""Teacher Intervention: tensors of the teacher stand in for those of the student."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.optim.schedules import Schedule

# What is replaced in each stage, by the last part of a tap's name; then nothing is.
STAGES = ("output", "context", "map")
_NONE = len(STAGES)
_MASKED = -100.0  # scores below it are of masked tokens


@names_checked
def intervention_stage(total_steps: int) -> Schedule:
    """Returns the stage of each step, for `tapped`.

    Replaced are the outputs of self-attention (stage 0) for the first sixth of the
    steps, then the contexts (1) until a third, then the attention maps (2); after
    `total_steps` nothing is (3).

    Args:
      total_steps: length of the intervention, the first of two equal halves of the
        training in the paper.

    Returns:
      A schedule from the step count (from 0) to the stage, int32.

    Raises:
      TypeError, ValueError: for a number of steps that is not positive.

    Example:
      >>> from cage_jax import contrib
      >>> stage = contrib.intervention_stage(60)
      >>> [int(stage(count)) for count in (0, 9, 10, 19, 20, 59, 60)]
      [0, 0, 1, 1, 2, 2, 3]

    Source: Teacher Intervention, arXiv 2302.11812; the fractions are those of its code.
    """
    check_int("total_steps", total_steps, "Use half of the steps.", least=1)
    ends = [math.ceil(total_steps / parts) for parts in (6, 3, 1)]

    def schedule(count):
        return jnp.sum(jnp.asarray(count) >= jnp.array(ends), dtype=jnp.int32)

    return schedule


@names_checked
def tapped(function: Callable) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Lets tensors inside a model be read, and be replaced by those of a teacher.

    The model calls `x = tap(name, x)` where a tensor can be read. A name is a path that
    ends in what it is, such as "layers/0/map". In stages 0, 1 and 2 those that end in
    "output", "context" and "map" are replaced: the output of self-attention with its
    projection, the sum of values weighted by the map, and the map, the softmax of
    scores. Others, such as "scores" and "hidden", are only read. No gradient passes
    into what is replaced, and none into the teacher.

    Args:
      function: the model, which takes `tap` by name.

    Returns:
      `call(*args, teacher=None, stage=3)`, which returns the result of
      `function(*args)` and the tensors by name, as they were before they were replaced.
      `teacher` is the dict that the same call returned for the teacher; `stage` may be
      traced. Without a teacher nothing is replaced.

    Raises:
      ValueError: in a call, for a teacher without the tensor of a tap, or with one of
        another shape, and for two taps of one name.

    Example:
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def model(w, x, tap):
      ...     weights = tap("map", jax.nn.softmax(w * x))
      ...     return jnp.sum(weights * x)
      >>> x, call = jnp.array([0.0, 1.0]), contrib.tapped(model)
      >>> target, teacher = call(2.0, x)
      >>> loss = lambda w, stage: call(w, x, teacher=teacher, stage=stage)[0]
      >>> bool(loss(0.0, 2) == target), float(jax.grad(loss)(0.0, 2))
      (True, 0.0)
      >>> float(loss(0.0, 3)), float(jax.grad(loss)(0.0, 3))
      (0.5, 0.25)

    Source: Teacher Intervention, arXiv 2302.11812, section 4.
    """

    def call(*args, teacher=None, stage=_NONE):
        found: dict[str, jax.Array] = {}

        def tap(name, x):
            if name in found:
                raise ValueError(
                    f"`tap` must get each name once; got {name!r} again. Put the "
                    f"number of the layer into it."
                )
            found[name] = x
            kind = name.rpartition("/")[2]
            if teacher is None or kind not in STAGES:
                return x
            if getattr(teacher.get(name), "shape", None) != x.shape:
                raise ValueError(
                    f"`teacher` must have a tensor of shape {x.shape} at {name!r}; got "
                    f"those of {sorted(teacher)[:3]}. Use those of the same call for "
                    f"the teacher and this batch."
                )
            instead = lax.stop_gradient(teacher[name]).astype(x.dtype)
            return jnp.where(jnp.asarray(stage) == STAGES.index(kind), instead, x)

        return function(*args, tap=tap), found

    return call


@names_checked
def tap_distance(
    student: Mapping[str, jax.Array],
    teacher: Mapping[str, jax.Array],
    *,
    kinds: Collection[str] = ("hidden", "scores", "output"),
) -> jax.Array:
    """Computes the sum of the mean squared errors of tensors that `tapped` read.

    It is added to the divergence of the predictions, with a weight of 1. Scores of
    masked tokens, at most -100, count as 0. Computed in float32 (float64 for float64);
    the gradient goes to the student alone.

    Args:
      student: tensors by name.
      teacher: those of the teacher, by the same names.
      kinds: which of them count, by the last parts of their names.

    Returns:
      A scalar.

    Raises:
      ValueError: if none counts, or one has another shape or none.

    Example:
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> student = {"scores": jnp.array([1.0, -1e9]), "map": jnp.array([1.0, 0.0])}
      >>> teacher = {"scores": jnp.array([3.0, -2e9]), "map": jnp.array([0.0, 1.0])}
      >>> float(contrib.tap_distance(student, teacher))
      2.0

    Source: Teacher Intervention, arXiv 2302.11812; scores as in TinyBERT, arXiv
    1909.10351.
    """
    names = [name for name in student if name.rpartition("/")[2] in kinds]
    shapes = {
        name: [getattr(each.get(name), "shape", None) for each in (student, teacher)]
        for name in names
    }
    others = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if others or not names:
        raise ValueError(
            f"`student` and `teacher` must have tensors of the same shapes that end in "
            f"one of {tuple(kinds)}; got {others or sorted(student)}. Use what one "
            f"model tapped, or other `kinds`."
        )

    def error(name):
        x, y = (
            each[name].astype(compute_dtype(each[name].dtype))
            for each in (student, teacher)
        )
        x, y = (jnp.where(each > _MASKED, each, 0) for each in (x, y))
        return jnp.mean(jnp.square(x - lax.stop_gradient(y)))

    return sum(map(error, names), start=jnp.zeros([]))
