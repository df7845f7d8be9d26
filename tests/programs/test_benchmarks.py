"""The benchmarks: formulas and records, never timings."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import adapters
import curvature_cost
import digits
import distillation
import effect
import import_time
import jax
import jax.numpy as jnp
import layers
import measurement
import model_programs
import numpy as np
import presets
import pytest
import quantizers
import sharding
import tables
import train_step
import utilization
from rich.console import Console

pytestmark = pytest.mark.usefixtures("as_users_have_it")


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


def test_contestants_take_turns_and_ratios_are_medians_over_rounds():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measurement.interleaved(functions, rounds=3, warmup=1)
    assert calls == list("abababab")
    assert [len(each) for each in times.values()] == [3, 3]
    times = {"a": [2.0, 9.0, 30.0], "b": [1.0, 3.0, 5.0]}
    assert measurement.median_ratio(times, "a", "b") == 3.0


def test_records_are_written_and_tables_made_from_them(tmp_path):
    section = partial(tables.section, folder=tmp_path)
    missing = tables.filled("<!-- table: nothing -->\n<!-- end -->", section)
    assert "Not measured yet." in missing
    path = measurement.save(record(), tmp_path)
    assert json.loads(path.read_text()) == record()
    text = "before\n<!-- table: import_time -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(text, section)
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "| added by cage_jax | 0.25 |" in filled
    assert "old" not in filled
    assert tables.filled(filled, section) == filled
    # A target is an upper bound.
    for measured, met in ((0.3, True), (0.31, False)):
        each = measurement.target("seconds", measured, 0.3)
        assert each["met"] is met
        (line,) = measurement.target_lines({"targets": [each]})
        assert line.endswith(", met." if met else "NOT met.")


def test_the_pages_agree_with_the_results_and_the_presets():
    text = tables.README.read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"
    text = presets.PAGE.read_text()
    assert presets.filled(text) == text, "run python benchmarks/presets.py"
    with pytest.raises(ValueError, match="must have a place for the table"):
        presets.filled("no place")


def check_rows(rows):
    """Every line of a table is as long as its header."""
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


# --- effect ---------------------------------------------------------------------------


def test_hessians_have_the_spectrum_that_is_stated():
    for problem in effect.PROBLEMS[:3]:
        curvatures, optima = effect.hessians(problem, seeds=2)
        assert curvatures.shape == (2, 128, 128) and optima.shape == (2, 128, 1)
        assert not np.array_equal(*optima)
        for curvature in curvatures:
            eigenvalues = np.linalg.eigvalsh(np.float64(curvature))[::-1]
            exponents = np.arange(128) / 127
            expected = problem.condition**-exponents
            np.testing.assert_allclose(eigenvalues, expected, rtol=1e-3, atol=1e-6)
            aside = curvature - np.diag(np.diag(curvature))
            assert (np.count_nonzero(aside) == 0) != problem.correlated


def test_two_noiseless_steps_are_the_recursion_written_out(monkeypatch):
    """Plain STE by SGD: x <- x - lr H (Q(x) - x*), from x*."""
    monkeypatch.setattr(effect, "STRENGTHS", {})
    monkeypatch.setattr(effect, "SOURCES", {})
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
    check_rows(effect.table(json.loads(json.dumps(found))))


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


def test_the_record_of_images(monkeypatch, rng):
    monkeypatch.setattr(effect, "IMAGE_MODELS", (("resnet", 4), ("vit", 2)))
    asked, drawn = [], []

    def run(settings, console):
        asked.append(settings)
        draw = rng.normal(size=(len(digits.ARMS), 3, settings.seeds))
        scores = effect.fashion_mnist.Scores
        drawn.append(dict(zip(digits.ARMS, (scores(*each) for each in draw))))
        return SimpleNamespace(arms=drawn[-1])

    monkeypatch.setattr(effect.fashion_mnist, "run", run)
    found = effect.images(seeds=20, steps=10)
    for settings in asked:
        assert (settings.seeds, settings.steps, settings.resume) == (3, 10, True)
        assert settings.w_bits == settings.a_bits
    assert len({settings.out for settings in asked}) == 2
    assert list(found["seed_by_seed"]) == ["ResNet W4A4", "ViT W2A2"]
    for figure, arms in zip(found["figures"], drawn):
        mean = np.mean(arms["cage"].train_loss - arms["ste"].train_loss)
        np.testing.assert_allclose(figure["train_loss"]["mean"], mean)
    rows = effect.table(json.loads(json.dumps(found)))
    assert rows.header == ["train loss", "ResNet W4A4", "ViT W2A2"]


# --- quantizers -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_others_quantize_alike(rng):
    pytest.importorskip("qwix")
    pytest.importorskip("torchao")
    x = rng.standard_normal((256, 256), np.float32)
    for name, case in quantizers.CASES.items():
        functions = quantizers.functions_of(case, x)
        assert (quantizers.QWIX in functions) == (case.qwix is not None)
        assert (quantizers.TORCH in functions) == (case.bits is not None)
        values = {other: np.asarray(run()) for other, run in functions.items()}
        ours = values[quantizers.OURS]
        for other, value in values.items():
            error, theirs = (np.sqrt(((v - x) ** 2).mean()) for v in (ours, value))
            # torchao's integers are of full range, qwix's powers of two are rounded
            # up, and its NVFP4 has no scale of the tensor.
            assert 0.9 < error / theirs < 1.3, (name, other)
        if case.bits:
            # Of groups of the last axis and the narrow range; but for ties.
            assert np.mean(values[quantizers.TORCH] == ours) > 0.99, name


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
    check_rows(quantizers.table(json.loads(json.dumps(found))))


# --- train steps and layers -----------------------------------------------------------


def test_the_record_of_train_steps(monkeypatch):
    # One that is compiled and run; trainings with the others have tests of their own.
    assert train_step.compile_seconds("tiny", "full", {}) > 0
    stepper = train_step._stepper

    def step_of(experiment, segment, step):
        if experiment.settings.kv_bits and segment.name == "cage":
            return stepper(experiment, segment, step)
        return lambda: None

    monkeypatch.setattr(train_step, "_stepper", step_of)

    def compile_seconds(size, kind, changes):
        return len(kind) + len(changes)

    monkeypatch.setattr(train_step, "compile_seconds", compile_seconds)
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
    assert made["compile seconds"]["W4A4 KV4 CAGE, active"] == [5]
    assert ratios["compiling 8 layers with everything, to full precision"] == 5 / 4


def test_the_record_of_one_window(monkeypatch):
    asked = []

    def step_of(experiment, segment, step):
        asked.append((experiment, segment, step))
        return lambda: None

    monkeypatch.setattr(train_step, "_stepper", step_of)
    made = train_step.measure_window("tiny", rounds=10, warmup=1)
    for (experiment, segment, step), name in zip(asked, train_step.WINDOW_STEPS):
        settings = experiment.settings
        assert (settings.batch, settings.sequence, settings.a_bits) == (1, 512, 8)
        assert settings.recommended == ("recommended" in name)
        assert (segment.name == "cage") == ("CAGE" in name)
        # Gradients are read from 100 steps before the pull begins.
        begins = settings.silence * settings.steps
        assert step > begins if "active" in name else step + 11 < begins - 100
    (target,) = made["targets"]
    assert target["measured"] == made["figures"][name]["to STE"]
    rows = train_step.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == list(train_step.WINDOW_STEPS)
    check_rows(rows)
    seconds = made["figures"][name]["seconds"]
    assert rows.cells[-1][2] == f"{512 / seconds:,.0f}"


def test_the_peak_of_a_chip():
    for device, peak in {
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "NVIDIA L40S": None,
        "cpu": None,
    }.items():
        assert utilization.peak_of(device) == peak, device


def test_the_record_of_curvature(monkeypatch):
    """Three sources are recorded, but only one of them is run."""
    names = ["fisher, sampled", "hutchinson", "gauss_newton"]
    sources = {name: curvature_cost.SOURCES[name] for name in names}
    monkeypatch.setattr(curvature_cost, "SOURCES", sources)

    class Training(curvature_cost.Training):
        def __init__(self, experiment, source, *arguments, **options):
            super().__init__(experiment, source, *arguments, **options)
            self._run = source is sources["gauss_newton"]

        def __call__(self):
            if self._run:
                super().__call__()
            else:
                number = jax.ShapeDtypeStruct((), jnp.int32)
                jax.eval_shape(self._step, self._state, self._windows, number)

    monkeypatch.setattr(curvature_cost, "Training", Training)
    made = curvature_cost.measure("tiny", rounds=1, periods=(10,))
    figures = made["figures"]
    assert figures["STE"]["to STE"] == figures["CAGE"]["to CAGE"] == 1
    kept = {figure["source"]: figure["bytes"] for figure in figures.values()}
    assert kept["CAGE"] == 0
    for name in names:
        # A float32 each, and the counts.
        assert 4 < kept[name] < 4.01
    (target,) = made["targets"]
    products = [figures[f"{name}, period 10"] for name in names[1:]]
    assert target["measured"] == min(each["to CAGE"] for each in products)
    rows = curvature_cost.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == ["STE", "CAGE", *names]
    check_rows(rows)


def test_the_record_of_sharded_steps():
    made = sharding.measure("tiny", rounds=2, warmup=1, devices=(2,))
    rows = sharding.table(json.loads(json.dumps(made)))
    assert [cells[0] for cells in rows.cells] == ["2, AdamW", "2, CAGE"]
    adamw, pulled = made["figures"].values()
    assert adamw["counts"] == pulled["counts"] != {}
    ratios = {each["text"]: each["measured"] for each in made["targets"]}
    assert ratios["2 devices, CAGE to AdamW"] == pulled["to AdamW"]


def test_the_record_of_layers(monkeypatch):
    timed, interleaved = {}, measurement.interleaved

    def kept(functions, *arguments):
        timed[len(timed)] = functions
        return interleaved(functions, *arguments)

    monkeypatch.setattr(measurement, "interleaved", kept)
    made = layers.measure(width=16, tokens=32, rounds=2, warmup=1)
    rows = layers.table(json.loads(json.dumps(made)))
    assert rows.header[2:] == ["W4A16", "W4A8", "W4A4", "KV8", "KV4"]
    assert [cells[0] for cells in rows.cells][-1] == "attention, keys and values"
    check_rows(rows)
    for cells in rows.cells:
        assert [bool(cell) for cell in cells[2:5]] == [cells[3] != ""] * 3
    # Each arm of a layer is another function.
    for kind, functions in zip(made["figures"], timed.values(), strict=True):
        found = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(step())])
            for step in functions.values()
        ]
        for i, one in enumerate(found):
            assert np.all(np.isfinite(one)), kind
            assert not any(np.array_equal(one, other) for other in found[:i]), kind


# --- import time ----------------------------------------------------------------------


def test_import_time_of_other_statements(monkeypatch):
    monkeypatch.setattr(import_time, "STATEMENTS", {"none": "", "some": "import json"})
    found = import_time.measure(rounds=1, warmup=0)
    without, together = (each[0] for each in found["seconds"].values())
    assert found["figures"]["added by cage_jax"] == together - without
    assert import_time.table(found).cells[0][0] == "none"


def test_the_programs_of_a_small_model(monkeypatch):
    monkeypatch.setattr(model_programs, "BOUNDS", {"flat": 1.5})
    settings = model_programs.Settings(rounds=1, layers=1, width=64)
    caches = jax.config.jax_enable_compilation_cache
    try:
        figures = model_programs.measure(settings)["figures"]
    finally:
        jax.config.update("jax_enable_compilation_cache", caches)
    times = [
        sum(figures[f"flat, {name}, {phase}"] for phase in model_programs.PHASES)
        for name in ("W4A8", "full")
    ]
    assert figures["flat, ratio"] == pytest.approx(times[0] / times[1])


def test_distillation_to_cross_entropy():
    small = {"rounds": 1, "tokens": 32, "vocabulary": 512, "width": 64}
    found = distillation.measure(distillation.Settings(layers=1, k=8, **small))
    figures = found["figures"]
    base = figures["cross-entropy"]["bytes"]
    assert base >= 4 * 32 * 512  # the logits
    for name, each in figures.items():
        assert each["bytes, ratio"] == each["bytes"] / base
        assert (each["seconds"] is None) == (name not in found["seconds"])
    assert [target["bound"] for target in found["targets"]] == [1.3, 1.3, 1.1, 1.4]
    rows = distillation.table(json.loads(json.dumps(found)))
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_memory_of_adapters(monkeypatch):
    kinds = {kind: adapters.KINDS[kind] for kind in (adapters.ALL, adapters.IN_PLACE)}
    monkeypatch.setattr(adapters, "KINDS", kinds)
    settings = adapters.Settings(width=64, layers=3, tokens=8, rounds=1)
    found = adapters.measure(settings)
    every, in_place = found["figures"].values()
    assert every["kept"] == pytest.approx(every["trained"], rel=0.01)
    # A byte a weight in place of 12, and few others.
    assert in_place["kept"] < every["kept"] / 4
    assert in_place["step"] < every["step"]
    rows = adapters.table(found)
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_programs_say_what_is_wrong(monkeypatch, capsys):
    for module, arguments, text in (
        (effect, ["--seeds", "1"], "`--seeds` must be at least 2"),
        (import_time, ["--rounds", "2"], "`--rounds` must be at least 3"),
        (quantizers, ["--rounds", "2"], "`--rounds` must be at least 3"),
        (quantizers, ["--size", "100"], "`--size` must be a multiple of 128"),
    ):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        assert module.main() == 2, text
        assert text in capsys.readouterr().out
