"""compressed-tensors: folders of safetensors for transformers and vLLM.

A quantized matrix has several tensors there: its codes packed in words, its scales, and
others that depend on its scheme. `config.json` says which matrices have which scheme.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.packing import COMPRESSED_TENSORS, FP4, pack, unpack
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import tokenizer_files
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    inside,
    new_folder,
    read_json,
)
from cage_jax.export.safetensors_files import read as read_arrays
from cage_jax.export.safetensors_files import write as write_arrays
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.folding import why_not_folded
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import PLACES, Tensor, by_path, tensors, tree_of
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.presets import ct_w4a16, fp8, mxfp4, nvfp4
from cage_jax.quantizers.scale_types import Full, Narrow

_FLOATS = ("float32", "float16", "bfloat16")
_SUPPORTED = (
    "int4, int8, ct_w4a16, ct_w8a8, q4_0, q8_0, fp8, mxfp4 and nvfp4 along the "
    "inputs, axis -2"
)


# --- writing --------------------------------------------------------------------------


def compressed_tensors(
    codes: Any,
    config: LlamaConfig,
    path: Path,
    *,
    tokenizer: Mapping[str, bytes] | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder for `transformers.AutoModelForCausalLM.from_pretrained` and vLLM.

    The codes and scales in the file are bit-identical to the given ones. A reader
    computes in `dtype`. Its weights equal `dequantize(codes)` cast to `dtype`, for
    codes of float32 arrays and of arrays of `dtype`.

    Each quantizer becomes one scheme:

    - integers of 2 to 4 bits: `pack-quantized` with 4 bits per code; integers of 5 to 8
      bits: `pack-quantized` with 8 bits per code. (`int-quantized` can be read but is
      not written, because vLLM supports it only with quantized inputs.)
    - `fp8()`: `float-quantized`; `mxfp4()`: `mxfp4-pack-quantized`; `nvfp4()`:
      `nvfp4-pack-quantized`.

    Rotations are folded into the preceding weights where possible.

    Args:
      codes: the result of `quantize(params, rules)`, with the paths and shapes of
        `config.shapes()`. All matrices but the embedding may be codes.
      config: the model's dimensions.
      path: path of the folder.
      tokenizer: the tokenizer's files by name, such as "tokenizer.json", as bytes; or
        the folder that contains them.
      dtype: dtype of the model and of all unquantized parameters: "float32", "float16"
        or "bfloat16"; None for "bfloat16" with FP4, otherwise "float32". Readers round
        scales to it, so float32 scales need "float32". They decode FP4 as bfloat16, so
        FP4 needs "bfloat16".
      shard_bytes: maximum bytes of tensors in one file.
      overwrite: whether to replace an existing folder.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`.
      TypeError: if a leaf is neither floats nor a `QuantizedArray`.
      ValueError: if the format cannot hold a parameter, or if the parameters are not
        those of `config`.

    Example:
      >>> import tempfile
      >>> import cage_jax as cage
      >>> from cage_jax import llama
      >>> from cage_jax.export.compressed_tensors import compressed_tensors, read
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> rules = cage.Rules(
      ...     [("layers/.*/kernel", cage.ct_w4a16(group_size=32)), (".*", None)]
      ... )
      >>> codes = cage.quantize(llama.initial_params(config, seed=0), rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     compressed_tensors(codes, config, folder)
      ...     again = read(folder).params["layers"]["query"]["kernel"]
      >>> print(again.quantizer)
      int4 full range absmax, group 32 of axis -2, float16 scales, identity
      >>> bool((again.codes == codes["layers"]["query"]["kernel"].codes).all())
      True

    Source: compressed-tensors 0.20.
    """
    if dtype is None:
        dtype = "bfloat16" if _has_fp4(codes) else "float32"
    with contextlib.suppress(TypeError):
        dtype = jnp.dtype(dtype).name
    if dtype not in _FLOATS:
        raise ValueError(
            f"`dtype` must be one of {_FLOATS}; got {dtype!r}. Use 'float32'."
        )
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int):
        raise TypeError(
            f"`shard_bytes` must be an int; got {shard_bytes!r}. Use 5 * 10**9."
        )
    if shard_bytes < 1:
        raise ValueError(
            f"`shard_bytes` must be positive; got {shard_bytes}. Use 5 * 10**9."
        )
    files = tokenizer_files.given(tokenizer, config)
    schemes: dict[str, _Scheme | None] = {}  # by module, for all linear layers

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in tensors(codes, config):
            module = _module(tensor.place, tensor.layer)
            scheme = _scheme_of(tensor, dtype)
            if tensor.place.is_kernel:
                schemes[module] = scheme
            for suffix, array in _stored(tensor, scheme, dtype).items():
                yield f"{module}.{suffix}", array

    with new_folder(path, overwrite=overwrite) as folder:
        _write_shards(folder, named(), shard_bytes)
        if config.tied:
            schemes["lm_head"] = None
        content = config.to_huggingface(dtype)
        quantization = _quantization_config(schemes)
        if quantization is not None:
            content["quantization_config"] = quantization
        _write_json(folder / "config.json", content)
        tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", tokens)
        for name, data in files.items():
            (folder / name).write_bytes(data)


class _Scheme(NamedTuple):
    """Storage scheme of a matrix; a group size of None means one scale per output."""

    format: str
    type: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Description of the scheme in `config.json`."""
        arguments = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": _STRATEGIES.get(self.format)
            or ("channel" if self.group_size is None else "group"),
            "group_size": self.group_size,
            "dynamic": False,
        }
        if self.format in _SCALE_DTYPES:
            arguments["scale_dtype"] = _SCALE_DTYPES[self.format]
        return arguments

    def tensors(self, shape: tuple[int, int]) -> Mapping[str, tuple[Any, Any]]:
        """Returns the allowed dtypes and the shape of each tensor for (out, in)."""
        out, inputs = shape
        groups = 1 if self.group_size is None else inputs // self.group_size
        scale = {"weight_scale": (_FLOATS, (out, groups))}
        if self.format == _PACKED:
            found = scale | {
                "weight_packed": (("int32",), (out, _words(inputs, self.bits))),
                "weight_shape": (("int64",), (2,)),
            }
            if not self.symmetric:
                shape = _words(out, self.bits), groups
                found["weight_zero_point"] = (("int32",), shape)
            return found
        if self.format == _INTEGERS:
            return scale | {"weight": (("int8",), shape)}
        if self.format == _FP8:
            return scale | {"weight": (("float8_e4m3fn",), shape)}
        words = {"weight_packed": (("uint8",), (out, inputs // 2))}
        if self.format == _MXFP4:
            return words | {"weight_scale": (("uint8",), (out, groups))}
        return words | {
            "weight_scale": (("float8_e4m3fn",), (out, groups)),
            "weight_global_scale": (("float32",), (1,)),
        }


_PACKED = "pack-quantized"
_INTEGERS = "int-quantized"
_FP8 = "float-quantized"
_MXFP4 = "mxfp4-pack-quantized"
_NVFP4 = "nvfp4-pack-quantized"
_STRATEGIES = {_NVFP4: "tensor_group"}
_SCALE_DTYPES = {_MXFP4: "torch.uint8", _NVFP4: "torch.float8_e4m3fn"}


def _has_fp4(codes):
    return any(
        isinstance(leaf, QuantizedArray) and leaf.quantizer.format == Float("e2m1")
        for leaf in by_path(codes).values()
    )


def _words(length, bits):
    return -(-length * bits // 32)


def _module(place, layer):
    return place.huggingface.format(layer).removesuffix(".weight")


def _scheme_of(tensor: Tensor, dtype: str) -> _Scheme | None:
    """Finds the scheme that holds a tensor exactly, or None for floats."""
    array = tensor.array
    if not isinstance(array, QuantizedArray):
        return None
    quantizer = array.quantizer
    if not tensor.place.is_kernel:
        raise ValueError(
            f"`{tensor.path}`: it must be of floats in compressed-tensors, which has "
            f"codes of matrices alone; got {quantizer}. Leave it unquantized."
        )
    if quantizer.hadamard is not None:
        _refuse(tensor, why_not_folded(tensor.path))
    if quantizer.blocks(array.shape).axes != (0,):
        _refuse(tensor, "Use that axis: a scale per output, or per group of inputs.")
    format, (size,) = quantizer.format, quantizer.group_sizes
    scale, symmetric = str(array.scale.dtype), not quantizer.asymmetric
    scheme = None
    if quantizer.scale.has_offset or str(array.dtype) not in _FLOATS:
        pass
    elif isinstance(format, Integer) and scale in _FLOATS:
        bits = 4 if format.bits <= 4 else 8
        if format.of_zero_code == 0 or not symmetric:
            scheme = _Scheme(_PACKED, "int", bits, size, symmetric)
    elif symmetric:
        known: dict[Any, _Scheme] = {
            (Float("e4m3"), True, None): _Scheme(_FP8, "float", 8),
            (Float("e2m1"), "float8_e8m0fnu", 32): _Scheme(_MXFP4, "float", 4, 32),
            (Float("e2m1"), "float8_e4m3fn", 16): _Scheme(_NVFP4, "float", 4, 16),
        }
        scheme = known.get((format, scale in _FLOATS or scale, size))
    if scheme is None:
        _refuse(tensor, "Choose one of those, or leave it unquantized.")
    needed = "bfloat16" if scale not in _FLOATS else scale
    if dtype != needed and (dtype != "float32" or scale not in _FLOATS):
        raise ValueError(
            f"`{tensor.path}`: `dtype` must be {needed!r} for {quantizer}, since a "
            f"reader computes its weights in it; got {dtype!r}. Use dtype={needed!r}"
            + (f", or a quantizer with {dtype} scales." if scale in _FLOATS else ".")
        )
    return scheme


def _refuse(tensor: Tensor, remedy: str) -> NoReturn:
    raise ValueError(
        f"`{tensor.path}`: `codes` must be of a quantizer that compressed-tensors has, "
        f"{_SUPPORTED}; got {tensor.array.quantizer}. {remedy}"  # type: ignore
    )


def _stored(
    tensor: Tensor, scheme: _Scheme | None, dtype: str
) -> dict[str, np.ndarray]:
    """Converts a tensor to the arrays that the file stores for it."""
    array = tensor.array
    if not isinstance(array, QuantizedArray):
        with np.errstate(over="ignore"):
            values = np.asarray(array).astype(dtype)
        if np.isinf(values).any() and not np.isinf(array).any():
            raise ValueError(
                f"`{tensor.path}`: `dtype` must hold the values; got {dtype!r}, for "
                f"{jnp.abs(array).max():g}. Use 'float32'."
            )
        return {"weight": values.T if tensor.place.is_kernel else values}
    assert scheme is not None
    codes, scale = array.codes.T, np.asarray(array.scale).T
    if scheme.format == _INTEGERS or scheme.format == _FP8:
        return {"weight": np.asarray(codes), "weight_scale": scale}
    if scheme.format == _PACKED:
        narrow = f"int{scheme.bits}"
        found = {
            "weight_packed": _pack(codes.astype(narrow), COMPRESSED_TENSORS),
            "weight_scale": scale,
            "weight_shape": np.array(codes.shape, np.int64),
        }
        if array.zero_point is not None:
            found["weight_zero_point"] = _pack(
                array.zero_point.T.astype(narrow), COMPRESSED_TENSORS, axis=0
            )
        return {name: np.asarray(part) for name, part in found.items()}
    words = {"weight_packed": np.asarray(_pack(codes, FP4))}
    if scheme.format == _MXFP4:
        return words | {"weight_scale": scale.view(np.uint8)}
    divisor = np.ones(1, np.float32)
    if array.tensor_divisor is not None:
        divisor = np.asarray(array.tensor_divisor).ravel()
    return words | {"weight_scale": scale, "weight_global_scale": divisor}


_pack = functools.partial(jax.jit, static_argnames=("layout", "axis"))(pack)
_unpack = functools.partial(
    jax.jit, static_argnames=("layout", "dtype", "axis", "length")
)(unpack)


def _write_shards(
    folder: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes one file, or several files and their index."""
    written: list[tuple[pathlib.Path, list[str]]] = []
    total = 0
    for shard in _split(arrays, shard_bytes):
        file = folder / f"{len(written)}.safetensors"
        write_arrays(file, shard, {"format": "pt"})
        written.append((file, list(shard)))
        total += sum(array.nbytes for array in shard.values())
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(written, 1):
        name = f"model-{number:05}-of-{len(written):05}.safetensors"
        file.rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _split(arrays, shard_bytes):
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in arrays:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _quantization_config(
    schemes: Mapping[str, _Scheme | None],
) -> dict[str, Any] | None:
    """Describes the schemes for `config.json`; None if nothing is quantized."""
    modules: dict[_Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme is not None:
            modules.setdefault(scheme, []).append(module)
    if not modules:
        return None
    if len(modules) == 1:  # the form that most programs write and read
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


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- reading --------------------------------------------------------------------------


def read(path: Path) -> Model:
    """Reads a folder of `compressed_tensors`, or a Llama of floats from Hugging Face.

    Codes and scales are bit-identical to those of the file. Their quantizer is the
    matching preset: `ct_w4a16`, `ct_w8a8`, `fp8`, `mxfp4` or `nvfp4`. Floats become
    float32. The quantization of inputs in a file does not become part of the model.

    Args:
      path: path of the folder.

    Returns:
      The model.

    Raises:
      MalformedFileError: if the folder is incomplete, damaged or malicious, or if its
        model is not supported.
    """
    folder = pathlib.Path(path)
    content = read_json(inside(folder, "config.json"))
    try:
        config = LlamaConfig.from_huggingface(content)
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"config.json: {error}") from error
    schemes = _declared(content.get("quantization_config"))
    arrays = _read_shards(folder)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = config.tied and head in arrays and embedding in arrays
    if both and np.array_equal(arrays[head], arrays[embedding]):
        del arrays[head]
    found = {}
    for name, shape in config.shapes().items():
        place = PLACES[name]
        shape = shape[1:] if place.in_layers else shape
        for layer in range(config.layers) if place.in_layers else (None,):
            module = _module(place, layer)
            stored = {
                suffix: arrays.pop(f"{module}.{suffix}")
                for suffix in _SUFFIXES
                if f"{module}.{suffix}" in arrays
            }
            if place.is_kernel:
                found[name, layer] = _kernel(module, stored, shape, schemes)
            else:
                found[name, layer] = _floats(module, stored, shape)
    more = [name for name in arrays if not name.endswith("rotary_emb.inv_freq")]
    if more:
        raise MalformedFileError(
            f"the files must have the tensors of a Llama alone; got {more[:3]} too, "
            f"{len(more)} in all. Other models are not read yet."
        )
    files = tokenizer_files.in_folder(folder)
    return Model(tree_of(found, config), config, files)


_SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)


def _read_shards(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of all files by name."""
    name = "model.safetensors.index.json"
    if not (folder / name).is_file():
        return read_arrays(inside(folder, "model.safetensors"))[0]
    places = read_json(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) for shard in places.values()
    ):
        raise MalformedFileError(
            f"{name} must have a `weight_map` from tensors to files; got another. Get "
            f"the folder again."
        )
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        found, _ = read_arrays(inside(folder, shard))
        arrays |= {name: array for name, array in found.items() if name in places}
        if any(places.get(name) != shard for name in found):
            raise MalformedFileError(
                f"{shard} must have the tensors that {name} says; got others. Get the "
                f"folder again."
            )
    if len(arrays) != len(places):
        missing = [tensor for tensor in places if tensor not in arrays]
        raise MalformedFileError(
            f"the files must have all tensors that {name} lists; got {len(missing)} "
            f"missing, {missing[:3]}. Get the folder again."
        )
    return arrays


def _declared(quantization: Any) -> list[_Scheme]:
    """Returns the schemes that `config.json` lists.

    The tensors themselves show which matrix has which scheme. The regular expressions
    in `config.json` are not used, because a malicious one could take hours to match.
    """
    if quantization is None:
        return []

    def checked(value, kind, what):
        if not isinstance(value, kind):
            raise MalformedFileError(
                f"config.json must have {what} in `quantization_config`; got "
                f"{str(value)[:80]!r}. Get the folder again, or one of another program."
            )
        return value

    checked(quantization, dict, "an object")
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise MalformedFileError(
            f"config.json must have quant_method='compressed-tensors'; got {method!r}. "
            f"Other folders are not read: convert it, or take the model of floats."
        )
    if quantization.get("transform_config"):
        raise MalformedFileError(
            "config.json must have no `transform_config`; got one. Its rotations of "
            "inputs are not supported: take a model without."
        )
    groups = checked(quantization.get("config_groups"), dict, "`config_groups`")
    found: dict[_Scheme, None] = {}
    for group in groups.values():
        checked(group, dict, "objects in `config_groups`")
        weights = checked(group.get("weights"), dict, "`weights` in `config_groups`")
        found |= dict.fromkeys(_schemes_from(weights))
    return list(found)


def _schemes_from(weights: Mapping[str, Any]) -> list[_Scheme]:
    """Returns the schemes that a group's arguments may mean; empty if unsupported."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    size, strategy = weights.get("group_size"), weights.get("strategy")
    symmetric = weights.get("symmetric", True)
    size = None if size == -1 else size
    if strategy is None:
        strategy = "channel" if size is None else "group"
    if not isinstance(bits, int) or not isinstance(symmetric, bool):
        return []
    if strategy == "channel":
        size = None
    elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return []
    candidates = [
        _Scheme(_PACKED, "int", 4, size, symmetric),
        _Scheme(_PACKED, "int", 8, size, symmetric),
        _Scheme(_INTEGERS, "int", 8),
        _Scheme(_FP8, "float", 8),
        _Scheme(_MXFP4, "float", 4, 32),
        _Scheme(_NVFP4, "float", 4, 16),
    ]
    said = kind, bits, size, symmetric, strategy
    return [
        each for each in candidates if said == (*each[1:], each.arguments["strategy"])
    ]


def _kernel(module, stored, shape, schemes):
    """Builds a matrix (in, out) of floats or codes from its stored tensors."""
    if set(stored) == {"weight"} and str(stored["weight"].dtype) in _FLOATS:
        return _floats(module, stored, shape[::-1]).T
    has = {suffix: (str(part.dtype), part.shape) for suffix, part in stored.items()}
    for scheme in schemes:
        expected = scheme.tensors(shape[::-1])
        if (
            shape[0] % (scheme.group_size or 1) == 0
            and set(expected) == set(has)
            and all(
                dtype in expected[suffix][0] and size == expected[suffix][1]
                for suffix, (dtype, size) in has.items()
            )
        ):
            return _codes(module, stored, shape, scheme)
    texts = [f"{suffix} {dtype}{list(size)}" for suffix, (dtype, size) in has.items()]
    raise MalformedFileError(
        f"`{module}`: the file must have the tensors of a matrix {shape[::-1]} of "
        f"{_FLOATS}, or of a scheme in config.json that is supported, "
        f"{[scheme.format for scheme in schemes]}; got {texts}. Supported are "
        f"{_SUPPORTED}."
    )


def _floats(module, stored, shape):
    array = stored.get("weight")
    if (
        len(stored) != 1
        or array is None
        or array.shape != shape
        or str(array.dtype) not in _FLOATS
    ):
        has = {name: f"{part.dtype}{part.shape}" for name, part in stored.items()}
        raise MalformedFileError(
            f"`{module}`: the file must have `weight` alone, of {_FLOATS} and shape "
            f"{shape}; got {has}. Get the folder again."
        )
    return jnp.array(array.astype(np.float32))


def _codes(module, stored, shape, scheme) -> QuantizedArray:
    scale = stored["weight_scale"].T
    quantizer, zero_point, divisor = _quantizer(scheme, str(scale.dtype)), None, None
    codes_dtype = quantizer.format.code_dtype
    if scheme.format == _PACKED:
        if tuple(stored["weight_shape"].tolist()) != shape[::-1]:
            raise MalformedFileError(
                f"`{module}`: weight_shape must be {shape[::-1]}, as config.json says; "
                f"got {stored['weight_shape'].tolist()}. Get the folder again."
            )
        layout = COMPRESSED_TENSORS
        words = jnp.array(stored["weight_packed"])
        codes = _unpack(words, layout, codes_dtype, length=shape[0])
        if not scheme.symmetric:
            words = jnp.array(stored["weight_zero_point"])
            zero_point = _unpack(words, layout, codes_dtype, axis=0, length=shape[1]).T
    elif "weight" in stored:
        codes = jnp.array(stored["weight"])
    else:
        words = jnp.array(stored["weight_packed"])
        codes = _unpack(words, FP4, codes_dtype)
        if scheme.format == _MXFP4:
            scale = scale.view(jnp.float8_e8m0fnu)
        else:
            divisor = jnp.array(stored["weight_global_scale"]).reshape(1, 1)
    return QuantizedArray(
        codes=codes.T,
        scale=jnp.array(scale),
        zero_point=zero_point,
        offset=None,
        tensor_divisor=divisor,
        quantizer=quantizer,
        dtype=jnp.dtype(jnp.float32),
    )


def _quantizer(scheme: _Scheme, scale_dtype: str):
    """Returns the preset with the codes and scales of a scheme."""
    if scheme.format == _MXFP4:
        return mxfp4()
    if scheme.format == _NVFP4:
        return nvfp4()
    if scheme.format == _FP8:
        full = scale_dtype == "float32"
        scale_type = Full() if full else Narrow(scale_dtype)  # type: ignore[arg-type]
        return dataclasses.replace(fp8(), scale_type=scale_type)
    return dataclasses.replace(
        ct_w4a16(
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            scale_dtype=scale_dtype,
        ),
        format=Integer(scheme.bits, narrow=False),
    )
