"""The pages in docs/: programs run, links lead somewhere, all names are there."""

import pathlib
import re

import jax
import pytest

import cage_jax as cage

pytest.importorskip("flax")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = ["index", "targets", "strength", "worse"]  # those of the others have tests
OF_LINKS = [
    *PAGES,
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "quality" / "README.md",
]


@pytest.fixture(autouse=True)
def as_users_have_it(standard_promotion):
    """Flax promotes dtypes and ranks by itself."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", RUN)
def test_the_programs_of_a_page(name, capsys):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "strength":
        published, same = capsys.readouterr().out.split()
        assert float(same) == pytest.approx(2.0, rel=1e-3)
        assert float(published) > 0


def _anchors(path):
    """Of the headings, as GitHub and Sphinx make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each) for each in headings)
    words = (re.sub(r"[^\w\- ]", "", each.lower()) for each in plain)
    return {each.replace(" ", "-") for each in words}


@pytest.mark.parametrize(
    "page", OF_LINKS, ids=lambda path: path.parent.name + path.stem
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path), target


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(cage.__all__)
    modules = re.findall(r"^\.\. automodule:: cage_jax\.([\w.]+)$", text, re.MULTILINE)
    assert len(set(modules)) == len(modules) > 10
    pages = re.findall(r"^\w+$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert {path.stem for path in PAGES} == {*pages, "index"}
