"""compressed-tensors: folders of safetensors for transformers and vLLM.

A quantized matrix has several tensors there: its codes packed in words, its scales, and
others that depend on its scheme. `config.json` says which matrices have which scheme.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import check_choice, check_int
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import tokenizer_files
from cage_jax.export.compressed_tensors_arrays import (
    floats_of,
    kernel_of,
    stored_arrays,
)
from cage_jax.export.compressed_tensors_schemes import (
    FLOATS,
    SUFFIXES,
    Scheme,
    check_read,
    declared_schemes,
    quantization_config,
    scheme_of,
    warn_of_mixed_layers,
)
from cage_jax.export.compressed_tensors_templates import write_by_template
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    as_path,
    check_none,
    has,
    inside,
    malformed,
    read_json,
    write_json,
)
from cage_jax.export.safetensors_files import read_shards, write_shards
from cage_jax.export.target import Target
from cage_jax.export.template_names import TensorName
from cage_jax.export.writing import new_folder
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path, expected_tensors, tensors, tree_of
from cage_jax.quantizers.formats import Float

_SHARD_BYTES = 5 * 10**9


def compressed_tensors(
    codes: Any,
    config: LlamaConfig | Path,
    path: Path,
    *,
    names: str | Sequence[TensorName] | None = None,
    tokenizer: Mapping[str, bytes] | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
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

    Rotations are folded into the preceding weights where possible. vLLM computes query,
    key and value as one layer, and gate and up, and refuses a model that has two
    schemes in one of these. Such a model is written with a warning.

    A model of any architecture is written with its own folder as template, in place of
    a config. The folder is copied, tokenizer and settings byte for byte and the weights
    in files of the same names. Codes take the place of the linear layers that have
    them, and floats are cast to the dtypes of the tensors that they replace. Rotations
    are not folded. transformers 5 does not read codes of experts; vLLM was not tried.

    Args:
      codes: the result of `quantize(params, rules)`, with the paths and shapes of
        `config.shapes()`. All matrices but the embedding may be codes. With a template,
        the parameters of its model, in any tree: by the names of its files, as
        `read_tensors` returns them, or by names that `names` maps to them.
      config: the model's dimensions; or the folder of a transformers model of float32,
        float16 or bfloat16, in safetensors. Scales must have its dtype, or it float32.
      path: path of the folder.
      names: with a template, what the parameters are called in it. None for its own
        names, and for those of this library's Llama; "flax" for the Flax models of
        transformers; "tunix" for Llama 3, Qwen 2 and Qwen 3 of tunix;
        "maxtext_qwen" for Qwen 2 and Qwen 3 of MaxText; or a list of `TensorName`s.
      tokenizer: the tokenizer's files by name, such as "tokenizer.json", as bytes; or
        the folder that contains them.
      dtype: dtype of the model and of all unquantized parameters: "float32", "float16"
        or "bfloat16"; None for "bfloat16" with FP4, otherwise "float32". Readers round
        scales to it, so float32 scales need "float32". They decode FP4 as bfloat16, so
        FP4 needs "bfloat16".
      shard_bytes: maximum bytes of tensors in one file; None for 5 * 10**9.
      overwrite: whether to replace a folder that an export wrote, with nothing else
        in it.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if it
        holds anything that no export wrote.
      TypeError: if a leaf is neither floats nor a `QuantizedArray`.
      FileNotFoundError: if there is no such template.
      MalformedFileError: if the template is damaged.
      ValueError: if the format cannot hold a parameter, or if the parameters are not
        those of `config`: each of its tensors needs one. If a template is quantized
        already, or `tokenizer`, `dtype` or `shard_bytes` is given with it.

    Example:
      >>> import tempfile
      >>> import cage_jax as cage
      >>> from cage_jax import llama
      >>> from cage_jax.export.compressed_tensors import compressed_tensors, read
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> weights = cage.ct_w4a16(axis=-2, group_size=32)  # of (layers, in, out)
      >>> rules = cage.Rules([("layers/.*/kernel", weights), (".*", None)])
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
    if isinstance(config, str | os.PathLike):
        given = {"tokenizer": tokenizer, "dtype": dtype, "shard_bytes": shard_bytes}
        check_none(given, "a folder as template, which is copied")
        write_by_template(codes, config, path, names=names, overwrite=overwrite)
        return
    check_none({"names": names}, "a LlamaConfig, whose names are known")
    if dtype is None:
        dtype = "bfloat16" if _has_fp4(codes) else "float32"
    with contextlib.suppress(TypeError):
        dtype = jnp.dtype(dtype).name
    check_choice("dtype", dtype, FLOATS)
    shard_bytes = _SHARD_BYTES if shard_bytes is None else shard_bytes
    check_int("shard_bytes", shard_bytes, "Use 5 * 10**9.", least=1)
    files = tokenizer_files.resolve(tokenizer, config)
    schemes: dict[str, Scheme | None] = {}  # by module, for all linear layers

    def named_arrays() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in tensors(codes, config):
            module = _module(tensor.names, tensor.layer)
            scheme = scheme_of(tensor, dtype)
            if tensor.names.is_kernel:
                schemes[module] = scheme
            for suffix, array in stored_arrays(tensor, scheme, dtype).items():
                yield f"{module}.{suffix}", array

    with new_folder(path, overwrite=overwrite) as folder:
        write_shards(folder, named_arrays(), shard_bytes)
        if config.tied:
            schemes["lm_head"] = None
        content = config.to_huggingface(dtype)
        if any(schemes.values()):
            content["quantization_config"] = quantization_config(schemes)
        write_json(folder / "config.json", content)
        tokens = {name: content[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", tokens)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    warn_of_mixed_layers(schemes, path)


def _has_fp4(codes):
    return any(
        isinstance(leaf, QuantizedArray) and leaf.quantizer.format == Float("e2m1")
        for leaf in by_path(codes).values()
    )


def _module(names, layer):
    return names.huggingface.format(layer).removesuffix(f".{names.suffix}")


def read(path: Path) -> Model:
    """Reads a folder of `compressed_tensors`, or a Llama of floats from Hugging Face.

    Mistral, Qwen 2 and Qwen 3 are read too, see `LlamaConfig`.

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
    folder = as_path(path)
    content = read_json(inside(folder, "config.json"))
    try:
        config = LlamaConfig.from_huggingface(content)
    except (TypeError, ValueError) as error:
        raise MalformedFileError(f"config.json: {error}") from error
    schemes = declared_schemes(content.get("quantization_config"))
    arrays = read_shards(folder)
    check_read(arrays)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = config.tied and head in arrays and embedding in arrays
    if both and np.array_equal(arrays[head], arrays[embedding]):
        del arrays[head]
    found = {}
    for names, layer, shape in expected_tensors(config):
        module = _module(names, layer)
        stored = {
            suffix: arrays.pop(f"{module}.{suffix}")
            for suffix in (SUFFIXES if names.suffix == "weight" else (names.suffix,))
            if f"{module}.{suffix}" in arrays
        }
        found[names.path, layer] = (
            kernel_of(module, stored, shape, schemes)
            if names.is_kernel
            else floats_of(module, stored, shape, names.suffix)
        )
    more = [name for name in arrays if not name.endswith("rotary_emb.inv_freq")]
    if more:
        raise malformed(
            "the files must have only the tensors of a Llama",
            f"{len(more)} more, such as {more[:3]}",
            "Other models are not read yet.",
        )
    return Model(tree_of(found, config), config, tokenizer_files.read_folder(folder))


TARGET = Target(
    written_by="export.compressed_tensors",
    read_by="transformers, vLLM",
    holds="`ct_w4a16(group_size=32)`, `ct_w8a8()`, other `int4` and `int8` by groups "
    "or channels, `fp8()`, `mxfp4()`, `nvfp4()`",
    recognises=lambda path: has(path, "config.json"),
    read=read,
    write=compressed_tensors,
    takes_template=True,
    presets=(
        *("q4_0", "q8_0", "ct_w4a16", "ct_w8a8", "fp8", "mxfp4", "nvfp4"),
        *("int8", "int4", "int3", "int2", "ternary"),
    ),
    lacks=lambda codes: (
        "Readers decode FP4 as bfloat16, so all unquantized parameters are rounded to "
        "bfloat16."
        if _has_fp4(codes)
        else ""
    ),
)
