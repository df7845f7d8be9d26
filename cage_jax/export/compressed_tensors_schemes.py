"""Schemes of compressed-tensors: how matrices are stored, and the words of config.json.

`scheme_of` and `quantization_config` serve the writer, `declared_schemes` the reader.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cage_jax.arrays.checks import is_int, warn
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.files import Path, malformed
from cage_jax.llama.folding import why_not_folded
from cage_jax.llama.tensors import Tensor
from cage_jax.quantizers.file_presets import ct_w4a16
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.presets import fp8, mxfp4, nvfp4
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scale_types import Full, Narrow

FLOATS = ("float32", "float16", "bfloat16")
SUPPORTED = (
    "int4, int8, ct_w4a16, ct_w8a8, q4_0, q8_0, fp8, mxfp4 and nvfp4 along the "
    "inputs, axis -2"
)
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)
"""Endings of the names of a matrix's tensors."""

# Endings of other tensors, with the scheme that has them and what to do.
_NOT_READ = {
    r"[kvq]_(scale|zero_point|global_scale)": (
        "a quantized cache of keys and values (kv_cache_scheme)",
        "Write the model without that scheme; cage_jax.kv_cache quantizes a cache.",
    ),
    r"weight_g_idx": (
        "groups in the order of activations (actorder)",
        "Quantize the model again with actorder='weight', or without.",
    ),
    r"(input|output)_(scale|zero_point|global_scale)": (
        "static scales of activations (input_activations, output_activations)",
        "Quantize the model again with dynamic ones, or its weights alone.",
    ),
    r"compressed|bitmask|row_offsets|scale_packed|meta": (
        "compressed sparse matrices (sparsity_config, or marlin-24)",
        "Write the model without sparsity_config.",
    ),
}


def check_read(names: Iterable[str]) -> None:
    """Raises for a tensor of a scheme that is not read, and names the scheme."""
    for name in names:
        for ending, (scheme, remedy) in _NOT_READ.items():
            if re.fullmatch(ending, name.rpartition(".")[2]):
                rule = "the files must be of a scheme that is read"
                raise malformed(rule, f"`{name}`, of {scheme}", remedy)


class Scheme(NamedTuple):
    """Storage scheme of a matrix; a group size of None means one scale per output."""

    format: str
    type: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Description of the scheme in `config.json`."""
        strategy = "channel" if self.group_size is None else "group"
        arguments = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": "tensor_group" if self == NVFP4 else strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }
        scale_dtypes = {MXFP4: "torch.uint8", NVFP4: "torch.float8_e4m3fn"}
        if self in scale_dtypes:
            arguments["scale_dtype"] = scale_dtypes[self]
        return arguments

    def tensors(
        self, shape: tuple[int, ...]
    ) -> Mapping[str, tuple[Sequence[str], tuple[int, ...]]]:
        """Returns the allowed dtypes and the shape of each tensor for (out, in)."""
        out, inputs = shape
        groups = 1 if self.group_size is None else inputs // self.group_size
        scales = {"weight_scale": (FLOATS, (out, groups))}
        if self == INT8:
            return scales | {"weight": (("int8",), shape)}
        if self == FP8:
            return scales | {"weight": (("float8_e4m3fn",), shape)}
        if self.format == PACKED:
            found = scales | {
                "weight_packed": (("int32",), (out, self._words(inputs))),
                "weight_shape": (("int64",), (2,)),
            }
            if not self.symmetric:
                zero_points = self._words(out), groups
                found["weight_zero_point"] = (("int32",), zero_points)
            return found
        packed = {"weight_packed": (("uint8",), (out, inputs // 2))}
        if self == MXFP4:
            return packed | {"weight_scale": (("uint8",), (out, groups))}
        return packed | {
            "weight_scale": (("float8_e4m3fn",), (out, groups)),
            "weight_global_scale": (("float32",), (1,)),
        }

    def _words(self, length):
        return -(-length * self.bits // 32)

    def quantizer(self, scale_dtype: str) -> Quantizer:
        """Returns the preset with the codes and scales of the scheme, for (in, out)."""
        if self == MXFP4:
            return mxfp4(axis=-2)
        if self == NVFP4:
            return nvfp4(axis=-2)
        if self == FP8:
            full = scale_dtype == "float32"
            scale_type = Full() if full else Narrow(scale_dtype)  # type: ignore
            return dataclasses.replace(fp8(axis=-2), scale_type=scale_type)
        return dataclasses.replace(
            ct_w4a16(
                axis=-2,
                group_size=self.group_size,
                symmetric=self.symmetric,
                scale_dtype=scale_dtype,
            ),
            format=Integer(self.bits, narrow=False),
        )


PACKED = "pack-quantized"
INT8 = Scheme("int-quantized", "int", 8)
FP8 = Scheme("float-quantized", "float", 8)
MXFP4 = Scheme("mxfp4-pack-quantized", "float", 4, 32)
NVFP4 = Scheme("nvfp4-pack-quantized", "float", 4, 16)


# What vLLM computes as one layer.
_FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def scheme_of(tensor: Tensor, dtype: str) -> Scheme | None:
    """Finds the scheme that holds a tensor exactly.

    Args:
      tensor: a tensor of the model.
      dtype: dtype of the model, in which readers compute the weights.

    Returns:
      The scheme, or None for floats.

    Raises:
      ValueError: if no scheme holds the codes.
    """
    array = tensor.array
    if not isinstance(array, QuantizedArray):
        return None
    quantizer = array.quantizer
    if not tensor.names.is_kernel:
        raise ValueError(
            f"`{tensor.path}`: only matrices can be codes in compressed-tensors; got "
            f"{quantizer}. Leave it unquantized."
        )
    scheme = None
    if quantizer.hadamard is not None:
        remedy = why_not_folded(tensor.path)
    elif quantizer.blocks(array.shape).axes != (0,):
        remedy = (
            "Quantize along the inputs, axis=-2, with a scale per output or per group "
            "of inputs."
        )
    else:
        remedy = "Choose one of those, or leave it unquantized."
        scheme = exact_scheme(array)
    if scheme is None:
        raise ValueError(
            f"`{tensor.path}`: `codes` must have a quantizer that compressed-tensors "
            f"supports, {SUPPORTED}; got {quantizer}. {remedy}"
        )
    if needed := needed_dtype(array, dtype):
        raise ValueError(
            f"`{tensor.path}`: `dtype` must be {needed!r} for {quantizer}, since a "
            f"reader computes its weights in it; got {dtype!r}. Use dtype={needed!r}"
            + (
                f", or a quantizer with {dtype} scales."
                if str(array.scale.dtype) in FLOATS
                else "."
            )
        )
    return scheme


def needed_dtype(array: QuantizedArray, dtype: str) -> str | None:
    """Returns the dtype that a model must have for these scales; None if it has it."""
    scale = str(array.scale.dtype)
    needed = scale if scale in FLOATS else "bfloat16"
    if dtype == needed or (dtype == "float32" and scale in FLOATS):
        return None
    return needed


def exact_scheme(array: QuantizedArray) -> Scheme | None:
    """Returns the scheme that holds codes with scales along their inputs; or None."""
    quantizer, format = array.quantizer, array.quantizer.format
    (size,), scale = quantizer.group_sizes, str(array.scale.dtype)
    symmetric = not quantizer.asymmetric
    if quantizer.scale.has_offset or str(array.dtype) not in FLOATS:
        return None
    if isinstance(format, Integer) and scale in FLOATS:
        if symmetric and format.code_offset != 0:
            return None
        return Scheme(PACKED, "int", 4 if format.bits <= 4 else 8, size, symmetric)
    if not symmetric:
        return None
    known: dict[Any, Scheme] = {
        (Float("e4m3"), "floats", None): FP8,
        (Float("e2m1"), "float8_e8m0fnu", 32): MXFP4,
        (Float("e2m1"), "float8_e4m3fn", 16): NVFP4,
    }
    return known.get((format, "floats" if scale in FLOATS else scale, size))


def quantization_config(
    schemes: Mapping[str, Scheme | None], *, by_name: bool = False
) -> dict[str, Any]:
    """Describes the schemes for `config.json`.

    Args:
      schemes: the scheme of each linear layer by module; None for floats.
      by_name: whether to list the modules of a single scheme too. Otherwise all linear
        layers have it that are not in `schemes` with None.
    """
    modules: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme is not None:
            modules.setdefault(scheme, []).append(module)
    if len(modules) == 1 and not by_name:  # the form that most programs write and read
        modules = {scheme: ["Linear"] for scheme in modules}
    groups = {
        f"group_{number}": {
            "targets": targets,
            "weights": scheme.arguments,
            "input_activations": None,
            "output_activations": None,
            "format": scheme.format,
        }
        for number, (scheme, targets) in enumerate(modules.items())
    }
    formats = {scheme.format for scheme in modules}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [module for module, scheme in schemes.items() if scheme is None],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def warn_of_mixed_layers(schemes: Mapping[str, Scheme | None], path: Path) -> None:
    """Warns of modules that vLLM computes as one layer, but have several schemes."""
    mixed = []
    for first, *others in _FUSED:
        for module in schemes:
            start = module.removesuffix(first)
            names = [start + name for name in (first, *others)]
            found = {schemes[name] for name in names if name in schemes}
            if start != module and len(found) > 1:
                mixed.append(f"{start}({'|'.join((first, *others))})")
    if mixed:
        more = f" and {len(mixed) - 1} more" * (len(mixed) > 1)
        warn(
            f"`codes` must have one quantizer in each layer that vLLM computes as a "
            f"whole, for vLLM to read them; got several in {mixed[0]}{more}. Give them "
            f"the same one, unless only transformers reads {path}."
        )


def declared_schemes(quantization: Any) -> list[Scheme]:
    """Returns the schemes that `quantization_config` in `config.json` lists.

    The tensors themselves show which matrix has which scheme. The regular expressions
    in `config.json` are not used, because a malicious one could take hours to match.

    Raises:
      MalformedFileError: if the entry is not well-formed, or of another library.
    """
    if quantization is None:
        return []
    _check_object(quantization, "an object")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise malformed(
            "config.json must have quant_method='compressed-tensors'",
            repr(method),
            "Convert the model, or use its unquantized original.",
        )
    if quantization.get("transform_config"):
        raise malformed(
            "config.json must have no `transform_config`",
            "one",
            "Use a model without rotations of inputs.",
        )
    groups = quantization.get("config_groups")
    _check_object(groups, "`config_groups`")
    found: dict[Scheme, None] = {}
    for group in groups.values():
        _check_object(group, "objects in `config_groups`")
        weights = group.get("weights")
        _check_object(weights, "`weights` in `config_groups`")
        found |= dict.fromkeys(_possible_schemes(weights))
    if groups and not found:
        names = ("type", "num_bits", "strategy", "group_size", "symmetric")
        has = ", ".join(f"{name}={str(weights.get(name))[:20]}" for name in names)
        raise malformed(
            "config.json must be of a scheme that is read",
            has,
            f"Write the model in one of {SUPPORTED}.",
        )
    return list(found)


def _check_object(value, what):
    if not isinstance(value, dict):
        rule = f"config.json must have {what} in `quantization_config`"
        raise malformed(rule, repr(str(value)[:80]))


def _possible_schemes(weights):
    """Returns the schemes that a group's arguments may mean; empty if unsupported."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    symmetric = weights.get("symmetric", True)
    if size == -1:
        size = None
    if strategy is None:
        strategy = "channel" if size is None else "group"
    if strategy == "channel":
        size = None
    elif not is_int(size) or size < 1:
        return []
    if not isinstance(symmetric, bool):
        return []
    integers = [Scheme(PACKED, "int", bits, size, symmetric) for bits in (4, 8)]
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    return [
        scheme
        for scheme in (*integers, INT8, FP8, MXFP4, NVFP4)
        if (*scheme[1:], scheme.arguments["strategy"])
        == (kind, bits, size, symmetric, strategy)
    ]
