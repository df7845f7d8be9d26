"""Conversion of quantizers to JSON and back.

A description has the name of a class and the fields that differ from their defaults. So
files stay readable, and a later version can add fields. A default must therefore never
change. `axis` is always written, since its default has changed: files without it are
older, and mean -2. Only the classes of `classes`, with plain values, can be read.
"""

import dataclasses
import inspect
import sys
import types
from reprlib import repr as short
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from cage_jax.export.files import MalformedFileError, malformed
from cage_jax.quantizers import scale_types, scales
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.registry import PRESETS
from cage_jax.quantizers.scale_types import ScaleType
from cage_jax.quantizers.scales import ScaleRule

_SCALES = [
    kind
    for module in (scales, scale_types)
    for name, kind in vars(module).items()
    if inspect.isclass(kind)
    and issubclass(kind, ScaleRule | ScaleType)
    and not (inspect.isabstract(kind) or name.startswith("_"))
]
_FIRST_AXIS = -2  # in files of versions that did not write the axis by default
_MOST_LEVELS = 256  # of a codebook; no other list is longer
_CAUSE = "written by a newer version, or damaged"
_REMEDY = "Get the file again, or a newer version of cage_jax."


def classes() -> dict[str, type]:
    """Returns all classes that a description can name, by name."""
    formats = (preset.format for preset in PRESETS.values())
    return {kind.__name__: kind for kind in (Quantizer, *formats, *_SCALES)}


def describe(quantizer: Quantizer) -> dict[str, Any]:
    """Converts a quantizer to values that JSON can hold.

    Args:
      quantizer: a quantizer with a format and a scale of this library.

    Returns:
      Nested dicts with the names of classes and their fields.

    Raises:
      TypeError: if the quantizer has a format or scale that is defined elsewhere.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax.export.descriptions import describe
      >>> description = describe(cage.int4(group_size=32))
      >>> description["format"], description["group_size"]
      ({'class': 'Integer', 'bits': 4}, 32)
    """
    return _described(quantizer)


def _described(value):
    kind = type(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return [_described(each) for each in value]
    is_part = isinstance(value, Format | ScaleRule | ScaleType)
    if not is_part and not dataclasses.is_dataclass(value):
        return value
    if classes().get(kind.__name__) is not kind:
        raise TypeError(
            f"`quantizer` must consist of classes of cage_jax; got {kind.__name__} of "
            f"{kind.__module__}. Use a preset such as int4(), or dequantize the array "
            f"and save its values."
        )
    described = {"class": kind.__name__}
    for field in dataclasses.fields(value):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        part = getattr(value, field.name)
        if part != default or field.name == "axis":
            described[field.name] = _described(part)
    return described


def quantizer_of(description: Any) -> Quantizer:
    """Builds a quantizer from its description; the inverse of `describe`.

    Args:
      description: a value read from JSON; it need not be trusted.

    Returns:
      A `Quantizer`.

    Raises:
      MalformedFileError: for anything that `describe` does not return.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax.export.descriptions import describe, quantizer_of
      >>> quantizer_of(describe(cage.nvfp4())) == cage.nvfp4()
      True
    """
    if isinstance(description, dict):
        # A file without an axis is from when -2 was the default.
        description = {"axis": -2, **description}
    try:
        return _built(description, Quantizer)
    except RecursionError as error:
        rule = "the description of a quantizer must not be nested so deeply"
        raise malformed(rule, error, _REMEDY) from error


def _built(description, wanted):
    """Builds an object of the class `wanted` or of a subclass."""
    if not isinstance(description, dict) or "class" not in description:
        rule = f"the description of a {wanted.__name__} must have a 'class'"
        raise malformed(rule, short(description), _REMEDY)
    name = description["class"]
    kind = classes().get(name) if isinstance(name, str) else None
    if kind is None or not issubclass(kind, wanted):
        known = [name for name, each in classes().items() if issubclass(each, wanted)]
        rule = f"a {wanted.__name__} must be one of {known}"
        raise malformed(rule, f"{short(name)}: {_CAUSE}", _REMEDY)
    hints = get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    values = {"axis": _FIRST_AXIS} if kind is Quantizer else {}
    for key, value in description.items():
        if key == "class":
            continue
        if key not in fields:
            rule = f"a field of {name} must be one of {list(fields)}"
            raise malformed(rule, f"{short(key)}: {_CAUSE}", _REMEDY)
        try:
            values[key] = _typed(value, fields[key])
        except _Unsuited as error:
            rule = f"`{key}` of {name} must be {error}"
            raise malformed(rule, short(value), _REMEDY) from error
    try:
        return kind(**values)
    except MalformedFileError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedFileError(
            f"{name} must have valid fields; got: {error} {_REMEDY}"
        ) from error


class _Unsuited(Exception):  # noqa: N818 - it says what would suit
    """A value does not have the type of its field."""


def _typed(value, hint):
    """Converts a value of JSON to the type of a field."""
    if inspect.isclass(hint) and issubclass(hint, Format | ScaleRule | ScaleType):
        return _built(value, hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for each in args:
            try:
                return _typed(value, each)
            except _Unsuited:
                pass
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is tuple:
        if isinstance(value, list) and len(value) <= _MOST_LEVELS:
            return tuple(_typed(each, args[0]) for each in value)
    elif hint is float:
        # Integers pass too, but no NaN and no number too large for a float.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return value
    elif type(value) is hint:  # so that a bool is no int
        return value
    raise _Unsuited(getattr(hint, "__name__", str(hint)))
