"""README and docs/: programs run, links lead somewhere, no name is missing."""

import pathlib
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from small_tokenizer import VOCABULARY, files_of, small_tokenizer

import cage_jax as cage
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.loaded import Model

nnx = pytest.importorskip("flax.nnx")
llama = pytest.importorskip("cage_jax.llama.model")

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Those of some have tests of their own, the reference is doctests, and two have none.
OTHERS = "api", "recipes", "pods", "export", "index", "explanation", "notebooks"
RUN = [page for page in PAGES if page.stem not in OTHERS]
OF_LINKS = [
    *PAGES,
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "quality" / "README.md",
]


@pytest.fixture(autouse=True)
def as_users_have_it(standard_promotion):
    """Flax promotes dtypes and ranks by itself; pages share no programs."""
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.clear_caches()


# A program, and the output that a page shows after it.
BLOCK = re.compile(
    r"```(?:\{code-block\} )?python\n(?::[^\n]*\n)*(.*?)```(?:\n+```text\n(.*?)```)?",
    re.DOTALL,
)


def _run(page, capsys=None, **names):
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for block, shown in blocks:
        exec(compile(block, page.name, "exec"), names)
        if shown:
            _assert_same_words(capsys.readouterr().out, shown)
    return names


def _assert_same_words(found, shown):
    """Other machines round otherwise, and a training ends elsewhere."""
    found, shown = found.split(), shown.split()
    assert len(found) == len(shown)
    for one, other in zip(found, shown):
        numbers = [re.fullmatch(r"(\d+\.?\d*)[.,]?", word) for word in (one, other)]
        if all(numbers):
            one, other = (float(number[1]) for number in numbers)
            assert one == pytest.approx(other, rel=0.2, abs=0.03)
        else:
            assert one == other


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_programs_of_a_page(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = _run(page, capsys)
    if page.stem == "strength":
        published, same = capsys.readouterr().out.split()
        assert float(same) == pytest.approx(2.0, rel=1e-3)
        assert float(published) > 0
    if page.stem == "models":
        expected = cage.fake_quant(nnx.state(names["model"], nnx.Param), names["rules"])
        served = nnx.state(names["served"], nnx.Param)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, served, expected))
        same = names["linen"].apply(names["loaded"].floats(), names["x"])
        assert jnp.allclose(names["outputs"], same, atol=1e-5)


def test_the_lines_of_the_first_page():
    def your_loss(params, batch):
        return jnp.mean((batch @ params["kernel"]) ** 2)

    params, batches = {"kernel": jnp.ones((64, 8))}, [jnp.ones((2, 64))] * 2
    names = _run(
        ROOT / "docs" / "index.md", params=params, your_loss=your_loss, batches=batches
    )
    assert names["codes"]["kernel"].codes.shape == (64, 8)
    assert not jnp.array_equal(names["params"]["kernel"], params["kernel"])


def test_the_doses_of_the_recommended_pull():
    """For errors of 1/30, which are pulled by half of a learning rate at the end."""
    text = (ROOT / "docs" / "strength.md").read_text()
    row = r"^\| (\S+) to (\S+) \| ([\d,]+) \| ([\d.]+)(, with a warning)? \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 5
    for first, last, steps, dose, warns in rows:
        first, steps = float(first), int(steps.replace(",", ""))
        rate = optax.cosine_decay_schedule(first, steps, float(last) / first)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            strength = cage.recommended(rate, steps)["strength"]
        assert len(found) == bool(warns)
        share = min(1.0, 0.5 / (float(strength(steps - 1)) / 30))
        assert f"{share * cage.dose(rate, strength, steps):.2g}" == dose


@pytest.fixture
def small_hub(monkeypatch, tmp_path):
    """A folder to write in, where the hub's only model is a small one."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    config = LlamaConfig(vocabulary=VOCABULARY, width=64, hidden=96, layers=1, heads=2)
    model = Model(
        llama.initial_params(config, seed=0),
        config,
        files_of(small_tokenizer("It was the best of times.")),
    )
    load = cage.load
    hub = {"HuggingFaceTB/SmolLM2-135M": model}
    monkeypatch.setattr(cage, "load", lambda path: hub.get(path) or load(path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_hub")
def test_the_programs_of_the_page_of_exports(tmp_path, capsys):
    names = _run(ROOT / "docs" / "export.md", capsys)
    assert jnp.array_equal(
        names["values"]["kernel"], cage.dequantize(names["same"]["kernel"])
    )
    trained = cage.dequantize(names["codes"])["kernel"][...]
    assert jnp.array_equal(names["layer"].kernel[...], trained)
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        "out.gguf",
        "floats",
        "floats-int4",
        "floats.gguf",
        "floats-q4_0.gguf",
        "codes.safetensors",
        "layer.safetensors",
        "shipped.safetensors",
        "unquantized.safetensors",
        "program",
    }
    assert names["y"].shape == (7, 8)


@pytest.mark.usefixtures("small_hub")
def test_the_programs_of_the_readme(tmp_path, capsys):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    _run(README, model=model, x=jnp.ones((2, 64)))
    assert "int8" in capsys.readouterr().out
    assert cage.load(tmp_path / "out.gguf").config.layers == 1


def _anchors(path):
    """Makes the anchors of the headings as GitHub and Sphinx do."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each) for each in headings)
    words = (re.sub(r"[^\w\- ]", "", each.lower()) for each in plain)
    return {each.replace(" ", "-") for each in words}


def test_links_lead_somewhere():
    for page in OF_LINKS:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), (page, target)
            assert not anchor or anchor in _anchors(path), (page, target)


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", text, re.MULTILINE)
    # `cage` is another name of `coupled`.
    assert sorted([*named, "cage"]) == sorted(cage.__all__)
    modules = re.findall(r"^\.\. automodule:: cage_jax\.([\w.]+)$", text, re.MULTILINE)
    assert len(set(modules)) == len(modules) > 10
    pages = re.findall(r"^\w+$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert {path.stem for path in PAGES} == {*pages, "index"}


def test_the_figures_are_small_and_drawn_by_their_script(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "figures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    kept = {path.name: path for path in (ROOT / "docs" / "figures").iterdir()}
    assert kept.keys() == {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"figures/([\w.]+)", "".join(p.read_text() for p in PAGES))
    assert kept.keys() == set(shown) - {"figures.py"}
    assert all(path.stat().st_size < 100_000 for path in kept.values())
