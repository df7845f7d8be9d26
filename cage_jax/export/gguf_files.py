"""Reader of GGUF files: metadata and tensors by name, mapped from the file.

The `GGUFReader` of PyPI's `gguf` trusts the file: a count of 2**60 makes it loop or
allocate until the machine fails. This reader compares every count, length and offset
with the size of the file before it uses them.
"""

import math
import pathlib
import struct
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cage_jax.export.files import MalformedFileError, Path, as_path, malformed

MAGIC = b"GGUF"
WRITER = {"general.quantized_by": "cage_jax"}
"""Marks our own files, which alone are replaced."""
_VERSIONS = (2, 3)
# Limit of keys and of tensors: far above any model, far below what exhausts memory.
_MOST_ENTRIES = 2**16
# Limit of all that comes before the tensors: real vocabularies take up to 20 MB.
_MOST_METADATA = 64 * 2**20
_MOST_DIMENSIONS = 4
_LONGEST_KEY, _LONGEST_NAME = 2**16, 64  # in bytes, from the format

# Types of values by their numbers in files.
_NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      kind: name of the type, such as "Q4_0".
      shape: shape of the tensor; blocks run along the last axis.
      data: bytes of the tensor, uint8 of shape (bytes,), read-only.
      begin: the first of them in the file.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray
    begin: int


class Content(NamedTuple):
    """The content of a file.

    Attributes:
      metadata: numbers, bools, texts, lists of texts and arrays of numbers by key.
      tensors: tensors by name, in their order.
      stored_keys: the bytes of each key and its value in the file.
      version: version of the format.
      alignment: tensors begin at multiples of it.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    stored_keys: dict[str, bytes]
    version: int
    alignment: int


def read_content(path: Path) -> Content:
    """Reads a GGUF file; tensors are loaded only when they are used.

    Raises:
      MalformedFileError: if the file is truncated, damaged or malicious.
    """
    path = as_path(path)
    if path.stat().st_size == 0:
        raise malformed(f"{path.name} must have a header", "an empty file")
    content = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(content, path.name)
    try:
        if cursor.take(4) != MAGIC:
            cursor.refuse(f"begin with {MAGIC!r}", bytes(content[:4]))
        if (version := cursor.number("I")) not in _VERSIONS:
            cursor.refuse(f"be of a version among {_VERSIONS}, little-endian", version)
        tensor_count, key_count = cursor.entries(), cursor.entries()
        metadata: dict[str, Any] = {}
        stored_keys: dict[str, bytes] = {}
        for _ in range(key_count):
            begin, key = cursor.position, cursor.text(_LONGEST_KEY)
            if key in metadata:
                cursor.refuse("have each key once", f"{key!r} twice")
            metadata[key] = cursor.value(cursor.number("I"))
            stored_keys[key] = bytes(cursor.view[begin : cursor.position])
        table = [_entry(cursor) for _ in range(tensor_count)]
    except UnicodeDecodeError as error:
        cursor.refuse("have texts in UTF-8", error)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.refuse("have a power of two as general.alignment", repr(alignment))
    tensors = _located(table, cursor, alignment, content)
    return Content(metadata, tensors, stored_keys, version, alignment)


def is_export(path: pathlib.Path) -> bool:
    """Tells whether we wrote a file."""
    try:
        return read_content(path).metadata.items() >= WRITER.items()
    except MalformedFileError:
        return False


def padded(position: int, alignment: int) -> int:
    """Returns the first multiple of `alignment` that is not before a position."""
    return -(-position // alignment) * alignment


def _entry(cursor):
    """Reads a tensor's entry in the table: name, type number, shape and offset."""
    name = cursor.text(_LONGEST_NAME)
    ndim = cursor.number("I")
    if not 1 <= ndim <= _MOST_DIMENSIONS:
        cursor.refuse(f"have 1 to {_MOST_DIMENSIONS} axes for {name!r}", ndim)
    shape = tuple(cursor.number("Q") for _ in range(ndim))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def _located(table, cursor, alignment, content):
    """Locates the tensors of the table, which follow it one after another."""
    from gguf import GGML_QUANT_SIZES

    begin, expected = padded(cursor.position, alignment), 0
    tensors: dict[str, Stored] = {}
    for name, number, shape, offset in table:
        if name in tensors:
            cursor.refuse("have each tensor once", f"{name!r} twice")
        kinds = [k for k in GGML_QUANT_SIZES if k.value == number]
        if not kinds:
            cursor.refuse(f"have a known type for {name!r}", f"type {number}")
        (kind,) = kinds
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or not all(shape):
            cursor.refuse(f"have rows of whole blocks of {block} for {name!r}", shape)
        if offset != expected:
            rule = (
                f"have {name!r} at offset {expected}, right after the tensor before it"
            )
            cursor.refuse(rule, offset)
        start = begin + offset
        stop = start + math.prod(shape) // block * block_bytes
        if stop > len(content):
            cursor.refuse(
                f"have {stop} bytes or more, for {name!r} of {shape}", len(content)
            )
        data = np.asarray(content[start:stop])
        tensors[name] = Stored(kind.name, shape, data, start)
        expected = padded(offset + stop - start, alignment)
    return tensors


class _Cursor:
    """A cursor over the first bytes of a file that never passes their end."""

    def __init__(self, content, name):
        self.view = memoryview(content[:_MOST_METADATA])
        self.name = name
        self.position = 0

    def take(self, size):
        stop = self.position + size
        if stop > len(self.view):
            self._end(stop)
        part, self.position = self.view[self.position : stop], stop
        return part

    def number(self, code):
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, size):
        """Reads a count of items of `size` bytes; raises if the file is too short."""
        count = self.number("Q")
        if count * size > len(self.view) - self.position:
            self._end(self.position + count * size)
        return count

    def entries(self):
        count = self.number("Q")
        if count > _MOST_ENTRIES:
            self.refuse(f"have at most {_MOST_ENTRIES} keys and as many tensors", count)
        return count

    def text(self, most=None):
        length = self.count(1)
        if most is not None and length > most:
            self.refuse(f"have names of at most {most} bytes", length)
        return str(self.take(length), "utf-8")

    def texts(self, count):
        """Reads `count` texts like `text`, in a loop that is fast for millions."""
        view, position, end = self.view, self.position, len(self.view)
        length_at = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            if start > end:
                self._end(start)
            position = start + length_at(view, position)[0]
            if position > end:
                self._end(position)
            found.append(str(view[start:position], "utf-8"))
        self.position = position
        return found

    def value(self, kind):
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind = self.number("I")
            if kind == _STRING:
                return self.texts(self.count(8))
            dtype = self._dtype(kind)  # rejects arrays, which may not be nested
            size = self.count(dtype.itemsize) * dtype.itemsize
            return np.frombuffer(self.take(size), dtype)
        dtype = self._dtype(kind)
        value = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == _BOOL else value

    def _dtype(self, kind):
        if kind not in _NUMBERS:
            self.refuse("have values of known types", f"type {kind}")
        return _NUMBERS[kind]

    def _end(self, stop):
        if len(self.view) == _MOST_METADATA:
            self.refuse(f"have at most {_MOST_METADATA} bytes before its tensors", stop)
        self.refuse(f"have {stop} bytes or more", len(self.view))

    def refuse(self, rule, got) -> NoReturn:
        raise malformed(f"{self.name} must {rule}", got)
