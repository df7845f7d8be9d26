"""Paths, and files that are read without trusting them."""

import errno
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from cage_jax._project import missing

Path = str | os.PathLike[str]

# Limits of files that are read as a whole, and of names.
_MOST_BYTES, _MOST_LETTERS = 64 * 2**20, 255


class MalformedFileError(ValueError):
    """A file is not well-formed: truncated, damaged or malicious."""


def malformed(
    rule: str, got: Any, remedy: str = "Get the file again."
) -> MalformedFileError:
    """Makes the error for a file that breaks a rule."""
    return MalformedFileError(f"{rule}; got {got}. {remedy}")


def check_installed(package: str, purpose: str) -> None:
    """Raises ImportError if a package is missing, with the command that installs it."""
    if importlib.util.find_spec(package) is None:
        raise missing(package, purpose, "export")


def check_none(arguments: Mapping[str, Any], what: str) -> None:
    """Raises ValueError if arguments are given that another one excludes."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be None with {what}; got {str(value)[:60]}. Leave it "
                f"out."
            )


def read_bytes(path: pathlib.Path) -> bytes:
    """Reads a file of at most 64 MiB, as all but those of weights are.

    Raises:
      MalformedFileError: if it is larger.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise malformed(f"{path.name} must have at most {_MOST_BYTES} bytes", size)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      MalformedFileError: if the file holds anything else.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(read_bytes(path).decode("utf-8"))
    except MalformedFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise malformed(f"{path.name} must be JSON", error) from error
    if not isinstance(content, dict):
        raise malformed(f"{path.name} must be an object", type(content).__name__)
    return content


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes an object to a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def inside(folder: Path, name: Any) -> pathlib.Path:
    """Returns the path of a named file in a folder.

    Raises:
      MalformedFileError: if the name leads out of the folder, or to no file.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(sign in name for sign in "/\\\0:")
        or not name.isprintable()
    ):
        raise malformed(
            "a shard's name must be a plain file name in the same folder", repr(name)
        )
    path = pathlib.Path(folder) / name
    if len(name) > _MOST_LETTERS or not path.is_file():
        got = "none" if len(name) > _MOST_LETTERS else _kind(path)
        raise malformed(f"{name[:_MOST_LETTERS]} must be a file in the folder", got)
    _check_link(path, pathlib.Path(folder).resolve())
    return path


def has(folder: pathlib.Path, *names: str) -> bool:
    """Tells whether a folder has all of these names; `inside` checks what they are."""
    return all(os.path.lexists(folder / name) for name in names)


def check_all_inside(folder: pathlib.Path) -> None:
    """Raises MalformedFileError for links out of a folder, and for FIFOs and devices.

    For a folder whose files another library opens.
    """
    home = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for path in (pathlib.Path(parent, name) for name in (*folders, *files)):
            if not (path.is_file() or path.is_dir()):
                rule = f"{path.relative_to(folder)} must be a file or a folder"
                raise malformed(rule, _kind(path))
            _check_link(path, home)


def _check_link(path, home):
    """Raises if a link leads out of its folder, except into the hub's cache."""
    place = path.resolve()
    if place.is_relative_to(home):
        return
    # There, models--a--b/snapshots/1234/name is a link to models--a--b/blobs/5678.
    if home.parent.name == "snapshots" and place.parent == home.parents[1] / "blobs":
        return
    raise malformed(
        f"{path.name} must be a file of the folder, and no link to another one",
        f"a link to {place}",
        "Copy that file into the folder, if it belongs to the model.",
    )


def _kind(path):
    if not os.path.lexists(path):
        return "none"
    if path.is_dir():
        return "a folder"
    return "a FIFO, a socket or a device" if path.exists() else "a link to nothing"


def as_path(path: Any, argument: str = "path") -> pathlib.Path:
    """Converts a path to `pathlib.Path`.

    Args:
      path: the path, of something that may exist or not.
      argument: name of the argument, for errors.

    Raises:
      TypeError: if `path` is not a path.
      ValueError: if it is empty, or if nothing can have it: with a NUL, or too long.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`{argument}` must be a path; got {type(path).__name__}. Use a str, or a "
            f"pathlib.Path."
        )
    if path == "":
        raise ValueError(
            f"`{argument}` must not be empty; got {path!r}. Use the name of a file or "
            f"a folder, such as '.'."
        )
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:  # a ValueError for a NUL
        code = getattr(error, "errno", errno.EINVAL)
        if code in (errno.EINVAL, errno.ENAMETOOLONG):
            raise ValueError(
                f"`{argument}` must be the name of a file or a folder; got "
                f"{short(os.fspath(path))}: {getattr(error, 'strerror', error)}. Use "
                f"another name."
            ) from error
    return pathlib.Path(path)
