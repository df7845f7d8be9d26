"""Bytes to train on: Python's own standard library, or the user's files."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_VALIDATION_SHARE = 0.05
_BLOCK = 1_000_000


def text_files(files: Sequence[Path]) -> list[tuple[Path, float]]:
    """Returns each file of the text, and the share of its beginning to train on.

    Args:
      files: text files, of which the last 5 % is kept for validation. If empty, the
        sources of Python's standard library are used, and one file in twenty is kept
        for validation (chosen by a hash of its name, so that it stays the same).

    Raises:
      ValueError: for a file that is missing.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(
                f"`--text` must name files; got {str(path)!r}, which is none. Check "
                f"the path, or leave --text out for Python's standard library."
            )
    if files:
        return [(path, 1 - _VALIDATION_SHARE) for path in files]
    return _standard_library()


def pieces(files: Sequence[Path]) -> Iterator[tuple[bool, bytes]]:
    """Yields the text from beginning to end, whatever its size, as `blocks`.

    Args:
      files: as in `text_files`.

    Yields:
      True if the block is kept for validation, and its bytes.

    Raises:
      ValueError: for a file that is missing, empty or not text.
    """
    for path, share in text_files(files):
        size = path.stat().st_size
        cut = int(size * share)
        blank = bool(files)  # the standard library has empty files
        with path.open("rb") as file:
            for held_out, length in ((False, cut), (True, size - cut)):
                for block in blocks(file, length):
                    if b"\0" in block:
                        raise ValueError(
                            f"`--text` must be text; got {str(path)!r}, which has zero "
                            f"bytes as binary files do. Convert it to UTF-8 first."
                        )
                    blank = blank and not block.strip()
                    yield held_out, block
        if blank:
            raise ValueError(
                f"`--text` must not be empty; got {str(path)!r} with {size} bytes of "
                f"nothing but space. Leave the file out."
            )


def blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    """Yields the next `length` bytes, a megabyte or two at a time, in whole lines."""
    while length and (block := file.read(min(length, _BLOCK))):
        block += file.readline(min(length - len(block), _BLOCK))
        length -= len(block)
        yield block


def _standard_library() -> list[tuple[Path, float]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib"}
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - left_out  # prunes the walk
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    files = []
    for path in sorted(paths):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        files.append((path, 0.0 if digest[0] % 20 == 0 else 1.0))
    if not files:
        raise ValueError(
            "`--text` must be given: this Python has no sources of its standard "
            "library. Name some text files."
        )
    return files
