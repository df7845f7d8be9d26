"""The language model's training: its arms, and that it can be stopped."""

import json
import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import outcome
import pytest
import train_lm
import training
from checkpoints import newest
from experiment import USUAL, Experiment, Settings
from lm import LanguageModel
from outcome import Result, summary, verdict
from sizes import SIZES
from small_runs import CONSOLE, assert_same, disturb, send, settings

pytestmark = pytest.mark.usefixtures("as_users_have_it")


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


@pytest.mark.filterwarnings("ignore:the recommended pull")
def test_recommended_cage_parts_from_the_same_trunk_at_half(tmp_path, undisturbed):
    """To the bit until then, though the trunk has the state of a curvature."""
    changes = {"strength": 10.0, "recommended": True}
    found = train_lm.run(settings(tmp_path, arms=("cage",), **changes), CONSOLE)
    ste, pulled = undisturbed["ste"].history, found["cage"].history
    np.testing.assert_array_equal(ste.losses[:11], pulled.losses[:11])
    assert not np.array_equal(ste.losses[11:], pulled.losses[11:])
    experiment = Experiment(settings(tmp_path, steps=2000, **changes).resolved())
    assert experiment.dose() == pytest.approx(0.7, rel=1e-4)
    with pytest.raises(ValueError, match="`--recommended` must come without --str"):
        settings(tmp_path, strength=3.0, recommended=True).resolved()


@pytest.mark.filterwarnings("ignore:the recommended pull")
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
