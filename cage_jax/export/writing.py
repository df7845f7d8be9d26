"""Files and folders that are written completely or not at all.

They replace nothing but an export. Each folder has a `MARKER`, which lists its files
with sizes and digests, so that a folder with anything else in it is known. A kind of
file has a function that tells whether an export wrote it.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator

from cage_jax._project import VERSION
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    as_path,
    read_json,
    write_json,
)

MARKER = "cage_jax_export.json"
# Of each end of a file, that many bytes go into its digest: all of a configuration and
# of a tokenizer, and enough of tensors to tell them from others, in little time.
_DIGESTED = 32 * 2**20

IsExport = Callable[[pathlib.Path], bool]


@contextlib.contextmanager
def new_file(
    path: Path, *, is_export: IsExport, overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a file and moves it to `path` on success.

    Args:
      path: path of the file.
      is_export: tells whether the content of a regular file is of an export, which may
        be replaced.
      overwrite: whether to replace an export.

    Raises:
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if no
        export wrote what is there.
    """
    path = _absolute(path)
    check_place(path, overwrite=overwrite, is_export=is_export)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_hidden(path), dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        with _failing(path):
            yield temporary
            _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        check_place(path, overwrite=overwrite, is_export=is_export)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary folder and moves it to `path` on success, with its marker.

    A folder that is replaced is moved away before, so that for a moment there is none.

    Raises:
      FileExistsError: if the path exists and is not an empty folder, unless
        `overwrite`. With `overwrite`, if it holds anything that no export wrote.
    """
    path = _absolute(path)
    check_place(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=_hidden(path), dir=path.parent))
    try:
        with _failing(path):
            yield temporary
            files = _entries(temporary)
            content = {"written_by": f"cage_jax {VERSION}", "files": files}
            write_json(temporary / MARKER, content)
            for file in temporary.rglob("*"):
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        # Others may have written there since.
        check_place(path, overwrite=overwrite)
        if is_free(path):
            os.replace(temporary, path)
        else:
            _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def check_place(
    path: Path,
    argument: str = "path",
    *,
    overwrite: bool,
    is_export: IsExport | None = None,
    flag: str = "overwrite=True",
) -> None:
    """Raises FileExistsError unless a path is free or may be overwritten.

    Args:
      path: the path.
      argument: name of the argument, for errors.
      overwrite: whether to replace an export.
      is_export: as in `new_file`; None for a folder.
      flag: what one writes to overwrite, for errors.
    """
    path = as_path(path, argument)
    if is_free(path):
        if is_export is not None and path.is_dir():
            raise FileExistsError(
                f"`{argument}` must be a file for this format; got {path}, a folder. "
                f"Use another name."
            )
    elif not overwrite:
        raise FileExistsError(
            f"`{argument}` must not exist; got {path}. Use {flag}, or another name."
        )
    elif others := _other_than_an_export(path, is_export):
        raise _not_replaced(argument, path, others)


def is_free(path: pathlib.Path) -> bool:
    """Tells whether a path does not exist or is an empty folder."""
    if path.is_dir() and not path.is_symlink():
        return not any(path.iterdir())
    return not os.path.lexists(path)


def _not_replaced(argument, path, others):
    return FileExistsError(
        f"`{argument}` must hold only an export to be overwritten; got {path}: "
        f"{others}. Remove it yourself, or use another name."
    )


def _other_than_an_export(path, is_export=None):
    """Says what is at a path that no export wrote; "" if nothing."""
    if path.is_symlink():
        return "a link"
    if is_export is not None:
        if not path.is_file():
            return "a folder" if path.is_dir() else "no regular file"
        is_other = path.stat().st_size and not is_export(path)
        return "a file that no export wrote" if is_other else ""
    if not path.is_dir():
        return "a file"
    listed = _listed(path)
    if not listed:
        return f"{', '.join(sorted(os.listdir(path))[:3])}, and no list in {MARKER}"
    found = _entries(path)
    others = [n for n in sorted(found) if n not in listed or found[n] != listed[n]]
    return ", ".join(others[:3])


def _listed(folder):
    """Returns what the marker of a folder lists, and itself; empty without a marker."""
    marker = folder / MARKER
    if marker.is_symlink() or not marker.is_file():
        return {}
    try:
        files = read_json(marker).get("files")
    except MalformedFileError:
        return {}
    if not isinstance(files, dict):
        return {}
    return files | {MARKER: _entry(marker)}


def _entries(folder):
    """Returns the entry of all that is in a folder by its path."""
    found = {}
    for parent, folders, files in os.walk(folder, onerror=_fail):
        for path in (pathlib.Path(parent, name) for name in (*folders, *files)):
            found[path.relative_to(folder).as_posix()] = _entry(path)
    return found


def _entry(path):
    """Returns the size and the digest of a file, or what else is at a path."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_DIGESTED))
        file.seek(max(status.st_size - _DIGESTED, file.tell()))
        digest.update(file.read(_DIGESTED))
    return {"bytes": status.st_size, "sha256_of_ends": digest.hexdigest()}


def _fail(error):
    raise error


@contextlib.contextmanager
def _failing(path: pathlib.Path) -> Iterator[None]:
    """Names the path in the error of a disk that is full, which names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, FileExistsError):
            raise
        reason = error.strerror or f"the disk may be full ({error})"
        text = f"{reason}. Make room, or use another path; nothing is left of it"
        raise OSError(error.errno or errno.EIO, text, str(path)) from error


def _replace(path, folder):
    """Moves a folder into the place of an export."""
    place = pathlib.Path(tempfile.mkdtemp(prefix=_hidden(path), dir=path.parent))
    old = place / path.name
    try:
        os.replace(path, old)
        # Others may have written to it until it was moved away.
        if others := _other_than_an_export(old):
            raise _not_replaced("path", path, others)
        os.replace(folder, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        # After an error or Ctrl-C it goes back.
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        with contextlib.suppress(OSError):
            place.rmdir()


def _absolute(path: Path) -> pathlib.Path:
    """Returns the path with a name, which '.' has not."""
    return pathlib.Path(os.path.abspath(as_path(path)))


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
