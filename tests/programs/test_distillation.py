"""Keys and values of few bits, and students that learn from a teacher."""

import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_lm
import training
from experiment import WRITTEN_AT_ONCE, Experiment
from flax import nnx
from sizes import SIZES
from small_runs import CONSOLE, assert_same, disturb, send, settings

import cage_jax as cage
from cage_jax.llama.model import Llama

pytestmark = pytest.mark.usefixtures("as_users_have_it")


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
