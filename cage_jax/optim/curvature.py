"""Sources of the loss's curvature, which weights the correction.

`lambda e` pulls all weights equally, though moving one weight to the grid costs far
more than moving another. With the Hessian `H`, the pull that undoes the effect of
rounding on the gradient is `H e`, with strength 1 and nothing to tune. The sources here
range from squares of the gradients to the exact product. Pass one to a correction as
`curvature=`.

A source is three functions, where an Optax optimizer is two. Estimates of a diagonal
are kept by path, in float32. They have the shape of the parameter (and so its
sharding), or that of its rows and columns. They belong to the basis in which the
parameter is quantized: with a rotation, to the rotated weights.
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
    """The inputs of a source at one step.

    Attributes:
      tree: the tree of gradients that the optimizer is given.
      params: the parameters at which the gradients were taken.
      rules: which parameters are quantized, and how.
      inner_state: the state of the optimizer before the correction, or None.
      extra_args: the other arguments of `update`, such as `obj_fn`.
    """

    tree: Any
    params: Any
    rules: Rules
    inner_state: Any
    extra_args: dict[str, Any]

    @property
    def gradients(self) -> dict[str, jax.Array]:
        """Gradients of the quantized parameters, by path."""
        return self.by_path(self.tree)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Quantizers of the quantized parameters, by path."""
        quantized = self.rules.quantized(self.params)
        return {path: quantizer for path, (quantizer, _) in quantized.items()}

    def by_path(self, tree: Any) -> dict[str, jax.Array]:
        """Returns the leaves of `tree` at the paths of the quantized parameters."""
        found = {}

        def collect(path, quantizer, x, leaf):
            if leaf is not None:
                found[path] = leaf
            return leaf

        self.rules.map(collect, self.params, tree)
        return found

    def with_paths(self, arrays: Mapping[str, jax.Array]) -> Any:
        """Returns a tree like the parameters: `arrays` by path, zeros elsewhere."""
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        return self.rules.map(
            lambda path, quantizer, x, zero: (
                arrays[path].astype(x.dtype) if path in arrays else zero
            ),
            self.params,
            zeros,
        )

    def extra(self, name: str, what: str) -> Any:
        """Returns one of the extra arguments.

        Raises:
          ValueError: if it was not given.
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
      init: maps arrays by path to the state of the source.
      update: maps the state and a `Step` to the next state, once a step.
      weigh: maps errors by path, the state and the `Step` to weighted errors, along
        which the weights are pulled.
    """

    init: Callable[[dict[str, jax.Array]], Any]
    update: Callable[[Any, Step], Any]
    weigh: Callable[[dict[str, jax.Array], Any, Step], dict[str, jax.Array]]


class Factors(NamedTuple):
    """Row and column means of a diagonal.

    The diagonal is taken to be their outer product, divided by the mean of either.

    Attributes:
      rows: the means of rows, of shape (..., rows).
      columns: the means of columns, of shape (..., columns).
    """

    rows: jax.Array
    columns: jax.Array


class DiagonalState(NamedTuple):
    """An average of estimates of the diagonal.

    Attributes:
      steps: the number of steps done, int32.
      estimates: the number of estimates averaged, int32.
      diagonal: the average of the estimates by path, before it is debiased.
      clamped: the fraction of the last average that was negative or too large.
    """

    steps: jax.Array
    estimates: jax.Array
    diagonal: dict[str, jax.Array | Factors]
    clamped: jax.Array


def weighted(function: Callable[[Arrays, Step], dict[str, jax.Array]]) -> Curvature:
    """Creates a source without a state, which weights errors by `function`.

    Args:
      function: maps errors by path, float32 or wider, and a `Step` to weighted errors,
        along which the weights are pulled.

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
    """Creates a source from estimates of the diagonal, averaged over steps.

    Args:
      estimate: maps a `Step` and a key to estimates by path, in the basis of the
        quantizers.
      decay: the decay of the exponential average, which is debiased.
      period: the number of steps from one estimate to the next.
      start: the step of the first estimate; before it errors are not weighted.
      relative: weight by `h / mean(h)`, with the mean over all quantized weights. The
        total pull stays the same and moves to where the curvature is.
      factored: keep only the row and column means of the estimates (over the last two
        axes), which are far less noisy. Vectors are kept whole.
      largest: the upper bound of an entry of `h`, as a multiple of the mean: the mean
        of its parameter, or of all parameters if `relative`. In that case it is the
        mean of the clamped entries, and if a few entries have nearly all the curvature
        the total pull is smaller. Negative entries count as 0. `clamped` in the state
        is the fraction of entries that were changed.
      seed: the seed of the keys.

    Returns:
      A source with a `DiagonalState`: 4 bytes for each quantized weight, or for each
      row and each column if `factored`.

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
        # One overflow must not stay in the average forever.
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
        # Before the first estimate nothing is known, so errors are not weighted.
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
    """Multiplies an error by weights given in the basis of its quantizer."""
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
    """Returns the diagonal, from its factors if only these were kept."""
    if not isinstance(kept, Factors):
        return kept
    # Otherwise two negative means would have a positive product.
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
    # Clamping lowers the mean, so that the largest entries exceed the bound again.
    for _ in range(_ROUNDS):
        most = largest * _mean(found)
        found = {path: jnp.minimum(h, most) for path, h in found.items()}
    return found


def _mean(arrays):
    """Returns the mean of all entries of all arrays."""
    sums = [jnp.sum(x, dtype=jnp.float32) for x in arrays.values()]
    return sum(sums, start=jnp.float32(0)) / max(_entries(arrays), 1)


def _share_changed(before, after):
    differs = {path: before[path] != x for path, x in after.items()}
    return _mean(differs)


def _entries(arrays):
    return sum(x.size for x in arrays.values())


def fisher(examples: int = 1, *, sampled: bool = False, **options: Any) -> Curvature:
    """Weights errors by the diagonal of the Fisher information, from squared gradients.

    Args:
      examples: the number of examples that a gradient is the mean of. As far as
        gradients are noise, the square of the mean is smaller than the mean of squares
        by this factor.
      sampled: False for the empirical Fisher information, from the gradients that the
        optimizer is given. True for gradients at labels drawn from the model's own
        predictions, given to `update` as `sampled_gradients`, a tree like the
        parameters.
      **options: as in `diagonal`.

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
    """Weights errors by the root of Adam's second moment.

    The moment is one that the optimizer keeps anyway. It is read from the state of the
    inner optimizer of `decoupled`, `post_step` or `cage_adamw`. Nothing else is kept,
    and nothing is rotated.

    Args:
      b2: the optimizer's decay of the moment, to debias it.
      relative: as in `diagonal`.

    Raises:
      ValueError: in `update`, if the optimizer has no second moment.
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
    """Weights errors by the diagonal of the Hessian, from products with random signs.

    For random signs z, E[z * H z] is the diagonal of H. `update` needs `obj_fn`, the
    loss as a function of the parameters, through `fake_quant`. Each estimate takes two
    gradients.

    Args:
      **options: as in `diagonal`; use `period=10` if two more gradients cost too much.

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

    Source: Hutchinson 1990; Bekas et al. 2007; in optimizers, AdaHessian, arXiv
    2006.00719.
    """

    def product(step, z):
        loss = _loss_of(step)
        return _hessian_times(loss, step, z)

    return diagonal(functools.partial(_probed, product), **options)


def gauss_newton(**options: Any) -> Curvature:
    """Weights errors by the diagonal of the Gauss-Newton matrix.

    The matrix is `J^T L J`, with `J` the Jacobian of the model's outputs and `L` the
    Hessian of the loss with respect to them. It is the part of the Hessian that is
    never negative if the loss is convex in the outputs. The diagonal is estimated from
    products with random signs. `update` needs `outputs_fn`, which maps parameters,
    through `fake_quant`, to outputs, and `outputs_loss_fn`, which maps these to the
    loss.

    Args:
      **options: as in `diagonal`.

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
    """Weights errors by the exact Hessian: pulls along `H e`, without a state.

    `update` needs `obj_fn`, as with `hutchinson`, and takes two gradients. Where H is
    not positive the pull is away from the grid, so use it for quadratics and convex
    losses.
    """

    def product(errors, step):
        loss = _loss_of(step)
        return _hessian_times(loss, step, errors)

    return weighted(product)


class KroneckerState(NamedTuple):
    """Averages of the two factors of each matrix.

    Attributes:
      steps: the number of steps done, int32.
      estimates: the number of estimates averaged, int32.
      left: the averages of G G^T by path, of shape (..., rows, rows).
      right: the averages of G^T G by path, of shape (..., columns, columns).
    """

    steps: jax.Array
    estimates: jax.Array
    left: dict[str, jax.Array]
    right: dict[str, jax.Array]


def kronecker(examples: int = 1, *, decay: float = 0.99, period: int = 1) -> Curvature:
    """Weights errors by the Fisher information as a Kronecker product.

    Each matrix is pulled along `L e R`, with `L = E[G G^T]` and
    `R = E[G^T G] / E[|G|^2]` for gradients G. In float32 the factors take
    4 (rows^2 + columns^2) bytes for each matrix, the last two axes of a parameter.

    Args:
      examples: as in `fisher`.
      decay: the decay of the exponential averages.
      period: the number of steps from one estimate to the next.

    Raises:
      ValueError: for numbers out of range, and in `init` for vectors.

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
        # Two arrays: a state that is donated must not have one of them twice.
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
    """Multiplies the Hessian of a loss by vectors by path, which are 0 elsewhere.

    It takes the gradient of a gradient, since functions with a straight-through
    gradient have no forward-mode derivative.
    """
    tree = step.with_paths(vectors)

    def along(params):
        return _inner(jax.grad(loss)(params), tree)

    return step.by_path(jax.grad(along)(step.params))


def _gauss_newton_times(outputs, loss, step, vectors):
    """Multiplies `J^T L J` by vectors by path, as in `gauss_newton`."""
    found, back = jax.vjp(outputs, step.params)
    tree = step.with_paths(vectors)

    def along(cotangent):
        (gradient,) = back(cotangent)
        return _inner(gradient, tree)

    # `along` is linear in the cotangent, so its gradient is J v at any point.
    tangents = jax.grad(along)(jax.tree.map(jnp.zeros_like, found))
    _, curved = jax.jvp(jax.grad(loss), (found,), (tangents,))
    return step.by_path(back(curved)[0])


def _inner(one, other):
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)
    return sum(jax.tree.leaves(products))


def _probed(product, step, key):
    """Returns z * (H z) for random signs z, in the basis of the quantizers."""
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
    """Returns `x` in the basis of its quantizer, float32 or wider."""
    return in_basis(x, quantizer) * basis_factor(quantizer)
