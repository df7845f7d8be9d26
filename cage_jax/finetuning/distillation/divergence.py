"""The divergence of a student's predictions from a teacher's, without large arrays."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.exact import compute_dtype, times
from cage_jax.arrays.names import names_checked
from cage_jax.finetuning.distillation.chunks import by_rows
from cage_jax.finetuning.distillation.top_logits import (
    TopLogits,
    check_logits,
    check_temperature,
)


@names_checked
def kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array | TopLogits,
    *,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Computes the forward divergence of the student from the teacher.

    It is the mean over tokens of `sum_v p_T (log p_T - log p_S)`, times the square of
    the temperature, with p the softmax of logits divided by the temperature. With
    `TopLogits` as the teacher, all entries beyond these count as one.

    Computed in float32 (float64 for float64). Beside what is given, there is one array
    like the student's logits: the gradient. On one CPU it takes the memory of the
    student's logits, if these are needed no more, and the exponentials are taken once.
    On several devices `TopLogits` take one array more, of float32, divided likewise.
    Reverse mode alone, any number of times.

    Args:
      student_logits: (..., vocabulary), floats.
      teacher_logits: an array like that, or `TopLogits` of shape (..., k); they get no
        gradient. An entry to which the teacher gives no probability, such as -inf, may
        have none from the student.
      temperature: what all logits are divided by. `TopLogits` were made for one.
      where: (...), bools: the tokens that count; None for all. What the others hold,
        even NaN, has no effect.

    Returns:
      A scalar of float32; NaN if a logit of a token that counts is NaN, and 0, with a
      gradient of zeros, if no token counts.

    Raises:
      TypeError: for logits that are no floats, and for a `where` that is no bools.
      ValueError: for another shape or vocabulary of the teacher, a `where` of another
        shape, a temperature that is not positive, or not that of the `TopLogits`.

    Example:
      >>> from cage_jax import finetuning
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> student = jnp.zeros((1, 3))
      >>> round(float(finetuning.kl(student, teacher)), 4)
      0.0589
      >>> top = finetuning.TopLogits.of(teacher, 1)
      >>> round(float(finetuning.kl(student, top)), 4)
      0.0589

    Source: Hinton et al., arXiv 1503.02531.
    """
    check_logits("student_logits", student_logits)
    check_temperature(temperature)
    _check_teacher(student_logits, teacher_logits, temperature)
    if where is not None:
        check_where(where, student_logits.shape[:-1])
    *lead, vocabulary = student_logits.shape

    def as_rows(x):
        return lax.stop_gradient(x).reshape(math.prod(lead), *x.shape[len(lead) :])

    teacher = jax.tree.map(as_rows, teacher_logits)
    rows = student_logits.reshape(-1, vocabulary)
    values = _of_rows(rows, teacher, float(temperature)).reshape(lead)
    return times(mean_where(values, where), float(temperature) ** 2)


def mean_where(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Computes the mean of the values that count, 0 if none does."""
    if where is None:
        return jnp.mean(values)
    count = jnp.sum(where, dtype=values.dtype)
    return jnp.sum(jnp.where(where, values, 0)) / jnp.maximum(count, 1)


def check_where(where: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError for anything but a bool for each token."""
    dtype = getattr(where, "dtype", None)
    if dtype != jnp.bool_:
        raise TypeError(
            f"`where` must be an array of bools, True for the tokens that count; got "
            f"{dtype or type(where).__name__}. Use mask > 0."
        )
    if where.shape != shape:
        raise ValueError(
            f"`where` must have the shape of the logits without the vocabulary, "
            f"{shape}; got {where.shape}. Give a value for each token."
        )


def _check_teacher(student, teacher, temperature):
    """Raises for a teacher of other tokens, another vocabulary or temperature."""
    if not isinstance(teacher, TopLogits):
        check_logits("teacher_logits", teacher)
        lead, vocabulary = teacher.shape[:-1], teacher.shape[-1]
    else:
        lead, vocabulary = teacher.rest.shape, teacher.vocabulary
        if teacher.temperature != temperature:
            raise ValueError(
                f"`temperature` must be that of the teacher's largest logits, "
                f"{teacher.temperature:g}; got {temperature:g}. Make them again for "
                f"this one: what their rest adds up to depends on it."
            )
    if vocabulary != student.shape[-1]:
        raise ValueError(
            f"`teacher_logits` must have the student's vocabulary, "
            f"{student.shape[-1]} entries; got {vocabulary}. Use a teacher with the "
            f"same tokenizer, and cut off what pads its logits."
        )
    if lead != student.shape[:-1]:
        raise ValueError(
            f"`teacher_logits` must be of the student's tokens, "
            f"{student.shape[:-1]}; got {lead}. Give both the same batch."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_rows(student, teacher, temperature):
    """Computes the divergence of each row of logits, (rows,)."""
    function = functools.partial(_divergence, temperature=temperature, gradient=False)
    (values,) = by_rows(function, student, teacher)
    return values


def _forward(student, teacher, temperature):
    function = functools.partial(_divergence, temperature=temperature, gradient=True)
    gradient, values = by_rows(function, student, teacher)
    return values, gradient


def _backward(temperature, gradient, cotangent):
    cotangent = times(cotangent, 1 / temperature)[:, None]
    # A row that does not count may be NaN.
    product = jnp.where(cotangent == 0, 0, gradient.astype(cotangent.dtype) * cotangent)
    return product.astype(gradient.dtype), None


_of_rows.defvjp(_forward, _backward)


def _divergence(student, teacher, whole, *, temperature, gradient):
    """Computes the divergence of rows, after its gradient if that is asked for.

    The gradient is that of the logits divided by the temperature. With all rows, each
    exponential is taken again for it: XLA would keep the first.
    """
    of = _from_largest if isinstance(teacher, TopLogits) else _from_all
    x = times(student.astype(compute_dtype(student.dtype)), 1 / temperature)
    values, slope = of(x, teacher, whole, temperature)
    return (slope.astype(student.dtype), values) if gradient else (values,)


def _from_all(x, teacher, whole, temperature):
    y = times(teacher.astype(x.dtype), 1 / temperature)
    x, y = x - jnp.max(x, -1, keepdims=True), y - jnp.max(y, -1, keepdims=True)
    of_x, of_y = jnp.exp(x), jnp.exp(y)
    # 0 for what the teacher never predicts, even where both logits are -inf.
    terms = jnp.where(of_y == 0, 0, of_y * (y - x))
    sum_x = jnp.sum(of_x, -1, keepdims=True)
    sum_y, cross = _sums(of_y, terms)
    values = cross / sum_y + jnp.log(sum_x) - jnp.log(sum_y)
    if whole:
        slope = jnp.exp(x - jnp.log(sum_x)) - jnp.exp(y - jnp.log(sum_y))
    else:
        slope = of_x * (1 / sum_x) - of_y * (1 / sum_y)
    return values[:, 0], slope


def _sums(*arrays):
    """Sums arrays along the last axis at once, so that XLA keeps none of them."""
    zeros = tuple(jnp.zeros((), each.dtype) for each in arrays)

    def add(a, b):
        return tuple(map(lax.add, a, b))

    sums = lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))
    return [each[:, None] for each in sums]


def _from_largest(x, top, whole, temperature):
    """Takes all entries that are not among the teacher's largest as one."""
    log_p, log_p_rest = top.logits.astype(x.dtype), top.rest.astype(x.dtype)[:, None]
    total = _log_sum(log_p, log_p_rest)  # not quite 0 after rounding to 16 bits
    log_p, log_p_rest = log_p - total, log_p_rest - total
    # The teacher's probability of each entry, -1 for those in the rest.
    target = jax.vmap(lambda row, ids, p: row.at[ids].set(p, unique_indices=True))(
        jnp.full_like(x, -1), top.ids, jnp.exp(log_p)
    )
    inside = target != -1
    outside = jnp.where(inside, -jnp.inf, x)
    largest = _finite(jnp.max(outside, -1, keepdims=True))
    x_rest = largest + jnp.log(jnp.sum(jnp.exp(outside - largest), -1, keepdims=True))
    x_top = jnp.take_along_axis(x, top.ids, -1)
    total = _log_sum(x_top, x_rest)
    values = _terms(log_p, x_top - total) + _terms(log_p_rest, x_rest - total)
    powers = jnp.exp(x - jnp.where(inside, total, _finite(x_rest)))
    missing = jnp.exp(x_rest - total) - jnp.exp(log_p_rest)
    return values, jnp.where(inside, powers - target, powers * missing)


def _log_sum(top, rest):
    """Computes the logarithm of the sum of all exponentials, (rows, 1)."""
    return jnp.logaddexp(jax.nn.logsumexp(top, -1, keepdims=True), rest)


def _terms(log_p, log_q):
    """Sums `p (log p - log q)` along the last axis; what has no probability adds 0."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p == 0, 0, p * (log_p - log_q)), -1)


def _finite(x):
    """Returns 0 for -inf, the logarithm of an empty sum."""
    return jnp.where(x == -jnp.inf, 0, x)
