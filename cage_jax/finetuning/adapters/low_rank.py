"""Low-rank adapters that are trained through the rounding of frozen weights."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_choice, check_int, check_number, is_traced
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, key_at, path_in_errors
from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.finetuning.adapters.frozen_weights import (
    Adapter,
    FrozenWeight,
    Scale,
    Units,
    is_codes,
    merged,
    trained_parts,
    weight,
)
from cage_jax.finetuning.adapters.stores import Store, stored
from cage_jax.program.tracing import split_grids
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import rounding
from cage_jax.quantizers.scale_types import of_the_size_of_weights


@names_checked
def low_rank(
    params: Any,
    rules: Rules,
    *,
    rank: int = 4,
    alpha: float | None = None,
    store: Store = "bfloat16",
    units: Units = "steps",
    scale: Scale = "output",
    key: jax.Array | None = None,
) -> tuple[dict[str, Adapter], Any]:
    """Freezes the weights that rules name, and gives each a low-rank adapter.

    A weight becomes `scale * clip(round(position + alpha / rank * (a @ b)))`, where the
    position `w / scale0` on the grid found in the weight at the start is frozen in few
    bits. As `b` starts at zero, the weights start as `fake_quant` gives them, to the
    bit. Rounding is to the nearest. A rotated weight is rounded in its basis.

    - LR-QAT: the defaults, or `store="int8"`.
    - L4Q: `units="weights", scale="grid"`.
    - DL-QAT, as its abstract tells it: `units="weights", store="float32"`.
    - QLoRA: parameters that are codes already, the result of `quantize`.

    Codes are taken as they are, and the product is added to their values, unrounded.

    Args:
      params: a tree of parameters, of any framework; or the result of `with_grids`,
        whose grids are then the start. Others than those that rules name are frozen.
      rules: which parameters are adapted, and their quantizers. The axes that share a
        scale are the rows of a matrix, axes before them a stack of matrices, and all
        others its columns, so that the kernel of a convolution with `axis=(0, 1, 2)` is
        one matrix.
      rank: at least 1, and at most the shorter side of each matrix.
      alpha: the product of `a` and `b` is multiplied by `alpha / rank`; None for
        `alpha = rank`.
      store: how positions are frozen. "int8" is fixed point with as many bits for
        fractions as the grid leaves, 4 for 4-bit integers, and clips beyond the grid.
        A position that would round to another code goes to the nearest number that does
        not.
      units: whether the product counts steps of the grid, in its basis, or is added to
        the weight itself.
      scale: "output" trains the scale that multiplies codes; "grid" trains it, as LSQ
        does, where it divides the weight too; None trains none. Scales of every type
        are trained in float32 and rounded to what is stored. An offset is trained with
        them, a zero point never.
      key: a `jax.random` key for `a`; None for that of 0.

    Returns:
      Two trees. The adapters, to be trained: by path a dict of `a` (stack..., rows...,
      rank), normal with variance `1 / rank` in steps and `1 / rows` in weights, and `b`
      (stack..., rank, columns...), zeros, both float32, and `scale` (and `offset`) as
      in the grid. And the frozen parameters, as the other functions take them.

    Raises:
      TypeError: for anything but `Rules`, and as in `fake_quant`.
      ValueError: for arguments out of range, rules that match nothing, a quantizer
        without codes, a store that is too coarse for the format, and weights that are
        not finite.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules, store="int8")
      >>> jax.tree.map(jnp.shape, adapters)
      {'kernel': {'a': (16, 4), 'b': (4, 8), 'scale': (1, 8)}}
      >>> start = cage.finetuning.weights(adapters, frozen)["kernel"]
      >>> bool((start == cage.fake_quant(params, rules)["kernel"]).all())
      True

    Source: LR-QAT, arXiv 2406.06385; L4Q, arXiv 2402.04902; DL-QAT, arXiv 2504.09223;
    QLoRA, arXiv 2305.14314.
    """
    check_rules(rules)
    check_int("rank", rank, "Use 4.", least=1)
    if alpha is not None:
        check_number("alpha", alpha, "Use None for the rank.", above=0)
    check_choice("store", store, get_args(Store))
    check_choice("units", units, get_args(Units))
    check_choice("scale", scale, ("output", "grid", None))
    key = jax.random.key(0) if key is None else key
    factor = 1.0 if alpha is None else alpha / rank
    params, grids = split_grids(params)
    shapes = jax.tree.map(_shape_of_codes, params, is_leaf=is_codes)
    adapters: dict[str, Adapter] = {}

    def freeze(path, quantizer, _, x):
        if is_codes(x):
            frozen = FrozenWeight(
                x, None, x.quantizer, x.dtype, factor, "weights", None
            )
        else:
            grid = grids.get(path)
            check_has_codes(quantizer, "low_rank")
            if not is_traced(x):
                check_finite({path: x}, "params")
            positions, grid = _frozen_parts(x, quantizer, grid, store)
            frozen = FrozenWeight(
                positions, grid, quantizer, x.dtype, factor, units, scale
            )
        adapters[path] = _first_adapter(frozen, rank, key_at(key, path))
        return frozen

    frozen = rules.map(freeze, shapes, params)
    if not adapters:
        raise ValueError(nothing_quantized(rules, shapes))
    return adapters, frozen


@names_checked
def weights(adapters: Mapping[str, Adapter], frozen: Any) -> Any:
    """Returns the parameters that adapters and frozen weights make.

    The gradient goes to the adapters alone. That of `a` and `b` passes straight through
    the rounding, where the rounded position is not clipped (with the quantizer's
    gradient "clip": where the position itself is within the grid). That of the scale
    and the offset is exact in all else: LSQ's with `scale="grid"`, but without its
    factor for the size of a group. The backward pass computes the rounding again and
    keeps no array of the weight's size for it; `adapted` keeps no weight either.

    Args:
      adapters: the trained tree of `low_rank`.
      frozen: its frozen tree. Under `jax.jit`, make it an argument: as a constant it
        would be copied into the program.

    Returns:
      A tree like the parameters given to `low_rank`, in their dtypes. Codes that have
      no adapter are dequantized.

    Raises:
      ValueError: for adapters that belong to other frozen weights.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jnp.linspace(-1, 1, 128).reshape(16, 8)}
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules, rank=2)
      >>> def loss(adapters, frozen):
      ...     kernel = cage.finetuning.weights(adapters, frozen)["kernel"]
      ...     return jnp.sum((jnp.ones(16) @ kernel) ** 2)
      >>> jax.tree.map(jnp.shape, jax.grad(loss)(adapters, frozen))
      {'kernel': {'a': (16, 2), 'b': (2, 8), 'scale': (1, 8)}}
    """
    return map_pairs(lambda _, *pair: weight(*pair), decoded, adapters, frozen)


@names_checked
def merge(adapters: Mapping[str, Adapter], frozen: Any) -> Any:
    """Merges adapters into codes: what is shipped.

    `dequantize` of the result equals `weights`, to the bit.

    Args:
      adapters: the trained tree of `low_rank`.
      frozen: its frozen tree.

    Returns:
      A tree like the parameters given to `low_rank`, with a `QuantizedArray` in place
      of each adapted one, for `cage_jax.export.save`, `low_bit` and all that takes the
      result of `quantize`.

    Raises:
      ValueError: for adapters that belong to other frozen weights or are not finite,
        and for those of weights that were codes (QLoRA), since a sum lies on no grid.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> adapters, frozen = cage.finetuning.low_rank(params, rules)
      >>> cage.finetuning.merge(adapters, frozen)["kernel"]
      QuantizedArray((16, 8), float32, int4 absmax, axis -2, identity, 96 bytes)
    """

    def value(path, adapter, leaf):
        if leaf.grid is None:
            raise ValueError(
                f"`adapters` must be of weights that `low_rank` put on a grid; got one "
                f"of codes, {leaf.store!r}, to which the product is added unrounded. "
                f"Ship codes and adapters, or train with low_rank(dequantize(codes), "
                f"rules)."
            )
        check_finite({f"{path}/{n}": x for n, x in adapter.items()}, "adapters")
        return merged(adapter, leaf)

    return map_pairs(value, lambda codes: codes, adapters, frozen)


def map_pairs(
    function: Callable[[str, Adapter, FrozenWeight], Any],
    of_codes: Callable[[QuantizedArray], Any],
    adapters: Mapping[str, Adapter],
    frozen: Any,
) -> Any:
    """Calls `function(path, adapter, frozen)` on each pair, `of_codes` on codes."""
    paths, leaves, structure = flatten_with_paths(
        frozen, (FrozenWeight, QuantizedArray)
    )
    expected = [
        path for path, leaf in zip(paths, leaves) if isinstance(leaf, FrozenWeight)
    ]
    if set(expected) != set(adapters):
        raise ValueError(
            f"`adapters` must have an entry for each frozen weight, such as "
            f"{expected[:3]}; got {sorted(adapters)[:3]}. Take both from one call of "
            f"low_rank, or of only_scales."
        )
    values = []
    for path, leaf in zip(paths, leaves):
        with path_in_errors(path):
            if isinstance(leaf, FrozenWeight):
                _check_shapes(adapters[path], leaf)
                leaf = function(path, adapters[path], leaf)
            elif is_codes(leaf):
                leaf = of_codes(leaf)
        values.append(leaf)
    return structure.unflatten(values)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _frozen_parts(x, quantizer, grid, store):
    found = rounding(x, quantizer, grid)
    return stored(found, store), of_the_size_of_weights(found.grid)


def _first_adapter(frozen, rank, key):
    shape, (_, rows, columns) = frozen.store.shape, frozen.layout
    inputs, outputs = (math.prod(shape[n] for n in part) for part in (rows, columns))
    if rank > min(inputs, outputs):
        raise ValueError(
            f"`rank` must be at most the shorter side of each matrix; got {rank} for "
            f"{inputs} x {outputs}, shape {shape}. Use {min(inputs, outputs)} or less, "
            f"or leave the parameter alone by a rule with None."
        )
    size = (rank if frozen.units == "steps" else inputs) ** -0.5
    of_a, of_b = _factors(frozen, rank)
    a = size * jax.random.normal(key, of_a, jnp.float32)
    trained = jax.tree.map(jnp.copy, _trained(frozen))
    return {"a": a, "b": jnp.zeros(of_b, jnp.float32)} | trained


def _factors(frozen, rank):
    """Returns the shapes of `a` and `b`."""
    shape = frozen.store.shape
    stack, rows, columns = ([shape[n] for n in part] for part in frozen.layout)
    return (*stack, *rows, rank), (*stack, rank, *columns)


def _trained(frozen):
    return {} if frozen.scale is None else trained_parts(frozen.grid)


def _check_shapes(adapter, frozen):
    """Raises for an adapter of another weight."""
    wanted = {name: x.shape for name, x in _trained(frozen).items()}
    found = {name: jnp.shape(x) for name, x in adapter.items()}
    if found.keys() >= {"a", "b"}:
        wanted["a"], wanted["b"] = _factors(frozen, (1, *found["a"])[-1])
    if found != wanted:
        raise ValueError(
            f"`adapters` must be those of this frozen weight, of shapes {wanted}; got "
            f"{found}. Take both from one call of low_rank, or of only_scales."
        )


def _shape_of_codes(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_codes(leaf) else leaf
