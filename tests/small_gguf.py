"""GGUF files as the package gguf writes them, with other tensors or metadata."""

import gguf as ggml


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
