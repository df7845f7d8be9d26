"""GGUF, for llama.cpp: one file, of a Llama or by template, with codes bit for bit."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from cage_jax.arrays.checks import check_choice
from cage_jax.export import tokenizer_files
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    as_path,
    check_installed,
    check_none,
    malformed,
)
from cage_jax.export.gguf_blocks import array_of, file_type, layout_of, rows_of
from cage_jax.export.gguf_files import MAGIC, WRITER, is_export, read_content
from cage_jax.export.gguf_templates import write_by_template
from cage_jax.export.gguf_tokenizer import files_of, metadata_of, special_ids
from cage_jax.export.target import Target
from cage_jax.export.template_names import TensorName
from cage_jax.export.writing import new_file
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.config_fields import in_terms_of
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import (
    PARAMETERS,
    expected_tensors,
    tensors,
    tree_of,
)

FloatDtype = Literal["float32", "float16"]

# Keys of the dimensions that each file must have.
_DIMENSIONS = {
    "width": "llama.embedding_length",
    "hidden": "llama.feed_forward_length",
    "layers": "llama.block_count",
    "heads": "llama.attention.head_count",
    "context": "llama.context_length",
}
# All keys of the model that are read.
_READ = _DIMENSIONS | {
    "vocabulary": "llama.vocab_size",
    "kv_heads": "llama.attention.head_count_kv",
    "head_size": "llama.attention.key_length",
    "norm_epsilon": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}


def gguf(
    codes: Any,
    config: LlamaConfig | Path,
    path: Path,
    *,
    names: str | Sequence[TensorName] | None = None,
    tokenizer: Mapping[str, bytes] | Path | None = None,
    float_dtype: FloatDtype | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    r"""Writes a GGUF file for llama.cpp and programs based on it.

    Codes and scales are written unchanged, in Q4_0, Q4_1, Q8_0 and MXFP4 blocks, which
    hold the codes of the presets `q4_0`, `q4_1`, `q8_0` and `mxfp4`. Other integer
    codes fit too if they are symmetric, in groups of 32 along the inputs, and with
    float16 scales, such as those of `ct_w4a16(group_size=32)`. Codes of 2 and 3 bits
    take 4 bits in the file, codes of 5 to 7 bits take 8. TQ2_0 holds ternary codes,
    those of `int2` in groups of 256, with float16 scales. `read` gives all of them the
    same values, with the quantizer of the preset.

    The rows of queries and keys are reordered, because llama.cpp rotates neighbouring
    features where others rotate the two halves of a head. llama.cpp also rounds the
    inputs of quantized layers to 8 bits in blocks of 32: on a CPU it computes the same
    as `llama.logits` with `inputs=q8_0()`.

    A model of any architecture is written with its own GGUF as template, in place of a
    config. The file is copied, metadata and tokenizer byte for byte, but for the type
    of the file and who quantized it. Codes take the place of the matrices that have
    them, and floats are cast to the types of the tensors that they replace. Tensors
    that are codes in the template are kept, unless there are new codes for them.
    Parameters under their names in the file have the rows of the file, as
    `read_tensors` returns them. The rows of others, which `names` maps, are those of
    transformers: of queries and keys they are reordered, and 1 is added to norms, as
    llama.cpp's converter does for the architecture.

    Args:
      codes: the result of `quantize` for parameters with the paths and shapes of
        `config.shapes()`: codes of kernels along axis -2, codes of the embedding along
        axis -1, and floats. With a template, the parameters of its model, in any tree.
      config: the model's dimensions; or the GGUF file of a model.
      path: path of the file.
      names: with a template, what the parameters are called in it. None for its own
        names, and for those of this library's Llama; "transformers" for the names of
        transformers, as `read_tensors(folder)` has them; or a list of `TensorName`s.
      tokenizer: the files of a byte-level BPE by name, as bytes: "tokenizer.json" and
        "tokenizer_config.json", which names the token that ends a text; or the folder
        that contains them. With None the file has no vocabulary. llama.cpp's library
        then takes tokens by number; its server, which answers in text, loads such a
        file but stops at the first answer.
      float_dtype: dtype of unquantized parameters, "float32" or "float16"; norms are
        always float32. None for "float32".
      name: name of the model; None for the name of the file.
      overwrite: whether to replace a file that this function wrote.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if
        this function did not write it.
      FileNotFoundError: if there is no such template.
      MalformedFileError: if the template is damaged.
      TypeError: if `config` is no `LlamaConfig` and no path, or if a leaf is neither
        codes nor floats.
      ValueError: if the format cannot hold the codes, floats or tokenizer; the error
        names the parameter and what would fit. If the model is no plain Llama, or the
        parameters are not those of a template. If `tokenizer`, `float_dtype` or `name`
        is given with it, or if its architecture is unknown and `names` maps its queries
        and keys.

    Example:
      >>> import cage_jax as cage
      >>> import pathlib, tempfile
      >>> from cage_jax import llama
      >>> from cage_jax.export.gguf import gguf, read
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=96, layers=2, heads=4)
      >>> rules = cage.Rules(
      ...     [
      ...         (".*embedding", cage.q8_0(axis=-1)),
      ...         (".*kernel", cage.q4_0(axis=-2)),
      ...         (".*", None),
      ...     ]
      ... )
      >>> codes = cage.quantize(llama.initial_params(config, seed=0), rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.gguf")
      ...     gguf(codes, config, path)
      ...     model = read(path)
      >>> print(model.params["layers"]["query"]["kernel"].quantizer)
      int4 full range signed max, group 32 of axis -2, float16 scales, identity

      Any model, with its own file as template; here it is the same one:

      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> gguf(llama.initial_params(config, seed=0), config, folder / "floats.gguf")
      >>> tensors = cage.export.read_tensors(folder / "floats.gguf")
      >>> weights = cage.q4_0(axis=-1)  # of (out, in)
      >>> rules = cage.Rules([(r"blk.*(up|down)\.weight", weights), (".*", None)])
      >>> codes = cage.quantize(tensors, rules)
      >>> gguf(codes, folder / "floats.gguf", folder / "q4_0.gguf")

    Source: ggml's `docs/gguf.md`; `convert_hf_to_gguf.py` of llama.cpp.
    """
    check_installed("gguf", "writing a GGUF")
    import gguf as ggml

    path = as_path(path)
    if isinstance(config, str | os.PathLike):
        given = {"tokenizer": tokenizer, "float_dtype": float_dtype, "name": name}
        check_none(given, "a GGUF as template, which is copied")
        write_by_template(codes, config, path, names=names, overwrite=overwrite)
        return
    check_none({"names": names}, "a LlamaConfig, whose names are known")
    float_dtype = "float32" if float_dtype is None else float_dtype
    check_choice("float_dtype", float_dtype, get_args(FloatDtype))
    # Two walks over the tensors, so that only one of them is in memory at a time.
    layouts = [
        layout_of(array, each.path_in(layer), _axis(each), float_dtype)
        for each, layer, array in tensors(codes, config)
    ]
    _check_plain(config)
    metadata = _metadata(config, name or path.stem)
    metadata |= metadata_of(tokenizer_files.resolve(tokenizer, config), config)
    metadata["general.file_type"] = file_type(layouts)
    with new_file(path, is_export=is_export, overwrite=overwrite) as temporary:
        writer = ggml.GGUFWriter(temporary, "llama")
        try:
            for key, value in metadata.items():
                kind = ggml.GGUFValueType.get_type(value)
                if kind == ggml.GGUFValueType.INT32:
                    kind = ggml.GGUFValueType.UINT32
                writer.add_key_value(key, value, kind)
            writer.add_quantization_version(ggml.GGML_QUANT_VERSION)
            for (each, layer, _), layout in zip(expected_tensors(config), layouts):
                count = layout.shape[0] if len(layout.shape) > 1 else 1
                writer.add_tensor_info(
                    each.gguf.format(layer),
                    layout.shape,
                    np.dtype(np.float32),  # ignored, because the raw dtype is given
                    count * layout.row_bytes,
                    ggml.GGMLQuantizationType[layout.kind],
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (each, layer, array), layout in zip(tensors(codes, config), layouts):
                rows = rows_of(array, each.path_in(layer), layout, _axis(each))
                order = _row_order(each, config, back=False)
                writer.write_tensor_data(rows if order is None else rows[order])
        finally:
            writer.close()


def read(path: Path) -> Model:
    """Reads a Llama from a GGUF file.

    Q4_0, Q4_1, Q8_0, MXFP4 and TQ2_0 become codes, with the quantizers of the presets.
    If the layers of a parameter have different types, it becomes floats. F32, F16 and
    BF16 become float32; so do other types, such as Q4_K, which the package gguf
    decodes.

    Args:
      path: path of the file.

    Returns:
      A `Model`. It has a tokenizer only for a byte-level BPE that splits text like
      GPT-2, SmolLM or Llama 3.

    Raises:
      FileNotFoundError: if there is no file.
      MalformedFileError: if the file is truncated, damaged or malicious, or if its
        model is not supported, such as one with scaled rotary embeddings.

    Example:
      >>> import pathlib, tempfile
      >>> from cage_jax import llama
      >>> from cage_jax.export.gguf import gguf, read
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=96, layers=2, heads=4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.gguf")
      ...     gguf(llama.initial_params(config, seed=0), config, path)
      ...     model = read(path)
      >>> model.config == config, model.params["norm"]["scale"].shape
      (True, (64,))
    """
    metadata, found, *_ = read_content(path)
    count = metadata.get("split.count")
    if isinstance(count, int) and count > 1:
        remedy = "Merge them with llama.cpp's llama-gguf-split --merge."
        raise malformed(
            "the file must be a whole model", f"one of {count} parts", remedy
        )
    config = _config(metadata, found)
    _check_count(found, config)
    arrays = {
        (names.path, layer): _array(found, names, layer, shape, config)
        for names, layer, shape in expected_tensors(config)
    }
    return Model(tree_of(arrays, config), config, files_of(metadata))


# --- writing --------------------------------------------------------------------------


def _check_plain(config):
    """Raises for what a file of a Llama cannot say, and so would lose."""
    for name in ("qkv_bias", "qk_norm", "rope_scaling", "window"):
        if value := getattr(config, name):
            raise ValueError(
                f"`config` must be of a plain Llama; got {name}={value!r}. "
                f"Pass the model's own GGUF in its place, which llama.cpp's "
                f"convert_hf_to_gguf.py makes."
            )


def _metadata(config, name):
    dimensions = {key: getattr(config, name) for name, key in _DIMENSIONS.items()}
    return {
        "general.type": "model",
        "general.name": name,
        **WRITER,
        **dimensions,
        "llama.vocab_size": config.vocabulary,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_size,
        "llama.attention.value_length": config.head_size,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "llama.rope.dimension_count": config.head_size,
        "llama.rope.freq_base": float(config.rope_theta),
    }


# --- both -----------------------------------------------------------------------------


def _axis(names):
    """Returns our axis that is the last one in the file."""
    return -2 if names.is_kernel else -1


def _row_order(names, config, *, back):
    """Returns the new order of rows of queries and keys, or None for other parameters.

    llama.cpp rotates neighbouring features, like the original Llama weights; we rotate
    the two halves of a head.
    """
    heads = {"query": config.heads, "key": config.kv_heads}
    name = names.path.split("/")[1]
    if not (names.is_kernel and name in heads):
        return None
    parts = (-1, 2) if back else (2, -1)
    rows = np.arange(heads[name] * config.head_size)
    return rows.reshape(heads[name], *parts).swapaxes(1, 2).ravel()


# --- reading --------------------------------------------------------------------------


def _config(metadata, found):
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind != "llama":  # arrays compare as arrays
        _refuse("have general.architecture 'llama'", repr(kind)[:80])

    def value(key, default=None):
        if key not in metadata and default is None:
            _refuse(f"have {key}", "none")
        return metadata.get(key, default)

    def real(key, default=None):
        # Use the shortest decimal of this float32: 1e-05, not 9.999999747378752e-06.
        number = value(key, default)
        if not isinstance(number, float):
            return number
        with np.errstate(over="ignore"):
            return float(str(np.float32(number)))

    tokens = metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) else value("llama.vocab_size")
    try:
        bos, eos = special_ids(metadata, vocabulary)
        config = LlamaConfig(
            vocabulary=vocabulary,
            **{name: value(key) for name, key in _DIMENSIONS.items()},
            kv_heads=metadata.get("llama.attention.head_count_kv"),
            head_size=metadata.get("llama.attention.key_length"),
            rope_theta=real("llama.rope.freq_base", 10_000.0),
            norm_epsilon=real("llama.attention.layer_norm_rms_epsilon"),
            tied=PARAMETERS["head/kernel"].gguf not in found,
            bos=bos,
            eos=eos,
        )
    except (TypeError, ValueError) as error:
        message = in_terms_of(error, _READ)
        raise MalformedFileError(f"the file's metadata: {message}") from error
    _check_keys(metadata, config)
    return config


def _check_keys(metadata, config):
    """Raises for a key of the model that is not read, except one without effect."""
    same = (config.head_size,)
    without_effect = {
        "llama.attention.value_length": same,
        "llama.rope.dimension_count": same,
        "llama.rope.scaling.type": ("none",),
        "llama.rope.scaling.factor": (0, 1),
        "llama.rope.scaling.attn_factor": (1,),
        "llama.rope.scale_linear": (0, 1),
        "llama.attention.causal": (True,),
        "llama.attention.sliding_window": (0,),
        "llama.attention.scale": (0,),
        "llama.attn_logit_softcapping": (0,),
        "llama.final_logit_softcapping": (0,),
        "llama.logit_scale": (0,),
        # The only layout of queries and keys, which some files name.
        "llama.tensor_data_layout": ("Meta AI original pth",),
        "llama.expert_count": (0,),
        "llama.expert_used_count": (0,),
    }
    for key, value in metadata.items():
        if not key.startswith("llama.") or key in _READ.values():
            continue
        supported = without_effect.get(key)
        if supported is None:
            _refuse("have keys that are known to compute a Llama", f"{key[:80]}")
        if isinstance(value, np.ndarray | list) or value not in supported:
            _refuse(f"have {key} {supported[0]}", repr(value)[:80])


def _check_count(found, config):
    count = sum(1 for _ in expected_tensors(config))
    if len(found) == count:
        return
    known = [PARAMETERS[path].gguf for path in config.shapes()]
    endings = tuple(name.partition(".{}.")[2] or name for name in known)
    others = [name for name in found if not name.endswith(endings)]
    _refuse(
        f"have {count} tensors for a Llama of {config.layers} layers",
        f"{len(found)}, {f'with {others[:3]}' if others else 'of known names'}",
    )


def _array(found, names, layer, shape, config):
    """Reads a tensor, with the rows in our order."""
    name = names.gguf.format(layer)
    shape = shape[::-1] if names.is_kernel else shape
    if name not in found:
        _refuse(f"have {name}", "none")
    stored = found[name]
    if stored.shape != shape:
        _refuse(f"have the shape {shape} for {name}", stored.shape)
    order = _row_order(names, config, back=True)
    if order is not None:
        rows = stored.data.reshape(len(order), -1)[order]
        stored = stored._replace(data=rows.ravel())
    return array_of(stored, _axis(names))


def _refuse(rule, got) -> NoReturn:
    remedy = "Get the file again, or use a plain Llama: other models are not read yet."
    raise malformed(f"the file must {rule}", got, remedy)


def is_file(path: pathlib.Path) -> bool:
    """Tells whether a path is a file that begins like GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


TARGET = Target(
    written_by="export.gguf",
    read_by="llama.cpp",
    holds="`q4_0()`, `q4_1()`, `q8_0()`, `mxfp4()`; the embedding with `axis=-1`",
    recognises=is_file,
    read=read,
    write=gguf,
    takes_template=True,
    suffix=".gguf",
    is_export=is_export,
    presets=("q4_0", "q4_1", "q8_0", "mxfp4"),
    packages=("gguf",),
)
