"""Parameters that may be something else than the weights they are taken for.

A program does not say what a parameter is for. What is told here are guesses, by the
shapes of its products and by its name, for people to look at.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cage_jax.core.weight_report import Row
from cage_jax.program.origins import axes_of
from cage_jax.program.products import Product

_FEW = 4  # times as long are the inputs of a router, and matrices that gates mix
# Routers of experts are small, and an error in them sends a token elsewhere.
_ROUTER = re.compile(
    r"(?P<beside>.*/)?(router|gating|switch|(?P<gate>gate))(/(kernel|weight|w))?"
)


def is_router(path: str, shape: tuple[int, ...], products: Iterable[Product]) -> bool:
    """Tells by its name whether a parameter routes tokens to experts.

    Args:
      path: its path.
      shape: its shape.
      products: products of all parameters, this one's among them.
    """
    name = _ROUTER.fullmatch(path)
    if name is None or name["gate"] is None:
        return name is not None
    # A "gate" is also a layer of a Llama, which has as many outputs as others.
    product = next((each for each in products if path in each.paths), None)
    if product is None:
        return False
    inputs, outputs = (
        math.prod(shape[axis] for axis in axes_of(labels, path))
        for labels in (product.contracted, product.kept)
    )
    return _FEW * outputs <= inputs


def beside_routers(
    shapes: Mapping[str, tuple[int, ...]], products: Sequence[Product]
) -> tuple[str, ...]:
    """Returns the begins of the paths that lie beside a router, as experts do."""
    routers = [path for path in shapes if is_router(path, shapes[path], products)]
    names = map(_ROUTER.fullmatch, routers)
    return tuple(name["beside"] or "" for name in names if name is not None)


def other_roles(
    row: Row, products: Iterable[Product], experts: tuple[str, ...]
) -> Iterator[str]:
    """Says what else a quantized parameter may be.

    Args:
      row: the parameter.
      products: its products.
      experts: the result of `beside_routers`.
    """
    path, shape = row.path, row.shape
    for product in products:
        if product.operation == "conv_general_dilated":
            continue
        contracted = axes_of(product.contracted, path)
        kept = axes_of(product.kept, path)
        others = [other for other in product.paths if other != path]
        if _is_factor(shape, (*contracted, *kept)) and others:
            yield (
                f"{path}: it is multiplied with another parameter before data, as in "
                f"LoRA, so that product has no quantized input ({', '.join(others)}). "
                f"If it is an input itself, such as learned latents, pass it as an "
                f"argument after the parameters."
            )
        longest = max((shape[axis] for axis in kept), default=0)
        if len(contracted) == 1 < len(kept) and (
            _FEW * shape[contracted[0]] <= longest
        ):
            yield (
                f"{path}: its product sums over axis {contracted[0]} of {shape} alone. "
                f"If that mixes matrices by gates, the gates are quantized in place of "
                f"the data, and the matrices share scales. Multiply the data with each "
                f"matrix and mix the results, or leave the parameter alone."
            )
        if row.quantizer is None or len(contracted) < 2 or kept == ():
            continue
        first, *rest = contracted
        if row.quantizer.blocks(shape).by_axis.get(first, 1) > 1 and any(
            path.startswith(begin) for begin in experts
        ):
            axes = tuple(rest) if len(rest) > 1 else rest[0]
            yield (
                f"{path}, weight: its product adds up axis {first} of {shape} too. If "
                f"that axis numbers experts, they share scales: use axis={axes}, or "
                f"add them up after the product."
            )


def _is_factor(shape, axes):
    """Tells whether a product of parameters sums over an axis behind the first."""
    gone = set(range(len(shape))) - set(axes)
    return bool(axes) and any(a > min(axes) and shape[a] > 1 for a in gone)
