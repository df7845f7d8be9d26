"""What the correction is weighted with: the curvature of the loss, as it can be had.

`lambda e` pulls all weights alike, though moving one to the grid costs far more than
moving another. With the Hessian `H` the pull that undoes what rounding did to the
gradient is `H e`, of strength 1 and nothing to tune. Here are sources of that, from the
gradient at hand to the exact product, for `curvature=` of the corrections.

A source is three functions, as an optimizer of Optax is two. Estimates of a diagonal
are kept by path, in float32, in the shape of the parameter (hence sharded like it), or
of its rows and columns, and in the basis in which it is quantized: with a rotation, of
the rotated weights.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.core.rules import Rules
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import back_from_basis, basis_factor, in_basis

Arrays = Mapping[str, jax.Array]


class Step(NamedTuple):
    """What a source is given at a step.

    Attributes:
      tree: of the gradients that the optimizer is given.
      params: at which the gradients were taken.
      rules: which of them are quantized, and how.
      inner_state: that of the optimizer before the correction, or None.
      extra_args: what else `update` was given, such as `obj_fn`.
    """

    tree: Any
    params: Any
    rules: Rules
    inner_state: Any
    extra_args: dict[str, Any]

    @property
    def gradients(self) -> dict[str, jax.Array]:
        """Those of quantized parameters, by path."""
        return self.by_path(self.tree)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Of the quantized parameters, by path."""
        quantized = self.rules.quantized(self.params)
        return {path: quantizer for path, (quantizer, _) in quantized.items()}

    def by_path(self, tree: Any) -> dict[str, jax.Array]:
        """Of a tree like the parameters the leaves in the places of quantized ones."""
        found = {}

        def collect(path, quantizer, x, leaf):
            if leaf is not None:
                found[path] = leaf
            return leaf

        self.rules.map(collect, self.params, tree)
        return found

    def with_paths(self, arrays: Mapping[str, jax.Array]) -> Any:
        """A tree like the parameters: of arrays by path, and zeros elsewhere."""
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        return self.rules.map(
            lambda path, quantizer, x, zero: (
                arrays[path].astype(x.dtype) if path in arrays else zero
            ),
            self.params,
            zeros,
        )

    def extra(self, name: str, what: str) -> Any:
        """One of the extra arguments.

        Raises:
          ValueError: where it was not given.
        """
        found = self.extra_args.get(name)
        if found is None:
            raise ValueError(
                f"`{name}` must be given to `update` for this curvature; got None. Use "
                f"tx.update(updates, state, params, {name}=...), {what}."
            )
        return found


class Curvature(NamedTuple):
    """A source of curvature.

    Attributes:
      init: from arrays by path to the state of the source.
      update: from the state and a `Step` to the state, once a step.
      weigh: from errors by path, the state and the `Step` to what is pulled along.
    """

    init: Callable[[dict[str, jax.Array]], Any]
    update: Callable[[Any, Step], Any]
    weigh: Callable[[dict[str, jax.Array], Any, Step], dict[str, jax.Array]]


class Factors(NamedTuple):
    """Means of a diagonal; it is taken to be their product over the mean of one.

    Attributes:
      rows: of shape (..., rows).
      columns: of shape (..., columns).
    """

    rows: jax.Array
    columns: jax.Array


class DiagonalState(NamedTuple):
    """An average of estimates.

    Attributes:
      steps: done, int32.
      estimates: that are averaged, int32.
      diagonal: their average before it is debiased, by path.
      clamped: the share of the last average that was negative, or too large.
    """

    steps: jax.Array
    estimates: jax.Array
    diagonal: dict[str, jax.Array | Factors]
    clamped: jax.Array


def weighted(function: Callable[[Arrays, Step], dict[str, jax.Array]]) -> Curvature:
    """A source without a state: `function(errors, step)` is what is pulled along.

    Args:
      function: of errors by path, float32 or wider, and a `Step`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import curvature
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> double = curvature.weighted(
      ...     lambda errors, step: {path: 2 * e for path, e in errors.items()})
      >>> tx = cage.cage(rules, 0.5, curvature=double)
    """
    return Curvature(
        lambda params: (),
        lambda state, step: state,
        lambda errors, state, step: function(errors, step),
    )


def diagonal(
    estimate: Callable[[Step, jax.Array], dict[str, jax.Array]],
    *,
    decay: float = 0.99,
    period: int = 1,
    start: int = 0,
    relative: bool = False,
    factored: bool = False,
    largest: float = 100.0,
    seed: int = 0,
) -> Curvature:
    """A source from estimates of the diagonal, averaged over steps.

    Args:
      estimate: from a `Step` and a key to estimates by path, in the basis of the
        quantizers.
      decay: of the exponential average, which is debiased.
      period: how many steps go by from one estimate to the next one.
      start: the step of the first estimate; before it errors are not weighted.
      relative: weigh with `h / mean(h)`, the mean being that of all quantized weights:
        what is pulled in all stays the same, and goes where the curvature is.
      factored: keep no more of estimates than the means of their rows and columns, the
        last two axes, which are far less noisy. Vectors are kept whole.
      largest: times the mean, the most that a weight may have: the mean of its
        parameter, or of all if `relative`: then of what is left, and where a few have
        nearly all, what is pulled in all is less. What is negative counts as 0.
        `clamped` in the state tells how many were.
      seed: of the keys.

    Returns:
      A source with a `DiagonalState`: 4 bytes for each quantized weight, or for each
      row and each column.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(decay, period, start, largest)

    def kept_of(h):
        if not factored or h.ndim < 2:
            return h
        return Factors(jnp.mean(h, -1), jnp.mean(h, -2))

    def average(before, new):
        mean = decay * before + (1 - decay) * new
        # One overflow must not stay for ever.
        return jnp.where(jnp.isfinite(mean), mean, before)

    def init(params):
        return DiagonalState(
            steps=jnp.zeros([], jnp.int32),
            estimates=jnp.zeros([], jnp.int32),
            diagonal={
                path: kept_of(jnp.zeros_like(x, jnp.float32))
                for path, x in params.items()
            },
            clamped=jnp.zeros([], jnp.float32),
        )

    def update(state, step):
        def averaged():
            key = jax.random.fold_in(jax.random.key(seed), state.steps)
            new = estimate(step, key)
            means = {
                path: jax.tree.map(
                    average, before, kept_of(new[path].astype(jnp.float32))
                )
                for path, before in state.diagonal.items()
            }
            found = {path: _whole(mean) for path, mean in means.items()}
            clamped = _clamped(found, largest, relative)
            return state.estimates + 1, means, _share_changed(found, clamped)

        def kept():
            return state.estimates, state.diagonal, state.clamped

        due = (state.steps >= start) & ((state.steps - start) % period == 0)
        always = period == 1 and start == 0
        found = averaged() if always else lax.cond(due, averaged, kept)
        return DiagonalState(state.steps + 1, *found)

    def weigh(errors, state, step):
        # Nothing is known before the first estimate.
        known = state.estimates > 0
        unit = 1 - decay ** state.estimates.astype(jnp.float32)
        weights = {path: _whole(state.diagonal[path]) for path in errors}
        weights = _clamped(weights, largest, relative)
        if relative:
            unit = _mean(weights)
            weights = {p: jnp.minimum(h, largest * unit) for p, h in weights.items()}
        found, quantizers = {}, step.quantizers
        for path, error in errors.items():
            h = weights[path] / unit
            h = jnp.where(known & jnp.isfinite(h), h, 1.0).astype(error.dtype)
            found[path] = weighed(h, error, quantizers[path])
        return found

    return Curvature(init, update, weigh)


def weighed(weights: jax.Array, error: jax.Array, quantizer: Quantizer) -> jax.Array:
    """An error times weights that belong to the basis of its quantizer."""
    turned = back_from_basis(weights * in_basis(error, quantizer), quantizer)
    return turned * basis_factor(quantizer) ** 2


def _check(decay, period, start, largest):
    if not 0 <= decay < 1:
        raise ValueError(
            f"`decay` must be at least 0 and below 1; got {decay}. Use 0.99."
        )
    if period < 1:
        raise ValueError(f"`period` must be at least 1; got {period}. Use 10.")
    if start < 0:
        raise ValueError(f"`start` must not be negative; got {start}. Use 0.")
    if not largest > 1:
        raise ValueError(f"`largest` must be above 1; got {largest}. Use 100.")


_ROUNDS = 4


def _whole(kept):
    """The diagonal of what was kept of it."""
    if not isinstance(kept, Factors):
        return kept
    # Two negative means have no positive product.
    rows, columns = (jnp.maximum(means, 0) for means in kept)
    total = jnp.mean(columns, -1)[..., None, None]
    product = rows[..., :, None] * columns[..., None, :]
    return product / jnp.where(total == 0, 1, total)


def _clamped(diagonals, largest, relative):
    found = {path: jnp.maximum(h, 0) for path, h in diagonals.items()}
    if not relative:
        return {
            path: jnp.minimum(h, largest * jnp.mean(h)) for path, h in found.items()
        }
    # What is clamped lowers the mean, by which what is largest would grow again.
    for _ in range(_ROUNDS):
        most = largest * _mean(found)
        found = {path: jnp.minimum(h, most) for path, h in found.items()}
    return found


def _mean(arrays):
    """That of all entries of all arrays."""
    sums = [jnp.sum(x, dtype=jnp.float32) for x in arrays.values()]
    return sum(sums, start=jnp.float32(0)) / max(_entries(arrays), 1)


def _share_changed(before, after):
    differs = {path: before[path] != x for path, x in after.items()}
    return _mean(differs)


def _entries(arrays):
    return sum(x.size for x in arrays.values())


def fisher(examples: int = 1, *, sampled: bool = False, **options: Any) -> Curvature:
    """The diagonal of the Fisher information, from squares of gradients.

    Args:
      examples: that a gradient is the mean of. Squares of the mean are that much
        smaller than the mean of squares, as far as gradients are noise.
      sampled: False for the empirical one, of the gradients at hand. True for gradients
        at labels drawn from the model's own predictions, which `update` is given as
        `sampled_gradients`, a tree like the parameters.
      **options: as of `diagonal`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import curvature
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> source = curvature.fisher(examples=64, relative=True)
      >>> tx = cage.cage_adamw(1e-3, rules, 10.0, curvature=source)

    Source: Amari 1998; the empirical one is what Adam's second moment averages.
    """
    if examples < 1:
        raise ValueError(f"`examples` must be at least 1; got {examples}. Use 1.")

    def estimate(step, key):
        del key
        gradients, quantizers = step.gradients, step.quantizers
        if sampled:
            tree = step.extra("sampled_gradients", "those at labels of the model")
            gradients = step.by_path(tree)
        return {
            path: examples * jnp.square(_turned(g, quantizers[path]))
            for path, g in gradients.items()
        }

    return diagonal(estimate, **options)


def second_moment(b2: float = 0.999, *, relative: bool = False) -> Curvature:
    """The root of Adam's second moment, which the optimizer keeps anyway.

    Read from the state of the inner optimizer of `decoupled`, `post_step` or
    `cage_adamw`; nothing is kept besides, and nothing rotated.

    Args:
      b2: that of the optimizer, to debias the moment.
      relative: as of `diagonal`.

    Raises:
      ValueError: in `update`, where the optimizer has no second moment.
    """

    def function(errors, step):
        adam = _adam_state(step.inner_state)
        found = {}
        for path, v in step.by_path(adam.nu).items():
            found[path] = jnp.sqrt(v / (1 - b2 ** adam.count.astype(v.dtype)))
        unit = _mean(found) if relative else 1
        weights = {path: h / unit for path, h in found.items()}
        return {
            path: jnp.where(jnp.isfinite(h), h, 1).astype(errors[path].dtype)
            * errors[path]
            for path, h in weights.items()
            if path in errors
        }

    return weighted(function)


def _adam_state(inner_state):
    def is_adam(part):
        return isinstance(part, optax.ScaleByAdamState)

    states = jax.tree.leaves(inner_state, is_leaf=is_adam)
    states = [state for state in states if is_adam(state)]
    if len(states) != 1:
        raise ValueError(
            f"`curvature` second_moment() must follow one optimizer with Adam's second "
            f"moment; got {len(states)}. Use it in cage_adamw(...), or in "
            f"decoupled(optax.adamw(lr), ...)."
        )
    return states[0]


def hutchinson(**options: Any) -> Curvature:
    """The diagonal of the Hessian, from products with random signs.

    E[z * H z] is the diagonal of H. `update` needs `obj_fn`, the loss as a function of
    the parameters, through `fake_quant`: two gradients at a time, for each estimate.

    Args:
      **options: as of `diagonal`; `period=10` where two more gradients are too much.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from cage_jax import curvature
      >>> rules = cage.Rules([(r"w", cage.int4())])
      >>> source = curvature.hutchinson(decay=0.9)
      >>> tx = optax.chain(cage.cage(rules, 1.0, curvature=source), optax.sgd(0.1))
      >>> def loss(params):
      ...     w = cage.fake_quant(params, rules)["w"]
      ...     return jnp.sum(jnp.array([[1.0], [4.0]]) * (w - 0.3) ** 2)
      >>> params = {"w": jnp.array([[0.7], [0.2]])}
      >>> state = tx.init(params)
      >>> gradient = jax.grad(loss)(params)
      >>> updates, state = tx.update(gradient, state, params, obj_fn=loss)
      >>> h = optax.tree_utils.tree_get(state, "diagonal")["w"]
      >>> [round(float(each) / (1 - 0.9), 4) for each in h.ravel()]
      [2.0, 8.0]

    Source: Hutchinson 1990; Bekas et al. 2007; for optimizers AdaHessian, arXiv
    2006.00719.
    """

    def product(step, z):
        loss = _loss_of(step)
        return _hessian_times(loss, step, z)

    return diagonal(functools.partial(_probed, product), **options)


def gauss_newton(**options: Any) -> Curvature:
    """The diagonal of the Gauss-Newton matrix, from products with random signs.

    That is `J^T L J`, `J` the Jacobian of the model's outputs and `L` the Hessian of
    the loss in them: the part of the Hessian that is never negative where the loss is
    convex in the outputs. `update` needs `outputs_fn`, from parameters through
    `fake_quant` to outputs, and `outputs_loss_fn`, from these to the loss.

    Args:
      **options: as of `diagonal`.

    Source: Schraudolph 2002; Martens 2010.
    """

    def product(step, z):
        outputs = step.extra(
            "outputs_fn", "the outputs as a function of the parameters"
        )
        loss = step.extra("outputs_loss_fn", "the loss as a function of the outputs")
        return _gauss_newton_times(outputs, loss, step, z)

    return diagonal(functools.partial(_probed, product), **options)


def hessian() -> Curvature:
    """The exact product `H e`, by two gradients at a time, without a state.

    `update` needs `obj_fn` as `hutchinson` does. Where H is not positive the pull is
    away from the grid: for quadratics and convex losses.
    """

    def product(errors, step):
        loss = _loss_of(step)
        return _hessian_times(loss, step, errors)

    return weighted(product)


class KroneckerState(NamedTuple):
    """Averages of two factors of each matrix.

    Attributes:
      steps: done, int32.
      estimates: that are averaged, int32.
      left: by path, of G G^T, (..., rows, rows).
      right: of G^T G, (..., columns, columns).
    """

    steps: jax.Array
    estimates: jax.Array
    left: dict[str, jax.Array]
    right: dict[str, jax.Array]


def kronecker(examples: int = 1, *, decay: float = 0.99, period: int = 1) -> Curvature:
    """The Fisher information as a Kronecker product: `L e R` of each matrix.

    `L = E[G G^T]` and `R = E[G^T G] / E[|G|^2]` of gradients G. In float32 they need
    4 (rows^2 + columns^2) bytes for each matrix, the last two axes of a parameter.

    Args:
      examples: as of `fisher`.
      decay: of the exponential averages.
      period: how many steps go by from one estimate to the next one.

    Raises:
      ValueError: for numbers out of range, and by `init` for vectors.

    Source: the factors of Shampoo, arXiv 1802.09568, as an estimate of the Fisher
    information like K-FAC's, arXiv 1503.05671.
    """
    _check(decay, period, 0, 2)
    if examples < 1:
        raise ValueError(f"`examples` must be at least 1; got {examples}. Use 1.")

    def init(params):
        for path, x in params.items():
            if x.ndim < 2:
                raise ValueError(
                    f"`{path}`: a parameter must have two axes or more for Kronecker "
                    f"factors; got shape {x.shape}. Use fisher() for such parameters."
                )
        left, right = (
            {
                path: jnp.zeros((*x.shape[:-2], x.shape[axis], x.shape[axis]))
                for path, x in params.items()
            }
            for axis in (-2, -1)
        )
        # An array of its own each, for a state that is donated.
        steps, estimates = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return KroneckerState(steps, estimates, left, right)

    def update(state, step):
        def averaged():
            left: dict[str, jax.Array] = {}
            right: dict[str, jax.Array] = {}
            for path, gradient in step.gradients.items():
                g = gradient.astype(jnp.float32)
                for factors, before, product in (
                    (left, state.left, jnp.einsum("...ij,...kj->...ik", g, g)),
                    (right, state.right, jnp.einsum("...ji,...jk->...ik", g, g)),
                ):
                    factors[path] = decay * before[path] + (1 - decay) * product
            return state.estimates + 1, left, right

        def kept():
            return state.estimates, state.left, state.right

        due = state.steps % period == 0
        found = averaged() if period == 1 else lax.cond(due, averaged, kept)
        return KroneckerState(state.steps + 1, *found)

    def weigh(errors, state, step):
        del step
        debias = 1 - decay ** state.estimates.astype(jnp.float32)
        found = {}
        for path, e in errors.items():
            left, right = state.left[path], state.right[path]
            norm = jnp.trace(left, axis1=-2, axis2=-1)[..., None, None]
            both = jnp.einsum(
                "...ij,...jk,...kl->...il", left, e.astype(jnp.float32), right
            )
            weight = examples / jnp.where(norm == 0, 1, norm) / debias
            found[path] = (both * weight).astype(e.dtype)
        return found

    return Curvature(init, update, weigh)


def _loss_of(step):
    loss = step.extra("obj_fn", "the loss as a function of the parameters")
    rule = "`obj_fn` must be a function of the parameters alone, to one number"
    remedy = "Use obj_fn=lambda params: loss(params, batch)."
    if not callable(loss):
        raise TypeError(f"{rule}; got {type(loss).__name__}. {remedy}")
    try:
        value = jax.eval_shape(loss, step.params)
    except TypeError as error:
        raise TypeError(f"{rule}; it raised: {error}. {remedy}") from error
    if getattr(value, "shape", None) != ():
        got = getattr(value, "shape", type(value).__name__)
        raise TypeError(f"{rule}; got {got} from it. {remedy}")
    return loss


def _hessian_times(loss, step, vectors):
    """The Hessian of a loss times vectors by path, which are 0 elsewhere.

    By a gradient of a gradient: functions with a straight-through gradient have no
    forward derivative.
    """
    tree = step.with_paths(vectors)

    def along(params):
        return _inner(jax.grad(loss)(params), tree)

    return step.by_path(jax.grad(along)(step.params))


def _gauss_newton_times(outputs, loss, step, vectors):
    """`J^T L J` times vectors by path, as in `gauss_newton`."""
    found, back = jax.vjp(outputs, step.params)
    tree = step.with_paths(vectors)

    def along(cotangent):
        (gradient,) = back(cotangent)
        return _inner(gradient, tree)

    # Linear in the cotangent, so that its gradient is J v, wherever that is taken.
    tangents = jax.grad(along)(jax.tree.map(jnp.zeros_like, found))
    _, curved = jax.jvp(jax.grad(loss), (found,), (tangents,))
    return step.by_path(back(curved)[0])


def _inner(one, other):
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)
    return sum(jax.tree.leaves(products))


def _probed(product, step, key):
    """Z * (H z) of random signs z, in the basis of the quantizers."""
    signs, vectors, quantizers = {}, {}, step.quantizers
    for i, (path, g) in enumerate(step.gradients.items()):
        quantizer, own = quantizers[path], jax.random.fold_in(key, i)
        signs[path] = jax.random.rademacher(own, g.shape, jnp.float32)
        back = back_from_basis(signs[path], quantizer)
        vectors[path] = back * basis_factor(quantizer)
    products = product(step, vectors)
    return {
        path: z * _turned(products[path], quantizers[path]) for path, z in signs.items()
    }


def _turned(x, quantizer):
    """`x` in the basis of its quantizer, float32 or wider."""
    return in_basis(x, quantizer) * basis_factor(quantizer)
