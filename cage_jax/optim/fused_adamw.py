"""The whole step of AdamW with CAGE in one pass over each parameter.

A transformation returns updates for `optax.apply_updates` to add, so the updates are
written and read once more. A kernel that writes the moments and the parameter in place
moves as little memory as possible, but is not a transformation. So it is a method
beside `update`, with the same state.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from cage_jax.arrays.adamw import AdamW, StepNumbers
from cage_jax.arrays.dispatch import (
    Implementation,
    Variants,
    check_implementation,
    dispatch,
)
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.arrays.sharding import Shards, shards_of
from cage_jax.core.quantize import grid_at
from cage_jax.core.rules import Rules
from cage_jax.optim.placements import CageState, fit_if
from cage_jax.optim.schedules import ScalarOrSchedule, value_at
from cage_jax.optim.statistics import Seen, seen
from cage_jax.pallas.choice import adamw_step
from cage_jax.quantizers.rounding import error_elementwise


@dataclasses.dataclass(frozen=True)
class FusedStep:
    """Options of an optimizer that its fused step needs.

    Attributes:
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule.
      learning_rate: a number or a schedule.
      adamw: AdamW's other numbers, or None if an option has no fused form.
      mask: which parameters decay, as in `optax.adamw`.
      at_updated: whether the error is taken at the updated weights, as in `post_step`.
    """

    rules: Rules
    strength: ScalarOrSchedule
    learning_rate: ScalarOrSchedule
    adamw: AdamW | None
    mask: Any | Callable | None
    at_updated: bool


class FusedAdamW(optax.GradientTransformationExtraArgs):
    """`cage_adamw`: a transformation that can also step in place."""

    _fused: FusedStep

    def __new__(
        cls, transformation: optax.GradientTransformationExtraArgs, fused: FusedStep
    ) -> "FusedAdamW":
        """Adds the options of the fused step to a transformation."""
        self = super().__new__(cls, transformation.init, transformation.update)
        self._fused = fused
        return self

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
        results agree except in the last places. On a TPU, each large quantized
        parameter is one kernel if it is on one device, inside of a `shard_map`, or on
        explicit shards of whole groups. The kernel reads the gradient, moments and
        values once and writes the moments and values once. Everything else is computed
        as in `update`. The following have no fused form and fall back to `update`:
        `nesterov`, `freeze_scale`, `curvature` and a weight decay that is an array;
        parameters, gradients and second moments other than float32; scales of a whole
        tensor; quantizers for which `fake_quant` has no kernel; and, with `statistics`,
        formats other than integers and mid-rise ones.

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
          >>> tx = cage.cage_adamw(1e-3, rules, cage.silence_then_ramp(1000))
          >>> def train_step(params, state, gradients):
          ...     return tx.fused_step(gradients, state, params)
          >>> step = jax.jit(train_step, donate_argnums=(0, 1))
        """
        check_implementation(implementation)
        _check_state(state)
        return _step(self._fused, self.update, gradients, state, params, implementation)


def _step(fused, update, gradients, state, params, implementation):
    chosen = _chosen(fused, gradients, state, params, implementation)
    (adam, *others), cage_state = state
    paths, leaves, structure = flatten_with_paths(params)
    each = [structure.flatten_up_to(tree) for tree in (gradients, adam.mu, adam.nu)]
    after = {}
    if chosen:
        numbers = _numbers(fused, adam, others, cage_state)
        for place, one in chosen.items():
            arrays = *(tree[place] for tree in each), leaves[place]
            codes = None
            if cage_state.statistics is not None:
                codes = cage_state.statistics.previous_codes[paths[place]]
            after[place] = one.step(arrays, codes, numbers, implementation)

    def without(values):
        return structure.unflatten(
            [None if i in after else value for i, value in enumerate(values)]
        )

    gradient, first, second = map(without, each)
    rest = (adam._replace(mu=first, nu=second), *others), cage_state
    measured = {}
    if cage_state.statistics is not None:
        for place, (_, _, _, codes, sums) in after.items():
            measured[paths[place]] = Seen(sums[0], sums[1], sums[2], sums[3], codes)
    updates, ((adam, *others), cage_state) = update(
        gradient, rest, without(leaves), seen_elsewhere=measured
    )

    def merged(tree, which):
        parts = structure.flatten_up_to(tree)
        return structure.unflatten(
            [after[i][which] if i in after else part for i, part in enumerate(parts)]
        )

    applied = [
        None if part is None else optax.apply_updates(leaf, part)
        for leaf, part in zip(leaves, structure.flatten_up_to(updates))
    ]
    adam = adam._replace(mu=merged(adam.mu, 0), nu=merged(adam.nu, 1))
    params = merged(structure.unflatten(applied), 2)
    return params, ((adam, *others), cage_state)


class _Chosen(NamedTuple):
    """The step of a parameter that has kernels.

    Attributes:
      path: the parameter's path.
      default: the step without a kernel.
      kernels: the kernels for the part of the parameter that one device holds.
      shards: the shards, if each device steps its own; otherwise None.
    """

    path: str
    default: Callable
    kernels: Variants
    shards: Shards | None

    def step(self, arrays, codes, numbers, implementation):
        """Returns what `default` does for the gradient, moments, values and codes."""

        def local(arrays, codes, numbers):
            found = dispatch(
                self.default,
                self.kernels,
                *arrays,
                numbers,
                codes,
                implementation=implementation,
                path=self.path,
            )
            if self.shards is None or codes is None:
                return found
            *after, sums = found
            return *after, lax.psum(sums, jax.tree.leaves(tuple(self.shards.spec)))

        if self.shards is None:
            return local(arrays, codes, numbers)
        spec = self.shards.spec
        out = (spec,) * 3 if codes is None else (*(spec,) * 4, P())
        return jax.shard_map(
            local,
            mesh=self.shards.mesh,
            in_specs=(spec, spec, P()),
            out_specs=out,
        )(arrays, codes, numbers)


def _chosen(fused, gradients, state, params, implementation):
    """Returns a `_Chosen` for each parameter with kernels, by its leaf's index."""
    (adam, *_), cage_state = state
    quantized = fused.rules.quantized(params)
    paths, leaves, structure = flatten_with_paths(params)
    others = [structure.flatten_up_to(tree) for tree in (gradients, adam.mu, adam.nu)]
    decays = _decays(fused, params)
    chosen = {}
    for place, path in enumerate(paths):
        if path not in quantized or not path:  # a lone array leaves no others
            continue
        quantizer, x = quantized[path][0], leaves[place]
        gradient, first, second = (tree[place] for tree in others)
        shards = shards_of(x, quantizer.blocks(x.shape).pieces)
        kernels = Variants()
        if (
            cage_state.grids is None
            and cage_state.curvature is None
            and fused.adamw is not None
            and all(array.dtype == jnp.float32 for array in (gradient, second, x))
            and grid_at(path, params, None) is None
            and (shards is None or _alike(gradient, first, second, x))
        ):
            decay = fused.adamw.weight_decay if decays[place] else 0.0
            adamw = dataclasses.replace(fused.adamw, weight_decay=decay)
            kernels = adamw_step(
                quantizer,
                x.shape if shards is None else shards.shape,
                x.dtype,
                first.dtype,
                adamw,
                at_updated=fused.at_updated,
                measured=cage_state.statistics is not None,
            )
        if kernels.found:
            default = partial(_stepped, quantizer, adamw, fused.at_updated)
            chosen[place] = _Chosen(path, default, kernels, shards)
        elif implementation == "pallas":
            raise ValueError(
                f"`{path}`: `implementation` must be None or 'xla' where a parameter "
                f"has no kernel; got 'pallas', {quantizer}, {x.dtype}{list(x.shape)}. "
                f"Use None, for a kernel wherever there is one."
            )
    return chosen


def _alike(*arrays):
    """Returns whether all arrays have the same shards."""
    return len({jax.typeof(array).sharding.spec for array in arrays}) == 1


def _decays(fused, params):
    """Returns whether each leaf decays."""
    mask = fused.mask
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    mask = mask(params) if callable(mask) else mask
    spread = jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, params)
    return jax.tree.leaves(spread)


def _numbers(fused, adam, others, cage_state):
    schedules = [
        each for each in others if isinstance(each, optax.ScaleByScheduleState)
    ]
    count = schedules[0].count if schedules else cage_state.cage_count
    level = value_at(fused.strength, cage_state.cage_count)
    pulled = cage_state.cage_count
    if fused.at_updated:
        pulled = optax.safe_increment(pulled)
    steps = optax.safe_increment(adam.count)
    numbers = (
        value_at(fused.learning_rate, count),
        -value_at(fused.learning_rate, pulled) * level,
        1 - fused.adamw.b1**steps,
        1 - fused.adamw.b2**steps,
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
            f"`state` must be that of this optimizer; got {type(state).__name__} of "
            f"another. Use tx.init(params) or the state of a step before; a chain has "
            f"a state for each of its parts."
        )


def _stepped(quantizer, adamw, at_updated, gradient, first, second, x, numbers, codes):
    """Computes the step of `pallas.tpu.adamw_step` without a kernel."""
    first, second, update = adamw.step(gradient, first, second, x, numbers)
    point = x + update if at_updated else x
    # Compilers do not know the pull, so they keep the condition on it.
    active, reductions = fit_if(numbers.pull != 0, point, quantizer, None)
    error = error_elementwise(point, quantizer, reductions)
    pull = numbers.pull * jnp.where(active, error, 0)
    after = first, second, x + (update + pull)
    if codes is None:
        return after
    *sums, codes = seen(quantizer, point, update, None, codes)
    return *after, codes, jnp.stack(sums)
