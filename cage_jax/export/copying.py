"""Bytes that are copied from file to file, without their way through memory."""

import os
import pathlib
from typing import Any

import numpy as np

from cage_jax.export.files import MalformedFileError

_AT_ONCE = 16 * 2**20  # bytes of a copy where the system has no call for it


def copy_range(old: int, new: int, begin: int, length: int, place: int) -> None:
    """Copies bytes between open files.

    Args:
      old: the file descriptor to read from.
      new: the one to write to.
      begin: the first byte to read.
      length: how many bytes.
      place: where in `new` they begin.

    Raises:
      MalformedFileError: if the file ends before.
    """
    while length:
        try:
            done = os.copy_file_range(old, new, length, begin, place)
        except (AttributeError, OSError):  # another system, or another kind of disk
            done = 0
        if not done:
            data = os.pread(old, min(length, _AT_ONCE), begin)
            if not data:
                raise MalformedFileError(
                    "a file of the template must not change while it is copied; got "
                    "fewer bytes than its header says. Export again."
                )
            done = os.pwrite(new, data, place)
        begin, length, place = begin + done, length - done, place + done


def mapped_place(array: Any) -> tuple[pathlib.Path, int] | None:
    """Returns the file that an array is mapped from and its first byte there, or None.

    Such an array is copied from file to file, and takes no memory.
    """
    mapped = array
    while isinstance(getattr(mapped, "base", None), np.ndarray):
        mapped = mapped.base  # a part of a memmap is one too
    if not isinstance(mapped, np.memmap) or not array.flags.c_contiguous:
        return None
    path = pathlib.Path(str(mapped.filename))
    return path, array.ctypes.data - mapped.ctypes.data
