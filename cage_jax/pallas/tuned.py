"""The file of what `cage.tune` measured, and which choices it holds for a device.

It is JSON: for each kind of device, with the versions that it was measured with, an
entry for each computation: whether the kernel runs, and the milliseconds of both forms.
A process reads it once. It is written whole or not at all, under a lock, so that
processes that tune at once keep each other's entries.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import jax
import jaxlib

from cage_jax._project import VERSION
from cage_jax.arrays.checks import warn


class Measured(NamedTuple):
    """What was measured of one computation on one kind of device.

    Attributes:
      kernel: whether the kernel runs; otherwise XLA's form.
      fault: what is wrong with the kernel, or "".
      xla_ms, kernel_ms: medians of calls in milliseconds; None for a wrong kernel.
    """

    kernel: bool
    fault: str = ""
    xla_ms: float | None = None
    kernel_ms: float | None = None


# By the kind of device with the versions, and by the name of a `Choice`.
Entries = dict[str, dict[str, Measured]]

# What kernels are made of: a change of any of these may change what is fastest.
_SOURCES = ("arrays", "quantizers", "pallas")


def path() -> pathlib.Path:
    """Returns where the file is."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache_folder) / "cage_jax" / "kernels.json"


@cache
def versions() -> str:
    """Returns the versions that a measurement is valid for."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    digest.update(VERSION.encode())
    for source in _SOURCES:
        for file in sorted((folder / source).rglob("*.py")):
            digest.update(file.read_bytes())
    kernels = digest.hexdigest()[:12]
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, kernels {kernels}"


def entry(kind: str, name: str) -> Measured | None:
    """Returns what was measured for a computation on a kind of device, or None."""
    if not kind or not known():  # nothing was measured: no source is read
        return None
    return known().get(_key(kind), {}).get(name)


@cache
def known() -> Entries:
    """Returns the entries of the file, read once in a process, and those made here."""
    return _read()


def keep(kind: str, new: dict[str, Measured]) -> None:
    """Adds entries for a kind of device, for this process and for later ones."""
    known().setdefault(_key(kind), {}).update(new)
    try:
        with _locked():
            found = _read()
            found.setdefault(_key(kind), {}).update(new)
            _write(found)
    except OSError as error:
        warn(
            f"`{path()}` could not be written ({error}), so the choices of cage.tune "
            f"last as long as this process. Make its folder writable to keep them."
        )


def _key(kind):
    return f"{kind}, {versions()}"


def _read() -> Entries:
    try:
        return {
            key: {name: _measured(each) for name, each in entries.items()}
            for key, entries in json.loads(path().read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        warn(
            f"`{path()}` cannot be read ({error}), so kernels are chosen as if nothing "
            f"had been measured. Run cage.tune again, which replaces it."
        )
        return {}


def _measured(fields) -> Measured:
    found = Measured(**fields)
    if not isinstance(found.kernel, bool):
        raise ValueError(f"`kernel` is {found.kernel!r}")
    return found


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Waits until no other process writes the file."""
    import fcntl  # not on Windows, where no accelerator can be tuned for

    path().parent.mkdir(parents=True, exist_ok=True)
    with path().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def _write(entries: Entries) -> None:
    content = {
        key: {name: one._asdict() for name, one in each.items()}
        for key, each in entries.items()
    }
    handle, name = tempfile.mkstemp(prefix=".kernels", dir=path().parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path())
    except BaseException:
        os.unlink(name)
        raise
