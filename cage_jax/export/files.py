"""Files, written completely or not at all, and read without trusting them."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from reprlib import repr as short
from typing import Any

from cage_jax._project import missing

Path = str | os.PathLike[str]

_MOST_JSON, _MOST_LETTERS = 64 * 2**20, 255


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


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a file and moves it to `path` on success.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`.
    """
    path = as_path(path)
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"`path` must not be a folder; got {path}. Use another path."
        )
    _check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_hidden(path), dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary folder and moves it to `path` on success.

    Raises:
      FileExistsError: if the path exists and is not an empty folder, unless
        `overwrite`. With `overwrite`, if it has files that no export wrote.
    """
    path = as_path(path)
    _check_free(path, overwrite)
    if unexpected := unexpected_files(path):
        raise FileExistsError(
            f"`path` must hold only an export to be overwritten; got {path}: "
            f"{unexpected}. Remove it yourself, or use another path."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix=_hidden(path), dir=path.parent)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
        if path.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=_hidden(path), dir=path.parent))
            os.replace(path, old / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      MalformedFileError: if the file holds anything else.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    if size > _MOST_JSON:
        raise malformed(f"{path.name} must have at most {_MOST_JSON} bytes", size)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
        raise malformed(f"{name[:_MOST_LETTERS]} must be a file in the folder", "none")
    return path


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


def unexpected_files(path: pathlib.Path) -> str:
    """Lists what is at a path that no export writes; "" if nothing."""
    if path.is_symlink():
        return "a link"
    if not path.exists():
        return ""
    if not path.is_dir():
        return "a file"
    from cage_jax.export.target import targets  # which needs this module

    known = {pattern for target in targets().values() for pattern in target.files}
    names = sorted(file.name for file in path.iterdir())
    others = [n for n in names if not any(fnmatchcase(n, each) for each in known)]
    return ", ".join(others[:3])


def is_free(path: pathlib.Path) -> bool:
    """Tells whether a path does not exist or is an empty folder."""
    empty = path.is_dir() and not any(path.iterdir())
    return empty or not (path.exists() or path.is_symlink())


def _check_free(path, overwrite):
    if not overwrite and not is_free(path):
        raise FileExistsError(
            f"`path` must not exist; got {path}. Use overwrite=True, or another path."
        )


def _hidden(path):
    """Returns the begin of a temporary name, with room for the rest of it."""
    return f".{path.name[:32]}."


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
