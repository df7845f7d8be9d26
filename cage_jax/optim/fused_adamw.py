"""The whole step of AdamW with CAGE in one pass over each parameter.

A transformation returns updates for `optax.apply_updates` to add, so the updates are
written and read once more. A kernel that writes the moments and the parameter in place
moves as little memory as possible, but is not a transformation. So it is a method
beside `update`, with the same state.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.dispatch import (
    Implementation,
    check_implementation,
    dispatch,
    error_without_kernel,
    no_kernel,
)
from cage_jax.arrays.paths import flatten_with_paths, nodes_of_type
from cage_jax.arrays.sharding import shards_of
from cage_jax.core.grids import grid_at
from cage_jax.core.rules import Rules
from cage_jax.optim.correction import (
    CageState,
    FirstState,
    Fused,
    check_parts,
    reductions_if,
)
from cage_jax.optim.curvature.source import Curvature, step_source
from cage_jax.optim.schedules import ScalarOrSchedule, value_at
from cage_jax.optim.statistics import ParameterStatistics, parameter_statistics
from cage_jax.pallas.candidates import adamw_kernels
from cage_jax.quantizers.rounding import error_elementwise

_DTYPES = {jnp.dtype("float32"), jnp.dtype("bfloat16")}


@dataclasses.dataclass(frozen=True)
class FusedOptions:
    """Options of an optimizer that its fused step needs.

    Attributes:
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule.
      learning_rate: a number or a schedule.
      adamw: AdamW's other numbers, or None if an option has no fused form.
      mask: which parameters decay, as in `optax.adamw`.
      at_updated: whether the error is taken at the updated weights, as in `post_step`.
      curvature: the source that weights the error, or None.
      first: the first state of the correction.
    """

    rules: Rules
    strength: ScalarOrSchedule
    learning_rate: ScalarOrSchedule
    adamw: AdamW | None
    mask: Any | Callable | None
    at_updated: bool
    curvature: Curvature | None
    first: FirstState


class FusedAdamW(optax.GradientTransformationExtraArgs):
    """`cage_adamw`: a transformation that can also step in place."""

    options: FusedOptions

    def fused_step(
        self,
        gradients: Any,
        state: Any,
        params: Any,
        *,
        implementation: Implementation | None = None,
    ) -> tuple[Any, Any]:
        """Computes `update` and `optax.apply_updates` in one, in place if donated.

        Donate parameters and state in the order in which your step returns them, as in
        `train_step(params, state, ...) -> (params, state, ...)`. JAX assigns donated
        memory to the results in that order, and arrays that are crossed have to be
        copied. Donated arrays are gone: JAX raises an error if the parameters or the
        state from before the step are used again.

        The state is that of `update`, and each can go on from the other's. Their
        results agree except in the last places. Each large quantized parameter is one
        kernel where there is a faster one (see `tune`), if it is on one device, inside
        of a `shard_map`, or on shards of whole groups that are explicit or that
        `Rules.placed` was told. The kernel reads the gradient, moments and values once
        and writes the moments and values once. With `statistics` it measures in every
        step, whatever the period. Everything else is computed as in `update`. The
        following have no fused form and fall back to `update`: `nesterov`,
        `freeze_scale` and a weight decay that is an array; a `curvature` other than the
        recommended one or `fisher(factored=True)`, or with `statistics`; parameters
        other than float32 and bfloat16, and gradients and second moments of another
        dtype; scales of a whole tensor; quantizers for which `fake_quant` has no
        kernel; and, with `statistics`, formats other than integers and mid-rise ones.

        Args:
          gradients: a tree like `params`.
          state: the state that `init` or the previous step returned.
          params: the parameters.
          implementation: as in `fake_quant`; "pallas" requires a kernel for each
            quantized parameter.

        Returns:
          The parameters and the state after the step.

        Raises:
          ValueError: for a state of another transformation, and for "pallas" if a
            parameter has no kernel.

        Example:
          >>> import cage_jax as cage
          >>> import jax
          >>> rules = cage.Rules([(r".*kernel", cage.int4())])
          >>> tx = cage.cage_adamw(1e-3, rules, strength=cage.silence_then_ramp(1000))
          >>> def train_step(params, state, gradients):
          ...     return tx.fused_step(gradients, state, params)
          >>> step = jax.jit(train_step, donate_argnums=(0, 1))
        """
        check_implementation(implementation)
        _check_state(state)
        check_parts(state[1], self.options.first, params)
        kernel_steps = _kernel_steps(
            self.options, gradients, state, params, implementation
        )
        return _step(kernel_steps, self, gradients, state, params)


def with_fused_step(
    transformation: optax.GradientTransformationExtraArgs, options: FusedOptions
) -> FusedAdamW:
    """Adds a fused step to the transformation that has these options."""
    # Optax's chains take named tuples of two functions, so the options lie beside them.
    found = FusedAdamW(*transformation)
    found.options = options
    return found


def _step(kernel_steps, tx, gradients, state, params):
    """Steps parameters with kernels by these, and all others by `tx.update`."""
    (adam, *others), cage_state = state
    statistics = cage_state.statistics
    paths, _, structure = flatten_with_paths(params)

    def replace(tree, new):
        """Puts `new`, by path, in the places of the parameters with kernels."""
        leaves = structure.flatten_up_to(tree)
        return structure.unflatten(map(new.get, paths, leaves))

    if not kernel_steps:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state
    numbers, curvature = _step_numbers(tx.options, state), tx.options.curvature
    step, source, weights = None, None, {}
    if curvature is not None:
        step, source = step_source(
            curvature,
            cage_state.curvature,
            tx.options.strength,
            cage_state.cage_count,
            *(gradients, params, tx.options.rules, state[0], {}),
        )
        weights = curvature.weights(source, step.quantized)
    trees = gradients, adam.mu, adam.nu, params
    arrays = dict(zip(paths, zip(*map(structure.flatten_up_to, trees))))
    stepped = {
        path: kernel_step(
            arrays[path],
            numbers,
            statistics and statistics.previous_codes[path],
            weights.get(path),
        )
        for path, kernel_step in kernel_steps.items()
    }
    measured = {}
    if statistics is not None:
        measured = {
            path: ParameterStatistics._make([*sums, codes])
            for path, (*_, codes, sums) in stepped.items()
        }
    gradients, mu, nu, params = (
        replace(tree, dict.fromkeys(stepped)) for tree in trees
    )
    rest = (adam._replace(mu=mu, nu=nu), *others), cage_state
    updates, ((adam, *others), cage_state) = tx.update(
        gradients, rest, params, fused=Fused(measured, step, source)
    )
    params = optax.apply_updates(params, updates)
    mu, nu, params = (
        replace(tree, {path: found[i] for path, found in stepped.items()})
        for i, tree in enumerate((adam.mu, adam.nu, params))
    )
    return params, ((adam._replace(mu=mu, nu=nu), *others), cage_state)


def _kernel_steps(options, gradients, state, params, implementation):
    """Returns the step of each parameter with kernels, by path."""
    (adam, *_), cage_state = state
    paths, _, structure = flatten_with_paths(params)
    trees = gradients, adam.mu, adam.nu, _decays(options.mask, params)
    others = dict(zip(paths, zip(*map(structure.flatten_up_to, trees))))
    steps = {}
    for path, (quantizer, x) in options.rules.quantized(params).items():
        if not path:  # a lone array leaves no others for `update`
            continue
        gradient, first, second, decays = others[path]
        placement = options.rules.placements.get(path)
        shards = shards_of(x, quantizer.blocks(x.shape).pieces, placement)
        grid = grid_at(path, params, None)
        arrays = gradient, first, second, x
        if why := _why_not_fused(options, cage_state, arrays, grid, shards):
            kernels = no_kernel(why)
        else:
            decay = options.adamw.weight_decay if decays else 0.0
            adamw = dataclasses.replace(options.adamw, weight_decay=decay)
            kernels = adamw_kernels(
                quantizer,
                x.shape if shards is None else shards.shape,
                x.dtype,
                first.dtype,
                adamw,
                at_updated=options.at_updated,
                measured=cage_state.statistics is not None,
                weighted=options.curvature is not None,
            )
        if kernels.found:
            step = partial(
                dispatch,
                partial(_step_without_kernel, quantizer, adamw, options.at_updated),
                kernels,
                implementation=implementation,
                path=path,
            )
            steps[path] = partial(_step_on_shards, step, shards)
        elif implementation == "pallas":
            raise error_without_kernel(kernels, path)
    return steps


def _why_not_fused(options, cage_state, arrays, grid, shards):
    """Says why a step has no fused form, whatever the quantizer, or returns None."""
    (gradient, _, second, x), curvature = arrays, options.curvature
    dtypes = {gradient.dtype, second.dtype, x.dtype}
    specs = {jax.typeof(array).sharding.spec for array in arrays}
    reasons = {
        "`nesterov`, or a weight decay in an array,": options.adamw is None,
        "`freeze_scale`": cage_state.grids is not None,
        "`curvature`": curvature is not None and curvature.weights is None,
        "`curvature` with `statistics`": None not in (curvature, cage_state.statistics),
        "a learned grid": grid is not None,
        "a dtype other than float32 or bfloat16": not dtypes <= _DTYPES,
        "a gradient or second moment of another dtype": len(dtypes) > 1,
        "a moment or gradient on other shards": shards is not None and len(specs) > 1,
    }
    found = [what for what, is_so in reasons.items() if is_so]
    return f"{found[0]} has no fused form" if found else None


def _step_on_shards(step, shards, arrays, numbers, codes, weights):
    """Runs `step`, on each device for its own part if there are shards."""
    _, first, _, x = arrays
    numbers = numbers.rounded(Dtypes(x.dtype, first.dtype))
    if shards is None:
        return step(*arrays, numbers, codes, weights)

    def local(arrays, numbers, codes, weights):
        found = step(*arrays, numbers, codes, weights)
        if codes is None:
            return found
        *after, sums = found
        return *after, lax.psum(sums, jax.tree.leaves(tuple(shards.spec)))

    spec = shards.spec

    def spec_of(factor):
        return P(*(name if n > 1 else None for name, n in zip(spec, factor.shape)))

    specs = jax.tree.map(spec_of, weights)
    weights = jax.tree.map(shards.place, weights, specs)
    return jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(spec, P(), spec, specs),
        out_specs=(spec,) * 3 if codes is None else (*(spec,) * 4, P()),
    )(arrays, numbers, codes, weights)


def _decays(mask, params):
    """Returns a tree like the parameters that says which of them decay."""
    mask = mask(params) if callable(mask) else mask
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, params)


def _step_numbers(options, state):
    (adam, *others), cage_state = state
    cage_count = cage_state.cage_count
    schedules = nodes_of_type(others, optax.ScaleByScheduleState)
    count = schedules[0].count if schedules else cage_count
    rate = value_at(options.learning_rate, count)
    strength = value_at(options.strength, cage_count)
    pulled = optax.safe_increment(cage_count) if options.at_updated else cage_count
    steps = optax.safe_increment(adam.count)
    numbers = (
        rate,
        -value_at(options.learning_rate, pulled) * strength,
        1 - options.adamw.b1**steps,
        1 - options.adamw.b2**steps,
    )
    return StepNumbers(*(jnp.asarray(number, jnp.float32) for number in numbers))


def _check_state(state):
    if not (
        isinstance(state, tuple)
        and len(state) == 2
        and isinstance(state[1], CageState)
        and isinstance(state[0], tuple)
        and isinstance(state[0][0], optax.ScaleByAdamState)
    ):
        raise ValueError(
            f"`state` must come from this optimizer; got a {type(state).__name__} from "
            f"another. Use tx.init(params) or the state after the last step; the state "
            f"of a chain has one entry for each of its transformations."
        )


def _step_without_kernel(
    quantizer, adamw, at_updated, gradient, first, second, x, numbers, codes, weights
):
    """Computes the step of `pallas.tpu.adamw_step` without a kernel."""
    dtypes = Dtypes(x.dtype, first.dtype)
    *moments, update = adamw.step(gradient, first, second, x, numbers, dtypes)
    wide = x.astype(update.dtype)
    point = (wide + update).astype(x.dtype).astype(wide.dtype) if at_updated else wide
    # Compilers do not know the pull, so they keep the condition on it.
    pulls = numbers.pull != 0
    measured = codes is not None
    is_pulling, reductions = reductions_if(
        pulls | measured, point, quantizer, None, with_codes=measured
    )
    error = error_elementwise(point, quantizer, reductions)
    if weights is not None:
        error = weights.product() * error
    pull = numbers.pull * jnp.where(is_pulling & pulls, error, 0)
    after = *moments, wide + (update + pull)
    after = tuple(a.astype(old.dtype) for a, old in zip(after, (first, second, x)))
    if codes is None:
        return after
    _, (*sums, codes) = parameter_statistics(
        True, quantizer, point, update, reductions, codes
    )
    return *after, codes, jnp.stack(sums)
