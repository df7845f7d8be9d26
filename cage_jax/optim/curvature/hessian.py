"""The Hessian and the Gauss-Newton matrix, which are known by products with vectors."""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
from optax.tree_utils import tree_mul, tree_sum

from cage_jax.arrays.names import names_checked
from cage_jax.optim.curvature.diagonal import DiagonalOptions, diagonal
from cage_jax.optim.curvature.source import (
    Arrays,
    Curvature,
    Step,
    stateless_source,
)


def hutchinson(**options: Unpack[DiagonalOptions]) -> Curvature:
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
      >>> pull = cage.coupled(rules, strength=1.0, curvature=source)
      >>> tx = optax.chain(pull, optax.sgd(0.1))
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
    return probed_diagonal(_hessian_times, **options)


def gauss_newton(**options: Unpack[DiagonalOptions]) -> Curvature:
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
    return probed_diagonal(_gauss_newton_times, **options)


@names_checked
def hessian() -> Curvature:
    """Weights errors by the exact Hessian: pulls along `H e`, without a state.

    `update` needs `obj_fn`, as with `hutchinson`, and takes two gradients. Where H is
    not positive the pull is away from the grid, so use it for quadratics and convex
    losses.
    """
    return stateless_source(lambda errors, step: _hessian_times(step, errors))


def probed_diagonal(
    product: Callable[[Step, Arrays], Arrays], **options: Unpack[DiagonalOptions]
) -> Curvature:
    """Creates a source from products with random signs, as `hutchinson` does.

    Args:
      product: maps a `Step` and vectors by path to their product with a matrix.
      **options: as in `diagonal`.
    """

    def estimate(step, key):
        signs, bases, quantizers = {}, {}, step.quantizers
        for i, (path, g) in enumerate(step.gradients.items()):
            leaf_key = jax.random.fold_in(key, i)
            signs[path] = jax.random.rademacher(leaf_key, g.shape, jnp.float32)
            bases[path] = quantizers[path].basis(g.shape)
        vectors = {path: bases[path].unrotate(z) for path, z in signs.items()}
        products = product(step, vectors)
        return {
            path: z * bases[path].rotate(products[path]) for path, z in signs.items()
        }

    return diagonal(estimate, **options)


def _hessian_times(step: Step, vectors: Arrays) -> dict[str, jax.Array]:
    """Multiplies the Hessian of the loss by vectors by path, which are 0 elsewhere.

    It takes the gradient of a gradient, since functions with a straight-through
    gradient have no forward-mode derivative.
    """
    loss = step.extra("obj_fn", "the loss as a function of the parameters")
    _check_loss(loss, step.params)
    tree = step.with_paths(vectors)

    def along(params):
        return tree_sum(tree_mul(jax.grad(loss)(params), tree))

    return step.by_path(jax.grad(along)(step.params))


def _gauss_newton_times(step: Step, vectors: Arrays) -> dict[str, jax.Array]:
    outputs_fn = step.extra("outputs_fn", "the outputs as a function of the parameters")
    loss = step.extra("outputs_loss_fn", "the loss as a function of the outputs")
    outputs, back = jax.vjp(outputs_fn, step.params)
    tree = step.with_paths(vectors)

    def along(cotangent):
        (gradient,) = back(cotangent)
        return tree_sum(tree_mul(gradient, tree))

    # `along` is linear in the cotangent, so its gradient is J v at any point.
    tangents = jax.grad(along)(jax.tree.map(jnp.zeros_like, outputs))
    _, curved = jax.jvp(jax.grad(loss), (outputs,), (tangents,))
    return step.by_path(back(curved)[0])


def _check_loss(loss, params):
    rule = "`obj_fn` must be a function from the parameters alone to one number"
    remedy = "Use obj_fn=lambda params: loss(params, batch)."
    if not callable(loss):
        raise TypeError(f"{rule}; got {type(loss).__name__}. {remedy}")
    try:
        value = jax.eval_shape(loss, params)
    except TypeError as error:
        raise TypeError(f"{rule}; it raised: {error}. {remedy}") from error
    if getattr(value, "shape", None) != ():
        got = getattr(value, "shape", type(value).__name__)
        raise TypeError(f"{rule}; it returned {got}. {remedy}")
