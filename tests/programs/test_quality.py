"""The study: its problems, its networks, and that it can be stopped."""

import itertools
import json
import re
import sys
from functools import cache, partial
from types import SimpleNamespace

import cells
import classifiers
import experiment
import jax
import jax.numpy as jnp
import language_models
import methods
import networks
import numpy as np
import optax
import paper
import plots
import pytest
import quadratics
import report
import study
import tables
import tuned
from rich.console import Console

import cage_jax as cage

QUIET = Console(quiet=True)


pytestmark = pytest.mark.usefixtures("as_users_have_it")


@pytest.fixture
def only(monkeypatch):
    """A function that leaves a few methods: each has programs of its own to compile."""

    def choose(*names):
        for module in (quadratics, classifiers, tuned):
            chosen = {name: methods.METHODS[name] for name in names}
            monkeypatch.setattr(module, "METHODS", chosen)

    return choose


def check_picture(draw, record, tmp_path):
    draw(record, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


# --- quadratics -----------------------------------------------------------------------


def test_problems_are_as_they_are_called():
    found = quadratics.combinations()
    assert len(set(found)) == len(found) == 30
    assert len(set(quadratics.names())) == 54
    for geometry, condition in itertools.product(quadratics.GEOMETRIES, (10, 100)):
        curvature, optimum = quadratics.problem(geometry, condition, seed=3)
        rotated, plain = quadratics.problem("rotated", condition, seed=3)
        eigenvalues = np.linalg.eigvalsh(curvature)
        assert eigenvalues[-1] == pytest.approx(1) and eigenvalues[0] > 0
        aside = curvature - np.diag(np.diag(curvature))
        assert (np.abs(aside).max() == 0) == (geometry == "axis-aligned")
        if geometry == "badly scaled":
            # Of the weights by their factors it is the rotated one.
            factors = optimum / plain
            assert factors.max() / factors.min() == pytest.approx(10)
            ratio = curvature * factors[:, None] * factors / rotated
            np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
            continue
        np.testing.assert_array_equal(optimum, plain)
        assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(condition, rel=1e-6)
        if geometry == "correlated":
            for away in range(64):
                band = np.diag(curvature, away) / curvature[0, 0]
                expected = (curvature[0, 1] / curvature[0, 0]) ** away
                np.testing.assert_allclose(band, expected)
        else:
            expected = np.geomspace(1 / condition, 1, 64)
            np.testing.assert_allclose(eigenvalues, expected, rtol=1e-6)


def test_five_steps_written_out(monkeypatch, only):
    """Plain STE by SGD: x <- x - lr (H (Q(x) - x*)), from x*, and its average."""
    only("ste")
    monkeypatch.setattr(quadratics, "combinations", lambda: [("correlated", 10, 0.0)])
    for grid in quadratics.GRIDS:
        losses = quadratics.final_losses(3, grid, "SGD", 1.0, seeds=2, steps=5)
        for seed in range(2):
            h, optimum = quadratics.problem("correlated", 10, seed)
            x = optimum
            for _ in range(5):
                x = x - 0.1 * h @ (_rounded(x, grid) - optimum)
            away, start = _rounded(x, grid) - optimum, _rounded(optimum, grid) - optimum
            assert losses["ste"][seed] == pytest.approx(away @ h @ away / 2, 1e-4)
            # The last fifth of five steps is the last one.
            assert losses["averaged"][seed] == pytest.approx(losses["ste"][seed], 1e-5)
            assert losses["ptq"][seed] == pytest.approx(start @ h @ start / 2, 1e-4)
            assert losses["full"][seed] == pytest.approx(0, abs=1e-9)


def _rounded(x, grid):
    """To 3 bits."""
    if grid == "RMS":
        step = 2 * 2.0510683541 * np.sqrt(np.mean(x**2)) / 7
        return np.clip(np.floor(x / step) + 0.5, -3.5, 3.5) * step
    step = (np.abs(x).max() if grid == "absmax" else quadratics.WIDEST[3]) / 3
    return np.clip(np.round(x / step), -3, 3) * step


def test_the_record_of_quadratics(tmp_path, only):
    only("ste", "cage", "lotion")
    name, other, *_ = quadratics.names()
    table = cells.Table("quadratics", {"a": 1}, tmp_path)
    quadratics.measure(QUIET, only=[name], table=table, **quadratics.TINY)
    cell = table.cells[name]
    count = len(quadratics.combinations())
    assert all(len(values) == count for values in cell.values())
    assert cell.keys() >= {"ste", "cage", "lotion", "ptq", "averaged", "ste0", "full"}
    assert max(cell["cage wins"]) <= 2
    record = json.loads((tmp_path / "quadratics.json").read_text())
    record["settings"]["combinations"] = quadratics.combinations()
    # A second cell stands in for all others.
    record["cells"][other] = {
        method: [2 * value if "wins" not in method else value for value in values]
        for method, values in record["cells"][name].items()
    }
    record["cells"][name]["lotion"][0] = None
    rows = report.quadratics_by_method(record)
    (lotion,) = [line for line in rows.cells if line[0] == "LOTION"]
    assert lotion[4] == "diverged"
    shares = report.quadratic_shares(record)["cage"]
    (line,) = [line for line in rows.cells if line[0] == "CAGE as published"]
    assert line[1] == f"{np.median(shares):.2f}"
    by_level = {line[0]: line for line in report.quadratics_by_level(record).cells}
    noisy = np.array([noise == 2.0 for *_, noise in quadratics.combinations()])
    assert by_level["noise 2"][1] == str(2 * noisy.sum())
    column = report.quadratics_by_level(record).header.index("CAGE as published")
    assert by_level["noise 2"][column] == f"{np.median(shares[:, noisy]):.2f}"
    check_picture(plots.quadratics, record, tmp_path)


# --- images ---------------------------------------------------------------------------


def test_a_convolution_is_one(rng):
    x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(27, 4)).astype(np.float32)
    found = networks._neighbours(jnp.asarray(x)) @ kernel
    expected = jax.lax.conv_general_dilated(
        x,
        kernel.reshape(3, 3, 3, 4),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    pooled = networks._pooled(jnp.asarray(x))
    assert pooled.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(pooled[0, 1, 0], x[0, 2:4, 0:2].max((0, 1)))


def test_patches_hold_every_pixel_once():
    for side in (8, 14):
        images = np.arange(1.0, side**2 + 1, dtype=np.float32).reshape(1, side, side)
        found = np.asarray(networks._patches(jnp.asarray(images)))
        patch = -(-side // 4)
        assert found.shape == (1, 16, patch**2)
        np.testing.assert_array_equal(found[0, 5, 0], images[0, patch, patch])
        assert sorted(found[found > 0]) == list(range(1, side**2 + 1))


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks(name, rng):
    network, rules, products = networks.NETWORKS[name], networks.rules_of(4), []

    def product(x, kernel):
        products.append(kernel.shape)
        return networks.product_of(4)(x, kernel)

    def loss(params, images):
        weights = cage.fake_quant(params, rules)
        logits = network.logits(weights, images, product)
        return classifiers.loss_of(logits, jnp.array([0, 1, 2]))

    for side in (8, 14):
        params = network.initial(jax.random.key(0), side)
        images = rng.normal(size=(3, side, side)).astype(np.float32)
        quantized = rules.quantized(params)
        assert quantized and all(path.startswith("inner/") for path in quantized)
        products.clear()
        run = jax.grad(loss)
        # Compiled at the side that 4 does not divide.
        gradients = (jax.jit(run) if side == 14 else partial(jax.eval_shape, run))(
            params, images
        )
        # What is quantized is multiplied with quantized inputs, and nothing else is.
        assert sorted(products) == sorted(x.shape for _, x in quantized.values())
        if side == 14:
            assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_the_record_of_images(tmp_path, only):
    only("ste", "cage", "lotion")
    name, *_ = classifiers.names()
    table = cells.Table("classifiers", {}, tmp_path)
    classifiers.measure(QUIET, only=[name], table=table, **classifiers.TINY)
    cell = table.cells[name]
    derived = {"full", "ptq", "averaged", "ste0"}
    assert cell.keys() == derived | {"ste", "cage", "lotion"}
    for part in ("train_loss", "test_loss", "accuracy"):
        assert all(len(each[part]) == 2 for each in cell.values())
    record = table.record()
    rows = report.classifiers(record, "train_loss")
    differences = np.subtract(cell["cage"]["train_loss"], cell["ste"]["train_loss"])
    error = np.std(differences, ddof=1) / np.sqrt(2)
    expected = f"{np.mean(differences):+.4f} ± {error:.4f}"
    assert rows.cells[0][rows.header.index("CAGE as published")] == expected
    means = {name: np.mean(each["train_loss"]) for name, each in cell.items()}
    share = (means["ste"] - means["lotion"]) / (means["ste"] - means["full"])
    rows = report.classifiers_recovered(record)
    assert rows.cells[0][rows.header.index("LOTION")] == f"{share:.0%}"
    check_picture(plots.classifiers, record, tmp_path)


def test_where_the_rate_goes_to_0_ste_is_trained_once(monkeypatch, only):
    only("ste")
    trained = []

    def train_all(method, network, bits, floor, *others):
        trained.append((method.words, bits, floor))
        return methods.Trained(("last", *trained[-1]), ("average", *trained[-1]))

    monkeypatch.setattr(classifiers, "train_all", train_all)
    monkeypatch.setattr(classifiers, "batches_of", lambda data: data)
    monkeypatch.setattr(classifiers, "scores", lambda ends, *_: ends)
    words = methods.WORDS["ste"]
    for floor, seconds in ((0.1, [(words, 2, 0.0)]), (0.0, [])):
        trained.clear()
        found = classifiers.scores_of_methods(None, 2, floor, (None, None), 2, 20)
        assert trained == [("", None, floor), (words, 2, floor), *seconds]
        assert found == {
            "full": ("last", "", None, floor),
            "ptq": ("last", "", None, floor),
            "ste": ("last", words, 2, floor),
            "averaged": ("average", words, 2, floor),
            "ste0": ("last", words, 2, 0.0),
        }


def test_the_record_of_tuned_methods(tmp_path, monkeypatch, only):
    """The factor that is best on other seeds is trained on those of other tables."""
    only("ste", "dampening")
    plain, asked = methods.METHODS["dampening"], []

    def train_all(method, network, bits, floor, data, seeds, steps, key):
        factor = getattr(method.optimizer, "keywords", {}).get("factor")
        asked.append((method.words, factor, bits, key))
        loss = factor or (0.5 if bits else 0.25)
        return SimpleNamespace(last=np.array([loss, loss]) + key)

    monkeypatch.setattr(tuned, "train_all", train_all)
    monkeypatch.setattr(
        tuned, "scores", lambda last, *_: SimpleNamespace(train_loss=last)
    )
    table = cells.Table("tuned", {}, tmp_path)
    (name, *_) = tuned.names()
    factors = 0.01, 100.0
    tuned.measure(QUIET, seeds=2, steps=40, factors=factors, only=[name], table=table)
    tried = [(plain.words, factor, 4, tuned.TUNING) for factor in factors]
    ste = methods.WORDS["ste"], None, 4, tuned.STUDY
    best = plain.words, 0.01, 4, tuned.STUDY
    assert asked == [("", None, None, tuned.STUDY), ste, *tried, best]
    found = table.cells[name]["dampening"]
    assert found == {"tried": [1.01, 101.0], "factor": 0.01, "train_loss": [0.01] * 2}
    record = table.record()
    rows = report.tuned(record)
    line = dict(zip(rows.header, rows.cells[0]))
    assert line["dampening"].endswith(" at 0.01")
    check_picture(plots.tuned, record, tmp_path)


def test_scores_are_of_quantized_weights_and_inputs():
    data = classifiers.load_digits()
    network, rules = networks.NETWORKS["MLP"], networks.rules_of(2)
    params = network.initial(jax.random.key(1), 8)
    parts = tuple(map(classifiers.batches_of, data))
    both = jax.tree.map(lambda x: x[None], params)
    (train_loss, _), (_, accuracy) = classifiers._scores(both, network, 2, parts)
    weights = jax.jit(lambda params: cage.fake_quant(params, rules))(params)
    logits_of = jax.jit(partial(network.logits, product=networks.product_of(2)))
    logits = [logits_of(weights, each.pixels) for each in data]
    expected = classifiers.loss_of(logits[0], data[0].labels)
    np.testing.assert_allclose(train_loss[0], expected, rtol=1e-5)
    right = jnp.argmax(logits[1], -1) == data[1].labels
    assert float(accuracy[0]) == pytest.approx(float(jnp.mean(right)), abs=1e-6)


# --- language models ------------------------------------------------------------------


def test_the_record_of_language_models(tmp_path, monkeypatch):
    asked = []

    def run(settings, console):
        asked.append(settings)
        losses = {arm: 1.0 + 0.01 * number for number, arm in enumerate(settings.arms)}
        losses |= {"recommended": 1.0 + 0.001 * settings.seed}
        return {arm: SimpleNamespace(loss=loss) for arm, loss in losses.items()}

    monkeypatch.setattr(language_models.train_lm, "run", run)
    names = [
        name
        for name in language_models.names()
        if re.match(r"W4A4, 1 x|W3A3, 4 x", name) and "10%" in name
    ]
    assert len(names) == 6
    table = cells.Table("language_models", {}, tmp_path)
    language_models.measure(QUIET, only=names, table=table, runs=tmp_path / "runs")
    assert [settings.seed for settings in asked] == [0, 1, 2] * 2
    assert asked[0].floor == 0.1 and asked[-1].layers == 4 and asked[-1].w_bits == 3
    assert len({settings.out for settings in asked}) == 6
    record = table.record()
    rows = report.language_models(record)
    (words,) = [line[0] for line in rows.cells]
    assert words == "W4A4, 1 x 64, 4000 steps, rate to 10%"
    line = dict(zip(rows.header, rows.cells[0]))
    assert line["STE, learning rate to 0"] == "+0.0200 ± 0.0000, 0"
    assert line["CAGE as recommended"] == "-0.0190 ± 0.0006, 3"
    shares = report.language_models_recovered(record)
    line = dict(zip(shares.header, shares.cells[0]))
    assert (line["gap of STE"], line["CAGE as recommended"]) == ("0.0200", "95%")
    small, large = report.language_models_by_size(record).cells
    assert [small[0], large[0]] == ["W4A4, 1 layers", "W3A3, 4 layers"]
    # Kernels of four times as many layers, of three bits for four, and their scales.
    weights = [int(line[1].replace(",", "")) for line in (small, large)]
    sizes = [int(line[2].replace(",", "")) for line in (small, large)]
    assert weights[1] == 4 * weights[0] == 4 * (4 * 64**2 + 3 * 64 * 192)
    assert sizes[1] / sizes[0] == pytest.approx(4 * 3 / 4, rel=0.06)
    check_picture(plots.language_models, record, tmp_path)


def test_cells_of_language_models():
    names = language_models.names()
    assert len(set(names)) == len(names) == 3 * (5 + 2 + 1 + 4)
    settings = language_models.settings_of(names[-1])
    assert (settings.w_bits, settings.a_bits, settings.layers) == (2, 2, 6)
    assert settings.floor == 0.1 and settings.arms == language_models.OF_SIZES
    assert (settings.size, settings.steps) == ("tiny", 4000)
    sixteen = [name for name in names if "A16" in name]
    assert language_models.settings_of(sixteen[0]).a_bits == 16
    (short, *_) = [name for name in names if "1000 steps" in name]
    settings = language_models.settings_of(short)
    assert (settings.size, settings.layers, settings.steps) == ("demo", 2, 1000)
    assert settings.arms == tuple(experiment.ARMS)
    # The sizes have as many bytes in their layers.
    assert {bits * layers for bits, layers in language_models.SIZES_OF[1:]} == {12}


def test_the_paper_is_language_models_of_another_size(tmp_path, monkeypatch):
    asked = []

    def run(settings, console):
        asked.append(settings)
        return {
            arm: SimpleNamespace(loss=3.0 - 0.1 * number)
            for number, arm in enumerate(settings.arms)
        }

    monkeypatch.setattr(language_models.train_lm, "run", run)
    with pytest.raises(ValueError, match="`--dataset` or `--text` must be given"):
        paper.measure(QUIET)
    text = tmp_path / "a.txt"
    text.write_text("words " * 2**16)
    only = paper.names()[1:]
    monkeypatch.setattr(experiment.Experiment, "__init__", lambda self, settings: None)
    report_of = SimpleNamespace(rows=[])
    monkeypatch.setattr(experiment.Experiment, "report", report_of, raising=False)
    table = cells.Table("paper", {}, tmp_path)
    paper.measure(QUIET, only=only, table=table, text=[text], runs=tmp_path)
    (settings,) = asked
    assert (settings.size, settings.w_bits, settings.layers) == ("30m", 3, 6)
    assert settings.arms == tuple(experiment.ARMS) and settings.steps == 1144
    assert settings.text == (text,) and settings.vocabulary == 32_000
    record = table.record()
    (line,) = report.language_models(record).cells
    assert line[0] == "W3A3, 6 x 640, 1144 steps, rate to 10%"
    check_picture(plots.paper, record, tmp_path)


# --- methods --------------------------------------------------------------------------


@cache
def _trained(name, steps=20, factor=None):
    rules = cage.Rules([("x", cage.int3())])
    rate = optax.constant_schedule(0.05)
    training = methods.Training(rules, steps, rate, optax.sgd(rate))

    def gradient(weights, params, step, key):
        del step, key
        return jax.grad(lambda p: jnp.sum((weights(p)["x"] - 0.3) ** 2))(params)

    method = methods.METHODS[name]
    if factor is not None:
        method = method.times(factor)

    @jax.jit
    def run(start, key):
        return methods.train(method, training, {"x": start}, gradient, key)

    start = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return jax.tree.map(np.asarray, run(start, jax.random.key(1)))


def test_every_method_and_its_number_do_something():
    """Once the paper's number it is that method; else it is another."""
    plain = _trained("ste").last["x"]
    for name in methods.METHODS:
        last, average = (each["x"] for each in _trained(name))
        assert last.shape == average.shape == (8, 4)
        assert np.isfinite(last).all(), name
        assert np.array_equal(last, plain) == (name == "ste"), name
        if name in methods.RIVALS:
            once, less = (_trained(name, factor=n).last["x"] for n in (1.0, 0.3))
            assert np.array_equal(last, once), name
            assert not np.array_equal(once, less), name
    with pytest.raises(ValueError, match="has no number"):
        methods.METHODS["ste"].times(2.0)


def test_the_average_is_of_the_last_fifth():
    # After n steps a training of more is the same, where nothing depends on the length.
    ends = [_trained("ste", steps=steps).last["x"] for steps in range(17, 21)]
    found = _trained("ste", steps=20).average["x"]
    np.testing.assert_allclose(found, np.mean(ends, 0), atol=1e-6)


# --- cells ----------------------------------------------------------------------------


def test_cells_are_kept_and_measured_once(tmp_path):
    asked = []

    def one(key):
        asked.append(key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"a": [len(asked)]}

    table = cells.Table("some", {"seeds": 2}, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        table.measure("wxyz", one, QUIET)
    again = cells.Table("some", {"seeds": 2}, tmp_path)
    assert again.cells == {"w": {"a": [1]}, "x": {"a": [2]}}
    again.measure("wxyz", one, QUIET)
    assert asked == ["w", "x", "y", "y", "z"]
    assert again.record() == json.loads((tmp_path / "some.json").read_text())
    assert len(again.record()["environments"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


def test_cells_of_other_settings_are_refused(tmp_path):
    table = cells.Table("some", {"seeds": 2, "steps": (1, 2)}, tmp_path)
    table.measure("a", lambda key: 1, QUIET)
    cells.Table("some", {"seeds": 2, "steps": (1, 2)}, tmp_path)
    with pytest.raises(ValueError, match=r"`some.json` must be .*others for seeds\."):
        cells.Table("some", {"seeds": 3, "steps": (1, 2)}, tmp_path)


# --- all tables -----------------------------------------------------------------------


def test_the_summary_is_of_all_tables(tmp_path):
    def of_seeds(**losses):
        return {name: {"train_loss": [loss, loss]} for name, loss in losses.items()}

    common = {"ste": 3.0, "full": 1.0, "ptq": 4.0, "averaged": 2.0, "ste0": 3.0}
    common |= {"cage": 2.5, "recommended": 2.0, "dampening": 3.0, "lotion": 5.0}
    first = common | {"parq": 2.0, "winq": 2.0}
    second = common | {"parq": 2.5, "winq": 2.9, "recommended": 1.8, "ste0": 3.5}
    record = {
        "cells": {
            "digits MLP W4A4 0.1": of_seeds(**first),
            "digits MLP W2A2 0.1": of_seeds(**second),
            "digits MLP W4A4 0": of_seeds(**first),
        }
    }
    (tmp_path / "classifiers.json").write_text(json.dumps(record))
    words = {
        f"{label}": {"law": loss}
        for label, loss in {f"A: {k}": v for k, v in first.items()}.items()
    }
    words["full"] = words.pop("A: full")
    record = {"cells": {"all, seed 0": words}}
    (tmp_path / "finetuning.json").write_text(json.dumps(record))
    rows = report.summary(tmp_path)
    lines = {line[0]: dict(zip(rows.header, line)) for line in rows.cells}
    assert list(lines) == [
        "digits, MLP, rate to 10%",
        "digits, MLP, rate to 0%",
        "SmolLM2-135M, A",
    ]
    line = lines["digits, MLP, rate to 10%"]
    assert line["CAGE as recommended"] == "50 to 60%"
    assert line["CAGE as published"] == "25%"
    assert line["STE, learning rate to 0"] == "-25 to 0%"
    assert line["the best rival"] == "PARQ: 25 to 50%"
    assert lines["SmolLM2-135M, A"]["CAGE as recommended"] == "50%"
    found = tables.filled("<!-- table: summary -->\n<!-- end -->", report.section)
    assert "| quadratics, rate to 10% |" in found


# --- the command and the README -------------------------------------------------------


def test_the_command(monkeypatch, capsys, only):
    only("ste")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
        return study.main(), capsys.readouterr().out

    for name in ("quadratics", "classifiers"):
        status, printed = run(name, "--tiny")
        assert status == 0 and "nothing is written" in printed
    status, printed = run("quadratics", "--only", "W9")
    assert status == 2 and "`--only` must be how the name" in printed
    status, printed = run("quadratics", "--seeds", "1")
    assert status == 2 and "`--seeds` must be at least 2" in printed
    status, printed = run("pieces", "--seeds", "3")
    assert status == 2 and "`--seeds` must be left out for pieces" in printed


def test_the_readme_agrees_with_the_results():
    text = report.README.read_text()
    assert tables.filled(text, report.section) == text, (
        "run python benchmarks/tables.py"
    )
    front = tables.FRONT.read_text()
    assert tables.filled(front, tables.front) == front
    places = re.findall(r"<!-- table: (\w+) -->", text)
    assert sorted(places) == sorted([*report.SECTIONS, "summary"])
    for picture in re.findall(r"\]\((results/\S+\.png)\)", text):
        assert (report.README.parent / picture).exists(), picture
