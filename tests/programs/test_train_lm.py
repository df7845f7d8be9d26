import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import outcome
import pytest
import train_lm
import training
from batches import Batches
from checkpoints import newest
from experiment import USUAL, WRITTEN_AT_ONCE, Experiment, Settings
from flax import nnx
from lm import LanguageModel
from outcome import Result, summary, verdict
from rich.console import Console
from sizes import SIZES

import cage_jax as cage
from cage_jax.llama import Llama

CONSOLE = Console(quiet=True)


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Flax and optax.adamw need jax's standard promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def settings(out, **changes):
    values = {"arms": ("ste", "cage"), "tiny": True, "steps": 20, "strength": 300.0}
    return Settings(out=Path(out), **({"devices": 1} | values | changes))


def after_each_step(monkeypatch, look):
    """Calls `look` with the segment and the state after each step."""
    original = Experiment.step_of

    def step_of(self, segment):
        run = original(self, segment)

        def keep(*arguments):
            state = run(*arguments)
            look(segment, state)
            return state

        return keep

    monkeypatch.setattr(Experiment, "step_of", step_of)


ITERATES = []
THREE = "ste", "averaged", "cage"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    def look(segment, state):
        if segment.averages:
            ITERATES.append(jax.tree.map(np.asarray, state.params))

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        after_each_step(patch, look)
        out = tmp_path_factory.mktemp("run")
        return train_lm.run(settings(out, arms=THREE), CONSOLE)


def assert_same(found, expected):
    """The same arms to the bit."""
    assert list(found) == list(expected)
    for arm, result in expected.items():
        assert found[arm].loss == result.loss
        chex.assert_trees_all_equal(found[arm].params, result.params)
        np.testing.assert_array_equal(found[arm].history.losses, result.history.losses)


def disturb(monkeypatch, at, act):
    """Calls `act` when training reads the data of step `at`, counted over all arms."""
    original, reads = Batches.start, 0

    def start(self, step):
        nonlocal reads
        for windows in original(self, step):
            reads += 1
            if reads == at:
                act()
            yield windows

    monkeypatch.setattr(Batches, "start", start)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def crash():
    raise RuntimeError("the machine fails")


def test_a_stopped_run_goes_on_bit_exactly(tmp_path, monkeypatch, undisturbed):
    """Stopped by Ctrl-C, by a crash without time to save, and by a kill."""
    monkeypatch.setattr(training, "LOOK_SECONDS", 0)  # after each step
    asked = settings(tmp_path, arms=THREE)
    for at, act, error, kept in (
        (7, send(signal.SIGINT), training.Stopped, ("trunk", 7)),
        (12, crash, RuntimeError, ("trunk", 16)),  # in the third of STE's last steps
        (7, send(signal.SIGTERM), training.Stopped, ("cage", 19)),  # while it pulls
    ):
        with monkeypatch.context() as patch:
            disturb(patch, at, act)
            with pytest.raises(error):
                train_lm.run(asked, CONSOLE)
        assert newest(tmp_path) == kept
        asked = settings(tmp_path, arms=THREE, resume=True)
    assert_same(train_lm.run(asked, CONSOLE), undisturbed)


def test_arms_share_the_trunk_and_part_where_cage_pulls(undisturbed):
    ste, pulled = undisturbed["ste"].history, undisturbed["cage"].history
    branch = int(0.8 * 20)
    np.testing.assert_array_equal(ste.losses[:branch], pulled.losses[:branch])
    assert not np.isnan(ste.losses).any()
    assert not np.array_equal(ste.losses[branch + 1 :], pulled.losses[branch + 1 :])
    assert pulled.distance[-1] < ste.distance[-1]


def test_recommended_cage_parts_from_the_same_trunk_at_half(tmp_path, undisturbed):
    """To the bit until then, though the trunk has the state of a curvature."""
    changes = {"strength": 10.0, "recommended": True}
    found = train_lm.run(settings(tmp_path, arms=("cage",), **changes), CONSOLE)
    ste, pulled = undisturbed["ste"].history, found["cage"].history
    np.testing.assert_array_equal(ste.losses[:11], pulled.losses[:11])
    assert not np.array_equal(ste.losses[11:], pulled.losses[11:])
    experiment = Experiment(settings(tmp_path, **changes).resolved())
    assert 0 < experiment.dose() < 0.1  # the strength has a limit in so few steps
    experiment = Experiment(settings(tmp_path, steps=2000, **changes).resolved())
    assert experiment.dose() == pytest.approx(0.7, rel=1e-4)
    with pytest.raises(ValueError, match="`--recommended` must come without --str"):
        settings(tmp_path, strength=3.0, recommended=True).resolved()


def test_rivals_are_trained_on_the_same_batches(tmp_path, undisturbed):
    """One that pulls, and those whose gradients are taken at other weights."""
    arms = ("recommended", "lotion", "parq", "winq")
    found = train_lm.run(settings(tmp_path, arms=arms, steps=20), CONSOLE)
    assert list(found) == list(arms)
    first = {arm: result.history.losses[0] for arm, result in found.items()}
    ste = undisturbed["ste"].history.losses
    # At quantized weights, at noisy ones, and at those that are not rounded yet.
    assert first["recommended"] == ste[0]
    assert first["winq"] != ste[0] and abs(first["winq"] - ste[0]) < 1e-2
    assert first["lotion"] == first["parq"] != ste[0]
    # What pulls at all, pulls only after its silence.
    losses = found["recommended"].history.losses
    np.testing.assert_allclose(losses[:10], ste[:10], rtol=1e-6)
    assert not np.array_equal(losses[11:], ste[11:])
    last = [result.loss for result in found.values()]
    assert len(set(last)) == len(last) and np.isfinite(last).all()
    report = Experiment(settings(tmp_path, arms=arms, layers=2).resolved()).report
    assert report.rows[0].shape[0] == 2 or "layers" not in report.rows[0].path


def test_the_average_is_that_of_the_last_iterates(undisturbed):
    assert len(ITERATES) == 4
    expected = jax.tree.map(
        lambda *each: np.mean(np.stack(each), axis=0, dtype=np.float64), *ITERATES
    )
    # Four roundings of a running mean in float32.
    chex.assert_trees_all_close(
        undisturbed["averaged"].params, expected, rtol=1e-5, atol=1e-7
    )


def spoil(monkeypatch, steps):
    """The loss of the batches of these steps is NaN."""
    experiment = Experiment(settings("unused").resolved())
    batches = experiment.batches(experiment.text)
    sums = jnp.array([np.asarray(batches[step]).astype(int).sum() for step in steps])
    original = LanguageModel.loss

    def loss(self, params, windows, *arguments, **named):
        value = original(self, params, windows, *arguments, **named)
        spoilt = jnp.isin(windows.astype(jnp.int32).sum(), sums)
        return jnp.where(spoilt, jnp.nan, value)

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    """With stochastic rounding, and where the run is stopped after two such steps."""
    spoil(monkeypatch, (4, 5, 9))
    states = []

    def run(out, **changes):
        asked = settings(tmp_path / out, arms=("ste",), stochastic=True, **changes)
        return train_lm.run(asked, CONSOLE)

    def look(segment, state):
        states.append(jax.tree.map(np.asarray, (state.params, state.optimizer)))

    with monkeypatch.context() as patch:
        after_each_step(patch, look)
        whole = run("whole")
    history = whole["ste"].history
    assert np.flatnonzero(np.isnan(history.losses)).tolist() == [4, 5, 9]
    counts = [(int(o.total_notfinite), int(o.notfinite_count)) for _, o in states]
    assert counts[3:10] == [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0), (2, 0), (3, 1)]
    for params, optimizer in states[4:6]:
        chex.assert_trees_all_equal(params, states[3][0])
        inner = optimizer.inner_state
        chex.assert_trees_all_equal(inner, states[3][1].inner_state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(states[6][0], states[3][0])
    # The key moves on, another number each step, and over a stop.
    first = jax.random.key_data(jax.random.key(0))
    assert not np.array_equal(history.key, first)
    with monkeypatch.context() as patch:
        disturb(patch, 7, send(signal.SIGTERM))
        with pytest.raises(training.Stopped):
            run("parts")
    assert_same(run("parts", resume=True), whole)


def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, range(6, 20))
    flags = "--tiny --steps 20 --devices 1 --strength 300 --arms ste --max-skipped 3"
    flags += f" --save-seconds 0 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["train_lm.py", *flags.split()])
    monkeypatch.setattr(training, "LOOK_SECONDS", 0)  # after each step
    assert train_lm.main() == 1
    printed = capsys.readouterr().out
    assert "the last 3 steps of trunk had a loss or gradient that is not" in printed
    assert "stopped at step 9" in printed and "Lower" not in printed
    assert "the newest checkpoint is step 8 of trunk" in printed


def test_other_devices_go_on_from_a_checkpoint(tmp_path, monkeypatch, undisturbed):
    def run(**changes):
        return train_lm.run(settings(tmp_path, arms=("ste",), **changes), CONSOLE)

    with monkeypatch.context() as patch:
        disturb(patch, 9, send(signal.SIGTERM))
        with pytest.raises(training.Stopped):
            run(devices=4, model_devices=2)
    found, expected = run(devices=2, resume=True)["ste"], undisturbed["ste"]
    # Sums over devices are rounded in another order, and a code may flip.
    np.testing.assert_allclose(found.history.losses, expected.history.losses, rtol=2e-3)
    assert found.loss == pytest.approx(expected.loss, rel=2e-3)


def test_the_program_from_start_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = ["train_lm.py", "--tiny", "--steps", "10", "--devices", "1"]
    flags += ["--out", str(out)]
    monkeypatch.setattr("sys.argv", flags)
    assert train_lm.main() == 0
    printed = capsys.readouterr().out
    assert "give the same validation loss" in printed
    assert "CAGE's dose is" in printed
    assert "proves nothing" in printed and "With this one seed" not in printed
    assert "Table, plot and codes are in" in printed
    record = json.loads((out / "results.json").read_text())
    rows = {row["arm"]: row for row in record["results"]}
    assert list(rows) == list(USUAL)
    assert record["codes"]["weights_equal"]
    assert record["codes"]["loss"] == rows["cage"]["validation_loss"]
    gap = rows["ste"]["validation_loss"] - rows["full"]["validation_loss"]
    assert rows["ste"]["gap_to_full"] == gap
    assert rows["cage"]["size_mb"] < rows["full"]["size_mb"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    # Finished segments are read, not trained again; another arm's flags fit.
    monkeypatch.setattr("sys.argv", [*flags, "--resume", "--arms", "full"])
    assert train_lm.main() == 0
    printed = capsys.readouterr().out
    assert "100% done" in printed and "compiling" not in printed
    assert "finds no run" not in printed
    assert "Table and plot are in" in printed  # full precision has no codes
    # Neither without --resume nor with another model.
    monkeypatch.setattr("sys.argv", flags)
    assert train_lm.main() == 2
    assert "Add --resume to go on with it" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr("sys.argv", [*flags, "--resume", "--w-bits", "2"])
    assert train_lm.main() == 2
    assert "w_bits was 4, is 2" in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["results"]
    assert [row["arm"] for row in rows] == list(USUAL)


def test_resuming_nothing_is_said(tmp_path, monkeypatch, capsys):
    def train(*_):
        raise training.Stopped(signal.SIGINT)

    monkeypatch.setattr(train_lm, "train", train)
    flags = ["train_lm.py", "--tiny", "--resume", "--devices", "1"]
    flags += ["--out", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", flags)
    assert train_lm.main() == 130
    assert "--resume finds no run in" in capsys.readouterr().out


def test_the_rate_is_that_of_the_steps(monkeypatch):
    """Steps of 0.25 s, evaluations of 10 s, which are none."""
    now = 100.0
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now))
    watch, step, looks = training._Watch(7, [], 60), 7, []
    while step < 500:
        now, step = now + 0.25, step + 1
        if step % 10 == 0:
            with watch.paused():
                now += 10
        if step == watch.next:
            looks.append((step, watch.look(step)))
    steps = [step for step, _ in looks]
    assert steps[:3] == [8, 12, 16] and set(np.diff(steps[1:])) == {4}
    assert {look.rate for _, look in looks} == {4.0}
    assert {look.stop for _, look in looks} == {0}
    # 4 steps a second with an evaluation of 10 s for every ten: a minute is 48 steps.
    saves = [step for step, look in looks if look.save]
    assert np.diff(saves).max() <= 52
    logs = [step for step, look in looks if look.log]
    assert len(saves) < len(logs)


def test_any_process_may_be_asked_to_stop(monkeypatch):
    watch = training._Watch(0, [], 60)
    monkeypatch.setattr(
        training.processes, "gather", lambda *own: np.array([own, (9, 99, 99, 15)])
    )
    look = watch.look(1)
    assert look.stop == signal.SIGTERM
    # The clock is that of the first.
    assert not look.save and not look.log


def test_a_share_is_given_where_there_is_a_gap(tmp_path):
    end = SimpleNamespace(optimizer=SimpleNamespace(total_notfinite=0))
    experiment = Experiment(settings(tmp_path).resolved())
    for ste, recovered, says in (
        (1.5, 0.25, "beats"),
        (1.1, None, "loses to"),
        (1.0, None, "loses to"),
    ):
        losses = {"full": 1.1, "ste": ste, "cage": 1.4}
        results = {arm: Result(loss, None, None, end) for arm, loss in losses.items()}
        rows = {row["arm"]: row for row in summary(experiment, results)}
        share = rows["cage"]["share_recovered"]
        assert share == (None if recovered is None else pytest.approx(recovered))
        assert rows["ste"]["share_recovered"] is None
        said = verdict(results)
        assert f"{says} straight through (STE)" in said
        assert ("no gap to close" in said) == (recovered is None)


def test_arms_of_before_and_skipped_steps_are_told(tmp_path):
    path, asked = tmp_path / "results.json", settings(tmp_path).resolved()
    experiment = Experiment(asked)

    def write(**arms):
        results = {
            arm: Result(loss, None, None, SimpleNamespace(optimizer=SimpleNamespace(
                total_notfinite=skipped)))
            for arm, (loss, skipped) in arms.items()
        }  # fmt: skip
        rows = summary(experiment, results)
        outcome.write_json(experiment, rows, None, path)
        return outcome.skipped(rows, asked.steps)

    assert write(ste=(2.0, 0), cage=(1.5, 0)) == ""
    assert "18 of 20 for full precision." in write(full=(1.0, 18), ste=(2.5, 0))
    kept = {row["arm"]: row for row in json.loads(path.read_text())["results"]}
    assert {arm: row["validation_loss"] for arm, row in kept.items()} == {
        "full": 1.0, "ste": 2.5, "cage": 1.5
    }  # fmt: skip
    assert kept["full"]["steps_skipped"] == 18


def test_gradients_of_microbatches_add_up():
    whole = Experiment(settings("unused", batch=4, microbatch=4).resolved())
    parts = Experiment(settings("unused", batch=4, microbatch=1).resolved())
    windows = whole.batches(whole.text)[0]
    ends = []
    for experiment in (whole, parts):
        segment = experiment.segments[0]
        state = experiment.first_state(segment)
        state = experiment.step_of(segment)(state, windows, np.int32(0))
        ends.append(state.losses[0])
    # Mean of means, summed in another order.
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_the_paper_hyperparameters():
    steps = {name: size.steps for name, size in SIZES.items()}
    assert steps["30m"] == round(3e9 / 512**2)
    for name, millions in [("30m", 30), ("100m", 100), ("430m", 430), ("800m", 800)]:
        experiment = Experiment(
            Settings(size=name, arms=("ste",), silence=0.8).resolved()
        )
        weights = sum(row.size for row in experiment.report.rows if row.quantizer)
        assert abs(weights / 1e6 - millions) < 0.08 * millions
        # The dose of the published recipe, method.md.
        assert 1.5 < experiment.dose() < 3.0


def test_bad_settings(tmp_path):
    for changes, message in (
        ({"steps": 3}, "`--steps` must be at least 10"),
        ({"batch": 0}, "`--batch` must be positive"),
        ({"batch": 6, "microbatch": 4}, "`--microbatch` must divide --batch"),
        ({"floor": 1.5}, "`--floor` must be in"),
        ({"learning_rate": 0.0}, "`--learning-rate` must be positive"),
        ({"a_bits": 9}, "`--a-bits` must be from 1 to 8"),
        ({"w_bits": 0}, "`--w-bits` must be from 1 to 8"),
        ({"kv_bits": 1}, "`--kv-bits` must be from 2 to 8"),
        ({"distill": True, "arms": ("full", "ptq")}, "`--distill` must have an arm"),
        ({"silence": 1.0}, "`--silence` must be in"),
        ({"strength": -1.0}, "`--strength` must be finite and not negative"),
        ({"strength": float("nan")}, "`--strength` must be finite and not negative"),
        ({"arms": ()}, "`--arms` must be some of"),
        ({"devices": 9}, "`--devices` must be at most the 8 that there are; got 9"),
        ({"devices": 3}, "`--batch` must be a multiple of the 3 devices"),
        ({"model_devices": 3, "devices": 8}, "`--model-devices` must divide"),
        ({"model_devices": 0}, "`--model-devices` must be positive"),
        ({"max_skipped": 0}, "`--max-skipped` must be positive"),
        ({"save_seconds": -1.0}, "`--save-seconds` must be finite and not negative"),
        ({"vocabulary": 100}, "`--vocabulary`"),
        ({"size": "800m"}, "`--tiny` must come without --size"),
    ):
        with pytest.raises(ValueError, match=message):
            train_lm.run(settings(tmp_path / "new", **changes), CONSOLE)
        assert not (tmp_path / "new").exists(), message
    (tmp_path / "new").touch()
    with pytest.raises(ValueError, match="`--out` must be a folder; got"):
        train_lm.run(settings(tmp_path / "new"), CONSOLE)


# --- keys and values, and distillation ------------------------------------------------


@pytest.mark.parametrize("kv", [None, cage.int4(axis=-1)], ids=str)
def test_decoding_is_the_forward_pass(kv):
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, 256)
    model = Llama(SIZES["tiny"].config(256), kv=kv, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    @jax.jit
    def decode(params):
        def step(caches, token):
            logits, caches = nnx.merge(graph, params).decode(token, caches)
            return caches, logits

        return jax.lax.scan(step, model.empty_caches(3, 12), tokens.T)

    caches, logits = decode(params)
    # Sums in another order; no key lies so close to a tie that it goes elsewhere.
    np.testing.assert_allclose(
        jnp.moveaxis(logits, 0, 1), jax.jit(model)(tokens), rtol=1e-4, atol=1e-5
    )
    size = SIZES["tiny"]
    kept = 2 * size.layers * 3 * 12 * size.width
    scales = 4 * kept // size.head_size
    assert sum(c.nbytes for c in caches) == (
        4 * kept if kv is None else kept // 2 + scales
    )


def test_keys_and_values_are_quantized_where_the_inputs_are():
    windows = jax.random.randint(jax.random.key(1), (2, 65), 0, 256)
    plain, few = (
        Experiment(settings("unused", kv_bits=bits).resolved()) for bits in (None, 2)
    )
    assert plain.model.graphs[False] == few.model.graphs[False]
    params = plain.model.initial_params()
    losses = [float(each._loss(params, windows, True)) for each in (plain, few)]
    # Of an untrained model hardly anything depends on attention.
    assert 0 < abs(losses[0] - losses[1]) < 0.1


def sharp(experiment):
    """The first parameters, but sure of what comes next."""
    params = experiment.model.initial_params()
    params["head"]["kernel"][...] *= 30
    return params


def test_the_teacher_writes_what_it_predicts():
    experiment = Experiment(settings("unused", distill=True).resolved())
    params = sharp(experiment)
    parts = [np.asarray(experiment.write(params, part)) for part in range(3)]
    assert not np.array_equal(parts[0], parts[1])
    np.testing.assert_array_equal(parts[1], experiment.write(params, 1))
    written = np.concatenate(parts)
    assert written.shape == (3 * WRITTEN_AT_ONCE, 65)
    there = np.unique(experiment.tokens.train)
    np.testing.assert_array_equal(np.unique(written[:, 0]), there)

    # The whole forward pass in place of the cache, then float64.
    model = nnx.merge(experiment.model.graphs[False], params)
    logits = np.asarray(jax.jit(model)(written[:, :-1].astype(np.int32)), np.float64)
    likelihood = logits - logits.max(-1, keepdims=True)
    likelihood -= np.log(np.exp(likelihood).sum(-1, keepdims=True))
    best = np.argmax(logits, axis=-1) == written[:, 1:]
    for rounds, likely in enumerate((3, 4, 5)):
        window = np.arange(len(written)) // len(there) == rounds
        if window.any():
            assert best[window, :likely].mean() > 0.99  # but for a tie
            assert best[window, likely].mean() < 0.9
    entropy = -(np.exp(likelihood) * likelihood).sum(-1)
    surprise = -np.take_along_axis(likelihood, written[:, 1:, None].astype(int), -1)
    drawn = np.s_[:, 5:]
    difference = (surprise[..., 0] - entropy)[drawn]
    # Four standard errors; the most likely ones would be a nat off.
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
    assert entropy[drawn].mean() > 1


def test_the_loss_of_distillation_is_that_of_soft_labels():
    experiment = Experiment(settings("unused", distill=True).resolved())
    params, teacher = experiment.model.initial_params(), sharp(experiment)
    windows = jax.random.randint(jax.random.key(1), (2, 65), 0, 256)

    def log_softmax(graph, params):
        logits = jax.jit(nnx.merge(graph, params))(windows[:, :-1])
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    guess = np.exp(log_softmax(experiment.model.graphs[False], teacher))
    rounded = cage.fake_quant(params, experiment.model.rules)
    student = log_softmax(experiment.model.graphs[True], rounded)
    found = jax.jit(experiment.model.loss, static_argnums=2)(
        params, windows, True, teacher
    )
    # Products and sums in float32.
    np.testing.assert_allclose(found, -(guess * student).sum(-1).mean(), rtol=1e-5)


def distilling(out, **changes):
    values = {"arms": ("ptq", "ste"), "distill": True, "kv_bits": 4, "steps": 10}
    return settings(out, **(values | changes))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return out, train_lm.run(distilling(out), CONSOLE)


def test_students_start_from_the_teacher_and_read_its_text(distilled):
    out, results = distilled
    history = results["ste"].history
    assert history.validation[0] == results["ptq"].loss
    assert not np.isnan(history.losses).any()
    written = np.load(out / "written.npy")
    assert written.shape == (10 * 8, 65) and written.dtype == np.uint8
    experiment = Experiment(distilling(out).resolved())
    names = [segment.name for segment in experiment.segments]
    assert names == ["full", "trunk", "ste"]
    batches = experiment.batches(written)
    first, second = (np.asarray(batches[step]) for step in (0, 1))
    rows = {row.tobytes() for row in written}
    assert {row.tobytes() for row in (*first, *second)} <= rows
    assert first.shape == (8, 65) and not np.array_equal(first, second)
    teacher = results["ptq"].params
    loss = jax.jit(experiment.model.loss, static_argnums=2)(
        teacher, first, True, teacher
    )
    # The same sums in another program.
    np.testing.assert_allclose(history.losses[0], loss, rtol=1e-5)


def test_a_stopped_distillation_goes_on_bit_exactly(distilled, tmp_path, monkeypatch):
    out, expected = distilled
    with monkeypatch.context() as patch:
        disturb(patch, 13, send(signal.SIGINT))  # while the student learns
        with pytest.raises(training.Stopped):
            train_lm.run(distilling(tmp_path), CONSOLE)
    written = (tmp_path / "written.npy").read_bytes()
    assert written == (out / "written.npy").read_bytes()
    # What is written is not written again.
    monkeypatch.setattr(Experiment, "write", None)
    assert_same(train_lm.run(distilling(tmp_path, resume=True), CONSOLE), expected)


def test_text_is_written_whole_or_not_at_all(tmp_path):
    written, stop = [], []

    def write(teacher, part):
        written.append((teacher, part))
        return np.full((32, 65), part, np.uint8)

    experiment = SimpleNamespace(
        written=(80, 65),
        write=write,
        tokens=SimpleNamespace(train=np.zeros(3, np.uint8)),
    )
    progress = SimpleNamespace(add_task=lambda *_, **__: 0, update=lambda *_, **__: 0)
    folder = SimpleNamespace(folder=tmp_path)
    arguments = experiment, "teacher", folder, progress
    with pytest.raises(training.Stopped, match="SIGINT"):
        training._written(*arguments, [signal.SIGINT])
    assert written == [("teacher", 0)]
    assert not list(tmp_path.glob("written*"))
    made = training._written(*arguments, stop)
    np.testing.assert_array_equal(made[:, 0], np.repeat([0, 1, 2], [32, 32, 16]))
    assert [part for _, part in written[1:]] == [0, 1, 2]
    np.testing.assert_array_equal(training._written(*arguments, stop), made)
    assert len(written) == 4
    assert [path.name for path in tmp_path.glob("written*")] == ["written.npy"]


def test_text_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "written.npy"
    np.save(path, np.zeros((3, 65), np.uint8))
    for content in (path.read_bytes(), b"", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*written.npy: .* Remove "):
            training._read_written(path, (80, 65), np.uint8)


def test_the_program_says_that_it_distills(distilled, monkeypatch, capsys):
    out, _ = distilled
    flags = ["--tiny", "--steps", "10", "--strength", "300", "--arms", "ste", "ptq"]
    flags += ["--out", str(out), "--devices", "1", "--resume", "--distill"]
    flags += ["--kv-bits", "4"]
    monkeypatch.setattr("sys.argv", ["train_lm.py", *flags])
    assert train_lm.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "learn its logits, on 80 x 65 bytes that it writes" in printed
    assert "W4A4KV4, distilled, 10 steps" in printed
    assert "compiling" not in printed
    record = json.loads((out / "results.json").read_text())
    assert record["settings"]["distill"] and record["settings"]["kv_bits"] == 4
    monkeypatch.setattr("sys.argv", ["train_lm.py", *flags[:-2]])
    assert train_lm.main() == 2
    assert "kv_bits was 4, is None" in capsys.readouterr().out
