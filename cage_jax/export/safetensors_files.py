"""safetensors files: arrays of any dtype by name, in one file or several."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cage_jax.export.files import Path, has, inside, malformed, read_json, write_json

# Dtypes of at least one byte by their names in files, little-endian.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_DIMENSIONS = 16
# A parsed header takes many times as much memory. Real headers have about 0.1 MB.
_MOST_HEADER = 4 * 2**20


def write(
    path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to one file.

    It does not use the library, whose handling of dtypes that NumPy lacks differs
    between versions.

    Args:
      path: path of the file.
      arrays: arrays by name.
      metadata: texts by name.

    Raises:
      TypeError: if the format lacks the dtype of an array, such as int4.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    like = {name: Like(array.dtype, array.shape) for name, array in contiguous.items()}
    start, places = layout(like, metadata)
    with pathlib.Path(path).open("wb") as file:
        file.write(start)
        for name in places:
            file.write(contiguous[name].tobytes())


class Like(NamedTuple):
    """The dtype and the shape of an array."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(
    arrays: Mapping[str, Like], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Returns the begin of a file, and where in it each array begins, in that order.

    Raises:
      TypeError: if the format lacks the dtype of an array, such as int4.
    """
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise TypeError(
                f"`{name}`: an array must have a dtype that safetensors has; got "
                f"{array.dtype}. Pack its codes into bytes first."
            )
    # Sorted by width, so that each array begins at a multiple of its width.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end, places = 0, {}
    for name in order:
        places[name], end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [places[name], end],
        }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    start = len(content).to_bytes(8, "little") + content
    return start, {name: len(start) + place for name, place in places.items()}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of one file by name, and its metadata.

    It needs no library either. The arrays are read-only and mapped from the file, so
    they are loaded only when used.

    Raises:
      MalformedFileError: if the file is truncated, damaged or malicious.
    """
    path = pathlib.Path(path)
    entries, metadata, start = header_of(path)
    # A plain array, because the overhead of a memmap slice exceeds many tensors.
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    arrays = {}
    for name, dtype, shape, begin, end in entries:
        try:
            part = content[start + begin : start + end]
            arrays[name] = part.view(dtype).reshape(shape)
        except (ValueError, OverflowError) as error:
            # With one size of 0, the others can be anything.
            raise malformed(_rule(path), f"`{name}` of shape {shape}") from error
    return arrays, metadata


class Entry(NamedTuple):
    """What a header says of an array: its bytes are counted from the header's end."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """The header of a file: its arrays in their order, and where their bytes begin."""

    entries: list[Entry]
    metadata: dict[str, str]
    start: int


def header_of(path: pathlib.Path) -> Header:
    """Reads the header of a file and checks it against the file's size.

    Raises:
      MalformedFileError: as `read` does.
    """
    rule = _rule(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise malformed(rule, f"a header of {length} bytes")
        header = _json_object(file.read(length), rule)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not _are_texts(metadata):
        raise malformed(rule, f"metadata of {short(metadata)}")
    entries = sorted(
        (_entry(name, entry, rule) for name, entry in header.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    ends = [0, *(entry.end for entry in entries)]
    start, size_of_file = 8 + length, path.stat().st_size
    if start + ends[-1] != size_of_file:
        got = f"{size_of_file} bytes instead of {start + ends[-1]}"
        raise malformed(rule, got)
    for end_before, (name, dtype, shape, begin, end) in zip(ends, entries):
        size = math.prod(shape) * dtype.itemsize
        if begin != end_before or end - begin != size:
            got = f"`{name}`, {size} bytes after {end_before}, at {begin} to {end}"
            raise malformed(rule, got)
    return Header(entries, metadata, start)


def _rule(path):
    return f"{path.name} must be a safetensors file"


def _entry(name, entry, rule):
    """Checks the types in a header's entry."""
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        } if all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
            pass
        case _:
            raise malformed(rule, f"`{name}` as {short(entry)}")
    if dtype not in _DTYPES or len(shape) > _MOST_DIMENSIONS:
        raise malformed(
            f"{rule} with dtypes of {list(_DTYPES)} and at most {_MOST_DIMENSIONS} "
            f"dimensions",
            f"`{name}` of {dtype} and {len(shape)} dimensions",
            "Use another file.",
        )
    return Entry(name, _DTYPES[dtype], tuple(shape), begin, end)


def _json_object(content, rule):
    try:
        header = json.loads(content.decode())
        # A text may have halves of characters, which cannot be printed.
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise malformed(rule, error) from error
    if not isinstance(header, dict):
        raise malformed(rule, type(header).__name__)
    return header


def _are_texts(metadata):
    return isinstance(metadata, dict) and all(
        isinstance(text, str) for text in metadata.values()
    )


def write_shards(
    folder: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes one file, or several files and their index."""
    written: list[tuple[pathlib.Path, list[str]]] = []
    total = 0
    for shard in _split(arrays, shard_bytes):
        file = folder / f"{len(written)}.safetensors"
        write(file, shard, {"format": "pt"})
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
    write_json(folder / INDEX, index)


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


def read_shards(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the tensors of all files by name."""
    arrays: dict[str, np.ndarray] = {}
    for shard in shards(folder):
        arrays |= read(inside(folder, shard))[0]
    return arrays


def shards(folder: pathlib.Path) -> dict[str, Header]:
    """Returns the headers of a folder's files by their names.

    Raises:
      MalformedFileError: if one is damaged, or if they do not fit their index.
    """
    if not has(folder, INDEX):
        name = "model.safetensors"
        return {name: header_of(inside(folder, name))}
    places = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) for shard in places.values()
    ):
        raise malformed(
            f"{INDEX} must have a `weight_map` from tensors to files", "something else"
        )
    headers: dict[str, Header] = {}
    found = set()
    for shard in sorted(set(places.values())):
        headers[shard] = header_of(inside(folder, shard))
        names = {entry.name for entry in headers[shard].entries}
        if any(places.get(name) != shard for name in names):
            rule = f"{shard} must have exactly the tensors that {INDEX} lists for it"
            raise malformed(rule, "other tensors")
        found |= names
    if len(found) != len(places):
        missing = [tensor for tensor in places if tensor not in found]
        raise malformed(
            f"the files must have all tensors of {INDEX}",
            f"{len(missing)} missing, {missing[:3]}",
        )
    return headers
