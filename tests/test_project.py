"""The version, the addresses and versions of tools are the same everywhere."""

import pathlib
import re
import tomllib

import cage_jax
from cage_jax._project import DOCS, REPOSITORY, VERSION

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What people read and copy from.
PATTERNS = ["*.*", ".*.yaml", ".github/**/*.*", "docs/*.*", "notebooks/*.*"]
PATTERNS += ["cage_jax/**/*.py", "examples/*.py", "benchmarks/**/*.md"]
ENDINGS = {".cff", ".ipynb", ".md", ".py", ".toml", ".yaml", ".yml"}
FILES = sorted(
    path
    for pattern in PATTERNS
    for path in ROOT.glob(pattern)
    if path.suffix in ENDINGS and path.is_file()
)


def mentions(pattern):
    """Yields each match in a file, with where it is."""
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in re.finditer(pattern, line):
                yield match, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_the_version():
    assert cage_jax.__version__ == VERSION
    assert "version" in PROJECT["dynamic"]
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_addresses():
    owners, pages = [], []
    # Of GitHub itself, of its files, and of Colab, which opens them.
    for match, where in mentions(r"github(?:\.com|usercontent\.com)?/([\w.-]+)/cage_"):
        assert f"/{match[1]}/cage_jax" in REPOSITORY, where
        owners.append(match[1])
    for match, where in mentions(r"[\w.:/-]*(?:readthedocs\.io|rtfd\.io)"):
        if "cage" in match[0]:
            assert match[0] == DOCS, where
            pages.append(match[0])
    assert len(owners) > 4, "there are so many in pyproject.toml and CITATION.cff"
    assert len(pages) > 2
    assert {REPOSITORY, DOCS} < {*PROJECT["urls"].values()}


def test_what_is_installed_comes_from_the_repository():
    """Before a release, the name alone would install nothing, or a stranger's."""
    names = r"pip install (?:-\S+ )*\\?['\"]?cage[_-]jax(?:\[[\w,{}]*\])?(.{3}|$)"
    found = list(mentions(names))
    assert found
    for match, where in found:
        assert match[1] == " @ ", where


def test_pre_commit_runs_the_ruff_of_make_lint():
    (ruff,) = [
        need
        for need in PROJECT["optional-dependencies"]["lint"]
        if need.startswith("ruff==")
    ]
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    found = re.findall(r"ruff==[\w.]+", text)
    assert found
    assert {*found} == {ruff}
