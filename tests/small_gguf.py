"""GGUF files as the package gguf writes them, with other tensors or metadata."""

import gguf as ggml
import jax.numpy as jnp
import numpy as np

# The tensors of a model that no program knows: names, types and shapes.
TENSORS = {
    "token_embd.weight": ("BF16", (11, 256)),
    "blk.0.attn_norm.weight": ("F32", (64,)),
    "blk.0.attn_q.weight": ("F16", (24, 64)),
    "blk.0.attn_q.bias": ("F32", (24,)),
    "blk.0.ffn_up_exps.weight": ("F16", (3, 8, 64)),
    "blk.0.ffn_up.weight": ("F16", (40, 64)),
    "blk.0.ffn_down.weight": ("F32", (8, 512)),
    "blk.0.ffn_gate_inp.weight": ("F32", (3, 64)),
    "rope_freqs.weight": ("F32", (5,)),
    "output.weight": ("F16", (11, 64)),
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": jnp.bfloat16}


def rewritten(path, new, replace, metadata=()):
    """Copies a file, with other tensors and more metadata.

    Args:
      path: of the file.
      new: of the copy.
      replace: gives the data and the type of a tensor, from its name and its data.
      metadata: more of it: keys, values and types.
    """
    reader = ggml.GGUFReader(path)
    writer = ggml.GGUFWriter(new, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for key, value, kind in metadata:
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        data, kind = replace(tensor.name, tensor.data)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_of(path, rng, tensors=TENSORS, architecture="new", **numbers):
    """Writes a GGUF of random tensors with metadata of all types."""
    writer = ggml.GGUFWriter(path, architecture)
    writer.add_string("general.name", "é\0x")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("new.flag", True)
    writer.add_uint64("new.long", 2**40)
    writer.add_file_type(1)
    for key, value in numbers.items():
        writer.add_uint32(key.replace("_DOT_", "."), value)
    for name, (kind, shape) in tensors.items():
        raw = ggml.GGMLQuantizationType[kind]
        if kind in DTYPES:
            data = rng.standard_normal(shape).astype(DTYPES[kind])
            data = data.view(np.uint16) if kind == "BF16" else data
            writer.add_tensor(name, data, raw_dtype=raw)
        else:
            size, width = ggml.GGML_QUANT_SIZES[raw]
            rows = (*shape[:-1], shape[-1] // size * width)
            data = rng.integers(0, 100, rows, dtype=np.uint8)
            writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
