"""GGUF of any model, with its own GGUF as template: read, and written with codes.

What is not replaced is copied from file to file, metadata and tokenizer too.
"""

import dataclasses
import functools
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.compressed_tensors_arrays import stored_floats
from cage_jax.export.copying import copy_range, mapped_place
from cage_jax.export.files import Path, as_path, check_installed, malformed
from cage_jax.export.gguf_blocks import (
    DTYPES,
    KINDS,
    WHAT_FITS,
    Layout,
    array_of,
    block_rows,
    file_type,
    kind_of,
    row_bytes,
)
from cage_jax.export.gguf_files import (
    MAGIC,
    WRITER,
    Content,
    is_export,
    padded,
    read_content,
)
from cage_jax.export.safetensors_files import Like
from cage_jax.export.template_names import (
    GGUF_TABLES,
    OF_TRANSFORMERS,
    Source,
    TensorName,
    is_own_name,
    sources_of,
    table_of,
)
from cage_jax.export.template_parts import coded_tensors, leaves_of, whole_of
from cage_jax.export.writing import new_file
from cage_jax.quantizers.quantizer import Quantizer

# Architectures whose rotary embeddings turn neighbouring features in llama.cpp, and the
# two halves of a head in transformers: its converter reorders the rows of q and k.
_REORDERED = frozenset(
    {
        *("llama", "arcee", "smollm3", "granite", "granitemoe", "minicpm"),
        *("olmo", "arctic", "deepseek"),
    }
)
# Those whose converter leaves the rows alone.
_AS_THEY_ARE = frozenset(
    {
        *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3"),
        *("phi3", "starcoder2", "command-r", "cohere2", "olmo2", "olmoe", "nemotron"),
    }
)
# Those whose converter adds 1 to the weights of norms.
_NORMS_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
_QUERY_OR_KEY = re.compile(r"(?:.*\.)?attn_(q|k|qkv)\.(?:weight|bias)")
_NORM = re.compile(r".*norm\.weight")
# Matrices that llama.cpp's own llama-quantize leaves alone.
_NO_PRODUCT = re.compile(
    r".*(?:_norm|ffn_gate_inp|ssm_conv1d|shortconv\.conv|attn_rel_b|position_embd|"
    r"token_types)\.weight|.*(?:altup|laurel|per_layer_model_proj|time_mix_).*"
)
_TEXT, _NUMBER = 8, 4  # types of values


@dataclasses.dataclass(frozen=True)
class Template:
    """A GGUF file.

    Attributes:
      path: its path.
      content: what it holds.
    """

    path: pathlib.Path
    content: Content

    @functools.cached_property
    def tensors(self) -> dict[str, Like]:
        """The dtype and shape of each tensor by name; the dtype of bytes for blocks."""
        return {
            name: Like(DTYPES.get(stored.kind, np.dtype(np.uint8)), stored.shape)
            for name, stored in self.content.tensors.items()
        }

    @functools.cached_property
    def architecture(self) -> str:
        """Name of the model's architecture, such as "qwen2"."""
        name = self.content.metadata.get("general.architecture")
        if not isinstance(name, str):
            rule = f"{self.path.name} must have a text as general.architecture"
            raise malformed(rule, repr(name)[:80])
        return name

    def holds(self, name: str, array: Any) -> bool:
        """Tells whether an array is a tensor's own bytes, mapped by `read_tensors`."""
        place = self.path.resolve(), self.content.tensors[name].begin
        return (
            mapped_place(array) == place
            and Like(array.dtype, array.shape) == self.tensors[name]
        )


def read_template(path: Path, argument: str = "config") -> Template:
    """Reads what a GGUF file holds, but no tensors.

    Raises:
      FileNotFoundError: if there is no such file.
      MalformedFileError: if it is damaged.
      ValueError: if it is a folder, or a part of a model.
    """
    check_installed("gguf", "reading a GGUF")
    file = as_path(path, argument)
    if not file.exists():
        raise FileNotFoundError(
            f"`{argument}` must be a GGUF file; got {str(path)!r}, which does not "
            f"exist. Make one with llama.cpp's convert_hf_to_gguf.py."
        )
    if file.is_dir():
        raise ValueError(
            f"`{argument}` must be a GGUF file; got {file}, a folder. Make one of it "
            f"with llama.cpp's convert_hf_to_gguf.py."
        )
    content = read_content(file)
    if not content.tensors:
        raise malformed(f"{file.name} must have tensors", "none")
    count = content.metadata.get("split.count")
    if isinstance(count, int) and count > 1:
        raise ValueError(
            f"`{argument}` must be a whole model; got {file}, a part of one. Merge all "
            f"of them with llama.cpp's llama-gguf-split --merge."
        )
    return Template(file, content)


def read_gguf_tensors(path: Path) -> dict[str, Any]:
    """Reads the tensors of a GGUF file by name, see `read_tensors`."""
    template = read_template(path, "folder")
    found: dict[str, Any] = {}
    for name, stored in template.content.tensors.items():
        if stored.kind in DTYPES:
            like = template.tensors[name]
            found[name] = stored.data.view(like.dtype).reshape(like.shape)
            continue
        codes = array_of(stored, -1) if stored.kind in KINDS else None
        if not isinstance(codes, QuantizedArray):
            raise ValueError(
                f"`{name}`: the tensors of `folder` must be floats, or matrices of "
                f"codes of {', '.join(KINDS)}; got {stored.kind}. Use the GGUF of "
                f"floats from which it was quantized."
            )
        found[name] = codes
    return found


def write_by_template(
    codes: Any, file: Path, path: Path, *, names: Any, overwrite: bool
) -> None:
    """Writes a copy of a GGUF with codes, see `gguf`."""
    template = read_template(file)
    tensors, leaves = template.tensors, leaves_of(codes)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    table = table_for(names, shapes, template)
    sources = sources_of(shapes, tensors, table)
    _check_quantized(sources, leaves, template)
    coding = functools.partial(_coding, template=template)
    coded = coded_tensors(sources, leaves, tensors, coding, "GGUF")
    changes = {name: change_of(name, sources[name], template) for name in sources}
    layouts = {}
    for name, stored in template.content.tensors.items():
        kind = coded[name].kind if name in coded else stored.kind
        layouts[name] = Layout(kind, stored.shape, row_bytes(kind, stored.shape))

    def rows_of(name):
        parts = sources[name]
        if name in coded:
            whole = whole_of(parts, leaves, coded[name].quantizer)
            rows = block_rows(whole, coded[name].kind)
        else:
            whole = whole_of(parts, leaves)
            if changes[name].plus:
                whole = whole.astype(np.float32) + np.float32(changes[name].plus)
            paths = " and ".join(part.path for part in parts)
            values = stored_floats(whole, tensors[name].dtype.name, paths)
            rows = np.ascontiguousarray(values).reshape(len(values), -1)
        order = changes[name].order
        return rows if order is None else rows[order]

    replaced = [
        name
        for name, parts in sources.items()
        if changes[name].order is not None
        or changes[name].plus
        or not template.holds(name, leaves[parts[0].path])
    ]
    with new_file(path, is_export=is_export, overwrite=overwrite) as temporary:
        _write(template, temporary, layouts, replaced, rows_of)


def table_for(
    names: Any, paths: Iterable[str], template: Template
) -> Sequence[TensorName]:
    """Resolves a `names` argument for parameters with these paths, see `gguf`.

    Raises:
      TypeError, ValueError: if it is no table.
    """
    lines = _lines_of_transformers(paths, template) if names == OF_TRANSFORMERS else []
    return table_of(names, {**GGUF_TABLES, OF_TRANSFORMERS: lines})


def _lines_of_transformers(paths, template):
    """Returns a table for parameters by the names of transformers, from the package."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    lines = {}
    for kind, architecture in MODEL_ARCH_NAMES.items():
        if architecture != template.architecture:
            continue
        known = get_tensor_name_map(kind, 1)
        for path in sorted(paths, key=_numbers):
            pieces = re.split(r"\d+", path, maxsplit=1)  # around the block's number
            first = "0".join(pieces).replace("/", ".")
            # The experts of a block are the places of one tensor, by their numbers.
            first = re.sub(r"\.experts\.\d+\.", ".experts.", first)
            if name := known.get_name(first, (".weight", ".bias")):
                pattern = r"(\d+)".join(map(re.escape, pieces))
                tensor = name.replace("blk.0.", r"blk.\1.")
                lines[pattern] = TensorName(pattern, tensor)
    return list(lines.values())


def _numbers(path):
    return [int(number) for number in re.findall(r"\d+", path)]


class _Coded(NamedTuple):
    """A tensor that becomes codes: its type, and its quantizer for (out, in)."""

    kind: str
    quantizer: Quantizer


def _check_quantized(sources, leaves, template):
    """Raises for floats where the template has codes."""
    for name, parts in sources.items():
        kind = template.content.tensors[name].kind
        is_codes = [isinstance(leaves[part.path], QuantizedArray) for part in parts]
        if kind not in DTYPES and not all(is_codes):
            raise ValueError(
                f"`{parts[0].path}`: `codes` must have codes for `{name}`, which has "
                f"{kind} in the template; got floats. Quantize it, or leave it out to "
                f"keep that."
            )


def _coding(name, like_all, template):
    """Finds the type of a tensor of codes; raises ValueError if there is none."""
    shape = template.tensors[name].shape
    if len(shape) < 2 or _NO_PRODUCT.fullmatch(name) or not name.endswith(".weight"):
        raise ValueError(
            f"codes for `{name}` {list(shape)}, but llama.cpp takes only matrices of "
            f"products and of embeddings. Leave it unquantized."
        )
    quantizer = like_all.quantizer
    kind = kind_of(like_all, quantizer.group_sizes[0] or shape[-1])
    if kind is None:
        raise ValueError(
            f"{quantizer}, which GGUF does not hold. Choose one of {WHAT_FITS}, or "
            f"leave it unquantized."
        )
    return _Coded(kind, quantizer)


class Change(NamedTuple):
    """What llama.cpp's converter does to a tensor of transformers.

    Attributes:
      order: the row of transformers that each row of the file is; None for the same.
      plus: what it adds.
    """

    order: np.ndarray | None = None
    plus: int = 0


def change_of(name: str, parts: Sequence[Source], template: Template) -> Change:
    """Finds what is done to the parts of a tensor to be as in the file.

    Raises:
      ValueError: if the converter is not known for the architecture.
    """
    if all(is_own_name(part.path, name) for part in parts):
        return Change()
    adds_one = template.architecture in _NORMS_PLUS_ONE and _NORM.fullmatch(name)
    return Change(_row_order(name, template), 1 if adds_one else 0)


def _row_order(name, template):
    """Returns the order of rows in the file of a tensor of transformers, or None."""
    architecture = template.architecture
    if architecture in _AS_THEY_ARE:
        return None
    known = architecture in _REORDERED
    match = _QUERY_OR_KEY.fullmatch(name)
    part = match[1] if match else ""
    if not part and (known or not _NORM.fullmatch(name)):
        return None
    if not known or part == "qkv":
        raise ValueError(
            f"`codes` must have `{name}` under this name, with the rows that "
            f"read_tensors has, since it is not known what llama.cpp's converter does "
            f"to it for the architecture {architecture!r}; got it under another name, "
            f"in the layout of transformers. Rename it, or take it from read_tensors."
        )
    heads = template.content.metadata.get(f"{architecture}.attention.head_count")
    if part == "k":
        key = f"{architecture}.attention.head_count_kv"
        heads = template.content.metadata.get(key, heads)
    rows = template.tensors[name].shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        rule = f"{template.path.name} must have a number of heads that divides {rows}"
        raise malformed(rule, repr(heads)[:80])
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


# --- writing --------------------------------------------------------------------------


def _write(
    template: Template,
    path: pathlib.Path,
    layouts: Mapping[str, Layout],
    replaced: list[str],
    rows_of: Callable[[str], np.ndarray],
) -> None:
    """Writes a template with some of its tensors replaced, one of them in memory."""
    content = template.content
    sizes = {
        name: layout.row_bytes * int(np.prod(layout.shape[:-1], dtype=np.int64))
        for name, layout in layouts.items()
    }
    start, places = _start(content, layouts, sizes)
    with template.path.open("rb") as old, path.open("wb") as new:
        new.write(start)
        new.flush()
        for name, stored in content.tensors.items():
            if name in replaced:
                rows = rows_of(name)
                assert rows.nbytes == sizes[name], name
                new.seek(places[name])
                new.write(rows.view(np.uint8).data)
                new.flush()
            else:
                begin, place = stored.begin, places[name]
                copy_range(old.fileno(), new.fileno(), begin, sizes[name], place)
        end = max((places[name] + sizes[name] for name in sizes), default=len(start))
        new.truncate(padded(end, content.alignment))


def _start(content, layouts, sizes):
    """Returns what comes before the tensors, and where each of them begins."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType

    keys = dict(content.stored_keys)
    changed = any(layouts[n].kind != each.kind for n, each in content.tensors.items())
    numbers = {}
    if changed:
        numbers["general.file_type"] = file_type(layouts.values())
        numbers["general.quantization_version"] = GGML_QUANT_VERSION
    for key, number in numbers.items():
        keys[key] = _text(key) + struct.pack("<II", _NUMBER, number)
    for key, text in WRITER.items():
        keys[key] = _text(key) + struct.pack("<I", _TEXT) + _text(text)
    counts = struct.pack("<IQQ", content.version, len(layouts), len(keys))
    parts = [MAGIC, counts, *keys.values()]
    places, end = {}, 0
    for name, layout in layouts.items():
        dims = layout.shape[::-1]
        parts.append(_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        kind = GGMLQuantizationType[layout.kind]
        parts.append(struct.pack("<IQ", kind, end))
        places[name], end = end, padded(end + sizes[name], content.alignment)
    start = b"".join(parts)
    start += bytes(padded(len(start), content.alignment) - len(start))
    return start, {name: len(start) + place for name, place in places.items()}


def _text(text):
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
