"""The benchmarks: formulas and records, never timings."""

import json
import math
import sys
from functools import partial

import curvature_cost
import digits
import effect
import import_time
import jax
import jax.numpy as jnp
import layers
import measurement
import numpy as np
import optax
import optimizer_step
import presets
import pytest
import quantizers
import sharding
import tables
import train_step
import utilization
from rich.console import Console

import cage_jax as cage


@pytest.fixture(autouse=True)
def as_users_have_it(standard_promotion):
    """Programs, not the library: jax's own defaults."""
    with jax.numpy_rank_promotion("allow"):
        yield


def record(**changes):
    base = {
        "name": "import_time",
        "benchmark": "import_time",
        "title": "Importing",
        "environment": measurement.environment(),
        "figures": {"jax and optax": 1.0, "added by cage_jax": 0.25},
        "targets": [measurement.target("seconds", 0.25, 0.3)],
    }
    return base | changes


# --- measurement and tables -----------------------------------------------------------


def test_contestants_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measurement.interleaved(functions, rounds=3, warmup=1)
    assert calls == list("abababab")
    assert [len(each) for each in times.values()] == [3, 3]


def test_the_ratio_is_the_median_over_rounds():
    times = {"a": [2.0, 9.0, 30.0], "b": [1.0, 3.0, 5.0]}
    assert measurement.median_ratio(times, "a", "b") == 3.0


@pytest.mark.parametrize(("measured", "met"), [(0.3, True), (0.31, False)])
def test_a_target_is_an_upper_bound(measured, met):
    each = measurement.target("seconds", measured, 0.3)
    assert each["met"] is met
    (line,) = measurement.target_lines({"targets": [each]})
    assert line.endswith(", met." if met else "NOT met.")


def test_records_are_written_and_tables_made_from_them(tmp_path):
    path = measurement.save(record(), tmp_path)
    assert json.loads(path.read_text()) == record()
    text = "before\n<!-- table: import_time -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(text, partial(tables.section, folder=tmp_path))
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "| added by cage_jax | 0.25 |" in filled
    assert "old" not in filled
    assert tables.filled(filled, partial(tables.section, folder=tmp_path)) == filled


def test_a_missing_record_is_said_so(tmp_path):
    text = "<!-- table: nothing -->\n<!-- end -->"
    assert "Not measured yet." in tables.filled(
        text, partial(tables.section, folder=tmp_path)
    )


def test_the_readme_agrees_with_the_results():
    text = tables.README.read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


# --- effect ---------------------------------------------------------------------------


@pytest.mark.parametrize("problem", effect.PROBLEMS[:3], ids=str)
def test_hessians_have_the_spectrum_that_is_stated(problem):
    curvatures, optima = effect.hessians(problem, seeds=2)
    assert curvatures.shape == (2, 128, 128) and optima.shape == (2, 128, 1)
    assert not np.array_equal(*optima)
    for curvature in curvatures:
        eigenvalues = np.linalg.eigvalsh(np.float64(curvature))[::-1]
        exponents = np.arange(128) / 127
        expected = problem.condition**-exponents
        np.testing.assert_allclose(eigenvalues, expected, rtol=1e-3, atol=1e-6)
        diagonal = np.count_nonzero(curvature - np.diag(np.diag(curvature))) == 0
        assert diagonal != problem.correlated


def test_two_noiseless_steps_are_the_recursion_written_out():
    """Plain STE by SGD: x <- x - lr H (Q(x) - x*), from x*."""
    problem = effect.TARGET._replace(noise=0.0, floor=1.0)
    losses = effect.minimize(problem, seeds=1, steps=2)
    (curvature,), (optimum,) = effect.hessians(problem, 1)
    curvature, optimum = np.float64(curvature), np.float64(optimum)

    def rounded(x):
        scale = np.abs(x).max() / 7
        return np.round(x / scale) * scale

    def loss(x):
        offset = rounded(x) - optimum
        return float((offset.T @ curvature @ offset).item()) / 2

    x = optimum
    for _ in range(2):
        x = x - 0.1 * curvature @ (rounded(x) - optimum)
    # Sums of 128 float32 products.
    np.testing.assert_allclose(losses["STE"], [loss(x)], rtol=1e-4)
    np.testing.assert_allclose(losses["averaged STE"], [loss(x)], rtol=1e-4)
    np.testing.assert_allclose(losses["rounded optimum"], [loss(optimum)], rtol=1e-4)


def test_the_quadratic_record():
    found = effect.quadratic(seeds=2, steps=20, problems=(effect.TARGET,))
    (figure,) = found["figures"]
    share = {name: arm["share"] for name, arm in figure["arms"].items()}
    plain, diagonal, of_cage, product, descended, worst = (
        each["measured"] for each in found["targets"]
    )
    assert plain == share["CAGE 3/.5"] and diagonal == share["diag(H), 1/.5"]
    better = min(share["CAGE 3/.5"], share["CAGE 10/.8"])
    assert of_cage == pytest.approx(diagonal / better)
    descent = share["coordinate descent"]
    assert product == pytest.approx(share["H e, 1/.5"] / descent)
    assert descended == pytest.approx(share["diag(H), 1/0"] / descent)
    assert worst == share["recommended"]
    assert descent < share["rounded optimum"]
    assert figure["arms"]["STE"]["share"] == 1 and figure["arms"]["STE"]["wins"] == 0
    count = np.arange(20)
    rate = 0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * count / 20)) / 2)
    strength = 3 * np.maximum((count + 1) / 20 - 0.5, 0) / 0.5
    dose = found["settings"]["doses"]["CAGE 3/.5, sgd"]
    np.testing.assert_allclose(dose, np.sum(rate * strength), rtol=1e-5)  # float32
    rows = effect.table(json.loads(json.dumps(found)))
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_digits_record(monkeypatch, rng):
    drawn = {}

    def run(settings):
        draw = rng.normal(size=(len(digits.ARMS), 3, settings.seeds))
        arms = dict(zip(digits.ARMS, (digits.Scores(*each) for each in draw)))
        drawn[settings.recommended, settings.floor] = arms
        return {4: arms}

    monkeypatch.setattr(digits, "run", run)
    found = effect.digits(seeds=5, steps=20, bits=(4,))
    (figure,) = found["figures"]
    t, best, delta, wins = found["targets"]
    ours, to_zero = drawn[True, 0.1], drawn[True, 0.0]
    differences = to_zero["cage"].train_loss - to_zero["ste"].train_loss
    error = np.std(differences, ddof=1) / np.sqrt(5)
    assert t["measured"] == pytest.approx(np.mean(differences) / error)
    gain = np.mean(ours["cage"].train_loss - ours["ste"].train_loss)
    assert best["measured"] == pytest.approx(gain - figure["train_loss"]["mean"])
    assert delta["bound"] == -0.002 and wins["bound"] == 0
    losses = found["seed_by_seed"]["W4A4"]
    differences = np.subtract(losses["cage"]["train_loss"], losses["ste"]["train_loss"])
    np.testing.assert_allclose(figure["train_loss"]["mean"], np.mean(differences))
    assert delta["measured"] == figure["train_loss"]["mean"]
    assert wins["measured"] == np.sum(differences >= 0)
    rows = effect.table(json.loads(json.dumps(found)))
    assert rows.header == ["train loss", "W4A4"]


def test_the_record_of_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(effect, "IMAGE_MODELS", (("resnet", 4),))
    found = effect.images(seeds=2, steps=10)
    (arms,) = found["seed_by_seed"].values()
    ours, plain = (np.array(arms[arm]["train_loss"]) for arm in ("cage", "ste"))
    (figure,) = found["figures"]
    np.testing.assert_allclose(figure["train_loss"]["mean"], np.mean(ours - plain))
    rows = effect.table(json.loads(json.dumps(found)))
    assert rows.header == ["train loss", "ResNet W4A4"]


def test_effect_needs_two_seeds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effect.py", "--seeds", "1"])
    assert effect.main() == 2
    assert "`--seeds` must be at least 2" in capsys.readouterr().out


# --- optimizer step -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("10M", 10), ("100M", 100)])
def test_the_sizes_are_what_they_are_called(size, millions):
    shapes = optimizer_step.shapes(size)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert 0.95 < count / 1e6 / millions < 1.05
    assert all(rows % 128 == 0 for rows, _ in shapes.values())


def test_both_phases_are_what_they_are_called():
    tx = optimizer_step.optimizers()["int4"]
    adamw = optimizer_step.optimizers()["AdamW"]
    params = optimizer_step.random_tree("tiny", 0.02, seed=0)
    gradients = optimizer_step.random_tree("tiny", 1e-3, seed=1)
    plain, _ = jax.jit(adamw.update)(gradients, adamw.init(params), params)

    update = jax.jit(tx.update)

    def updates_at(count):
        state = optax.tree_utils.tree_set(tx.init(params), cage_count=jnp.int32(count))
        return update(gradients, state, params)[0]

    name = "0/up/kernel"
    np.testing.assert_array_equal(updates_at(0)[name], plain[name])
    x = np.float64(params[name])
    groups = x.reshape(-1, 128, x.shape[-1])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    error = (groups - np.round(groups / scale) * scale).reshape(x.shape)
    expected = np.float64(plain[name]) - 1e-3 * 10 * error
    ours = updates_at(optimizer_step.SILENT_STEPS)[name]
    # Float32; ties between two levels do not occur in normal numbers.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["int4", "quest"])
def test_pytorch_makes_the_same_correction(name):
    torch = pytest.importorskip("torch")
    x = optimizer_step.random_tree("tiny", 0.02, seed=0)["0/up/kernel"]
    theirs = torch.from_numpy(np.array(x))
    if name == "int4":
        theirs = optimizer_step.torch_int4_error(theirs)
    else:
        hadamard = optimizer_step.torch_hadamard(128)
        theirs = optimizer_step.torch_quest_error(theirs, hadamard)
    ours = cage.quantization_error(x, optimizer_step.QUANTIZERS[name])
    # The rotation sums 128 float32 numbers of 0.02 in another order.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-7)


def test_the_record_of_steps():
    pytest.importorskip("torch")
    figure = optimizer_step.measure("tiny", rounds=2)
    names = [row["step"] for row in figure["steps"]]
    assert "cage_jax, quest, active" in names and "torch, AdamW fused" in names
    found = optimizer_step.record_of([figure])
    assert len(found["targets"]) == 6
    for each in found["targets"]:
        assert each["met"] == (each["measured"] <= each["bound"])
    rows = optimizer_step.table(json.loads(json.dumps(found)))
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


# --- quantizers -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(quantizers.CASES))
def test_the_others_quantize_alike(name, rng):
    pytest.importorskip("qwix")
    pytest.importorskip("torchao")
    case = quantizers.CASES[name]
    x = rng.standard_normal((256, 256), np.float32)
    functions = quantizers.functions_of(case, x)
    assert (quantizers.QWIX in functions) == (case.qwix is not None)
    assert (quantizers.TORCH in functions) == (case.bits is not None)
    values = {name: np.asarray(function()) for name, function in functions.items()}
    ours = values[quantizers.OURS]
    for other, value in values.items():
        error, theirs = (np.sqrt(((v - x) ** 2).mean()) for v in (ours, value))
        # torchao's integers are of full range, qwix's powers of two are rounded up,
        # and its NVFP4 has no scale of the tensor.
        assert 0.9 < error / theirs < 1.3, other
    if case.bits:
        # Of groups of the last axis and the narrow range; but for ties.
        assert np.mean(values[quantizers.TORCH] == ours) > 0.99


@pytest.mark.filterwarnings("ignore")
def test_the_record_of_quantizers(monkeypatch, capsys):
    pytest.importorskip("qwix")
    pytest.importorskip("torchao")
    name = quantizers.INT4
    monkeypatch.setattr(quantizers, "CASES", {name: quantizers.CASES[name]})
    found = quantizers.measure(256, 2, Console(), warmup=1)
    assert [each["bound"] for each in found["targets"]] == [1.0] * 3
    times = found["seconds"][name]
    ratios = np.divide(times[quantizers.OURS], times[quantizers.QWIX])
    np.testing.assert_allclose(found["targets"][0]["measured"], np.median(ratios))
    rows = quantizers.table(json.loads(json.dumps(found)))
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


# --- train steps and layers -----------------------------------------------------------


def test_the_record_of_train_steps(monkeypatch):
    # Those that the targets are of: each is compiled, and the others take minutes.
    names = [*train_step.COMPILED, "W4A4 CAGE, active"]
    steps = {name: train_step.STEPS[name] for name in names}
    monkeypatch.setattr(train_step, "STEPS", steps)
    made = train_step.measure("tiny", rounds=2, warmup=1, deep="tiny", compiles=1)
    rows = train_step.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == list(train_step.STEPS)
    for cells in rows.cells:
        assert len(cells) == len(rows.header)
        assert (cells[-1] != "") == (cells[0] in train_step.COMPILED)
        assert cells[3] == ""  # of a CPU no peak is known
    seconds = made["figures"]["W4A4 STE"]["seconds"]
    (line,) = [cells for cells in rows.cells if cells[0] == "W4A4 STE"]
    assert line[2] == f"{8 * 64 / seconds:,.0f}"
    on_gpu = train_step.table(made | {"device": "NVIDIA H200"})
    (line,) = [cells for cells in on_gpu.cells if cells[0] == "W4A4 STE"]
    # One layer of width 64, of windows of 64; its head is of 256 bytes.
    weights = 4 * 64**2 + 3 * 64 * 192 + 64 * 256
    each = 6 * weights + 12 * 64 * 64
    assert line[3] == f"{8 * 64 * each / seconds / 989e12:.1%}"
    ratios = {t["text"]: t["measured"] for t in made["targets"]}
    compiled = made["compile seconds"]
    assert ratios["compiling 8 layers with everything, to full precision"] == (
        compiled["W4A4 KV4 CAGE, active"][0] / compiled["full precision"][0]
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_chip(device, peak):
    assert utilization.peak_of(device) == peak


def test_the_record_of_curvature(monkeypatch):
    # Those that the target is of, one without a state, and one that is given gradients.
    names = ["second_moment", "fisher, sampled", "hutchinson", "gauss_newton"]
    sources = {name: curvature_cost.SOURCES[name] for name in names}
    monkeypatch.setattr(curvature_cost, "SOURCES", sources)
    made = curvature_cost.measure("tiny", rounds=1, periods=(10,))
    figures = made["figures"]
    assert figures["STE"]["to STE"] == figures["CAGE"]["to CAGE"] == 1
    kept = {figure["source"]: figure["bytes"] for figure in figures.values()}
    assert kept["CAGE"] == kept["second_moment"] == 0
    for name in names[1:]:
        # A float32 each, and the counts.
        assert 4 < kept[name] < 4.01
    (target,) = made["targets"]
    products = [figures[f"{name}, period 10"] for name in names[2:]]
    assert target["measured"] == min(each["to CAGE"] for each in products)
    rows = curvature_cost.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == ["STE", "CAGE", *names]
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_record_of_sharded_steps():
    made = sharding.measure("tiny", rounds=2, warmup=1, devices=(1, 2))
    rows = sharding.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == [
        "1, AdamW", "1, CAGE", "2, AdamW", "2, CAGE"
    ]  # fmt: skip
    alone, _, adamw, pulled = made["figures"].values()
    assert not alone["counts"] and adamw["counts"] == pulled["counts"] != {}
    ratios = {each["text"]: each["measured"] for each in made["targets"]}
    assert ratios["2 devices, CAGE to AdamW"] == pulled["to AdamW"]


def test_the_record_of_layers():
    made = layers.measure(width=16, tokens=32, rounds=2, warmup=1)
    rows = layers.table(json.loads(json.dumps(made)))
    assert rows.header[2:] == ["W4A16", "W4A8", "W4A4", "KV8", "KV4"]
    assert [cells[0] for cells in rows.cells][-1] == "attention, keys and values"
    for cells in rows.cells:
        assert len(cells) == len(rows.header)
        assert [bool(cell) for cell in cells[2:5]] == [cells[3] != ""] * 3


@pytest.mark.parametrize("kind", list(layers.layers(16, 32)))
def test_each_arm_of_a_layer_is_another_function(kind):
    model, x = layers.layers(16, 32)[kind]
    found = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(step())])
        for step in (
            layers.quantized_step(model, x, *arm) for arm in layers.ARMS.values()
        )
    ]
    for i, one in enumerate(found):
        assert np.all(np.isfinite(one))
        assert not any(np.array_equal(one, other) for other in found[:i])


# --- import time ----------------------------------------------------------------------


def test_import_time_of_other_statements(monkeypatch):
    monkeypatch.setattr(import_time, "STATEMENTS", {"none": "", "some": "import json"})
    found = import_time.measure(rounds=1, warmup=0)
    without, together = (each[0] for each in found["seconds"].values())
    assert found["figures"]["added by cage_jax"] == together - without
    assert import_time.table(found).cells[0][0] == "none"


@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        (import_time, ["--rounds", "2"], "`--rounds` must be at least 3"),
        (quantizers, ["--rounds", "2"], "`--rounds` must be at least 3"),
        (quantizers, ["--size", "100"], "`--size` must be a multiple of 128"),
        (optimizer_step, ["--sizes", "1T"], "`--sizes` must be among"),
        (optimizer_step, ["--rounds", "0"], "`--rounds` must be at least 3"),
    ],
    ids=["import_time", "quantizers", "size", "sizes", "rounds"],
)
def test_the_programs_say_what_is_wrong(monkeypatch, capsys, module, arguments, text):
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    assert module.main() == 2
    assert text in capsys.readouterr().out


# --- presets --------------------------------------------------------------------------


def test_the_page_of_quantizers_agrees_with_the_presets():
    text = presets.PAGE.read_text()
    assert presets.filled(text) == text, "run python benchmarks/presets.py"
    with pytest.raises(ValueError, match="must have a place for the table"):
        presets.filled("no place")
