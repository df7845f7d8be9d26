"""The example on Fashion-MNIST: its files, models, arms and errors."""

import gzip
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import fashion_mnist
import images
import jax
import numpy as np
import optax
import pytest
from checkpoints import RunFolder
from fashion_mnist import Experiment, Scores, Settings
from images import Images
from rich.console import Console

CONSOLE = Console(quiet=True)


pytestmark = pytest.mark.usefixtures("as_users_have_it")


def settings(out="unused", **changes):
    values = {"tiny": True, "steps": 10, "seeds": 2, "strength": 300.0}
    return Settings(out=Path(out), **(values | changes)).resolved()


@pytest.fixture(scope="module")
def experiment():
    """One for many tests, so that its programs are traced once."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Experiment(settings())


# --- files ----------------------------------------------------------------------------


def random_part(number, seed=0, side=28, classes=10):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (number, side, side)).astype(np.uint8)
    return Images(pixels, (np.arange(number) % classes).astype(np.uint8))


def idx(array):
    """The bytes of an IDX file."""
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def write(folder, train, test, pack=gzip.compress):
    folder.mkdir(exist_ok=True)
    end = "" if pack is bytes else ".gz"
    for name, part in (("train", train), ("t10k", test)):
        for kind, array in zip(("images-idx3", "labels-idx1"), jax.tree.leaves(part)):
            (folder / f"{name}-{kind}-ubyte{end}").write_bytes(pack(idx(array)))


def test_idx_files_are_read(tmp_path, monkeypatch):
    parts = random_part(7), random_part(5, seed=1)
    for pack in (gzip.compress, bytes):
        write(tmp_path / pack.__name__, *parts, pack=pack)
        for ours, theirs in zip(images.load_images(tmp_path / pack.__name__, 5), parts):
            chex.assert_trees_all_equal(ours, theirs)
    # Without a folder they are those of Debian's package.
    monkeypatch.setattr(images, "FOLDER", tmp_path / "debian")
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        images.load_images(None, 5)
    write(tmp_path / "debian", *parts)
    assert len(images.load_images(None, 5)[0]) == 7


def test_spoiled_files_are_named(tmp_path):
    labels, pixels = "train-labels-idx1", "t10k-images-idx3"
    # Whether the bytes are changed after they are packed; all files have as many images
    # as labels but for the one that is spoiled.
    for number, (name, packed, change, text) in enumerate(
        [
            (pixels, True, lambda b: b[:-50], "must have a whole gzip file in t10k-im"),
            (pixels, True, lambda b: b"no gzip", "must have a whole gzip file"),
            (pixels, True, lambda b: b[:30] + b"spoilt" + b[36:], "a whole gzip file"),
            (pixels, False, lambda b: b"\0\0\r" + b[3:], "have an IDX file of bytes"),
            (pixels, False, lambda b: b"", "must have an IDX file of bytes"),
            (pixels, False, lambda b: b[:-1], r"whole IDX file of shape \(5, 28, 28\)"),
            (pixels, False, lambda b: b[:9], r"whole IDX file of shape"),
            (pixels, False, lambda b: idx(np.zeros((5, 9, 28), np.uint8)), "28 x 28"),
            (pixels, False, lambda b: idx(np.zeros(5, np.uint8)), r"28 x 28.*\(5,\)"),
            (pixels, False, lambda b: idx(np.zeros((4, 28, 28), np.uint8)), "least 5"),
            (
                labels,
                False,
                lambda b: idx(np.zeros(6, np.uint8)),
                "a label for each of",
            ),
            (labels, False, lambda b: idx(np.full(7, 10, np.uint8)), "0 to 9.*got 10"),
        ]
    ):
        folder = tmp_path / str(number)
        write(folder, random_part(7), random_part(4 if "least" in text else 5))
        path = folder / f"{name}-ubyte.gz"
        content = path.read_bytes()
        path.write_bytes(
            change(content)
            if packed
            else gzip.compress(change(gzip.decompress(content)))
        )
        with pytest.raises(ValueError, match=f"`--data` .*{text}"):
            images.load_images(folder, 5)


def test_an_epoch_has_every_image_once_with_its_own_label(experiment):
    train = experiment.train
    one, other = (
        [jax.tree.map(np.asarray, experiment.batches(seed)[i]) for i in range(5)]
        for seed in (0, 1)
    )
    assert {batch.pixels.shape for batch in one} == {(100, 28, 28)}
    pairs = [set() for _ in range(3)]
    for found, batches in zip(pairs, ([train], one, other)):
        for batch in batches:
            found |= {(p.tobytes(), int(c)) for p, c in zip(batch.pixels, batch.labels)}
    assert len(pairs[0]) == len(train) == 500
    assert pairs[0] == pairs[1] == pairs[2]
    assert not np.array_equal(one[0].pixels, other[0].pixels)


def test_random_images_show_their_class():
    train, test = images.random_images(1000, 500)
    means = np.stack([train.pixels[train.labels == c].mean(0) for c in range(10)])
    distance = np.square(test.pixels[:, None] - means).sum((2, 3))
    assert np.mean(distance.argmin(1) == test.labels) > 0.95


# --- models ---------------------------------------------------------------------------


def perturbed(params):
    """No bias is 0 and no norm's scale 1, so that none can be left out."""
    leaves, structure = jax.tree.flatten(params)
    generator = np.random.default_rng(0)
    return structure.unflatten(
        [x + 0.1 * generator.standard_normal(x.shape).astype(x.dtype) for x in leaves]
    )


def rounded(path, x):
    """Two symmetric bits for kernels in blocks, with a scale by output channel."""
    name = jax.tree_util.keystr(path)
    if "blocks" not in name or "kernel" not in name:
        return x
    axes = (0, 1, 2) if x.ndim == 4 else (0, 1) if "'out'" in name else 0
    step = np.abs(np.asarray(x)).max(axes, keepdims=True)
    return np.round(np.asarray(x) / step) * step


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_logits_are_those_at_quantized_weights_and_inputs(model):
    part = images.random_images(6, 1)[0]
    scaled = np.float32((part.pixels / 255 - 0.286) / 0.353)[..., None]
    found, starts = {}, []
    for a_bits in (16, 3, 4):
        experiment = Experiment(settings(model=model, w_bits=2, a_bits=a_bits))
        starts.append(experiment.network.initial(3))
        params = perturbed(starts[-1])
        for row in experiment.report.rows:
            inside = "blocks" in row.path and row.path.endswith("kernel")
            assert (row.quantizer is not None) == inside
            assert (row.inputs is not None) == (inside and a_bits != 16)
            assert row.inputs is None or row.inputs.format.bits == a_bits
        logits = jax.jit(experiment.logits, static_argnums=2)
        found[a_bits] = np.asarray(logits(params, part.pixels, True))
    found["full"] = np.asarray(logits(params, part.pixels, False))
    chex.assert_trees_all_equal(*starts)  # the seed alone decides
    others = jax.tree.leaves(experiment.network.initial(2))
    pairs = zip(jax.tree.leaves(starts[0]), others)
    assert not all(np.array_equal(one, other) for one, other in pairs)
    gradient = jax.jit(jax.grad(experiment.loss), static_argnums=2)
    for leaf in jax.tree.leaves(gradient(params, part, True)):
        assert 0 < np.abs(leaf).max() < np.inf
    plain = jax.jit(experiment.network.plain)
    weights = jax.tree_util.tree_map_with_path(rounded, params)
    for name, expected in (
        (16, plain(weights, scaled)),
        ("full", plain(params, scaled)),
    ):
        # Two float32 programs.
        assert np.abs(found[name] - expected).max() / np.std(expected) < 1e-4, name
    # What is tested makes a difference.
    for one, other in ((16, "full"), (3, "full"), (3, 16), (3, 4)):
        far = np.abs(found[one] - found[other]).max() / np.std(found[one])
        assert far > 0.2, (one, other)


def test_losses_are_means_over_whole_batches_of_the_first_images(experiment):
    params = experiment.network.initial(0)
    part = random_part(250)
    logits_of = jax.jit(experiment.logits, static_argnums=2)
    for most in (250, 199):
        losses, hits = [], []
        for begin in range(0, most // 100 * 100, 100):
            pixels, labels = part.pixels[begin:][:100], part.labels[begin:][:100]
            logits = np.float64(logits_of(params, pixels, True))
            chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            losses += list(-np.log(chances[np.arange(100), labels]))
            hits += list(logits.argmax(-1) == labels)
        ours = experiment.mean_scores(params, part, most, True)
        # Sums of a hundred float32 numbers.
        np.testing.assert_allclose(ours, (np.mean(losses), np.mean(hits)), rtol=1e-5)
    np.testing.assert_allclose(
        experiment.loss(params, Images(pixels, labels), True), np.mean(losses), 1e-5
    )


# --- training -------------------------------------------------------------------------


def test_rates_and_dose():
    count = np.arange(101)
    long = Experiment(settings(steps=100, strength=10.0))
    for floor in (0.1, 0.0):
        cosine = (1 + np.cos(np.pi * (count - 10) / 90)) / 2
        expected = 1e-2 * np.where(count < 10, count / 10, floor + (1 - floor) * cosine)
        ours = [long.learning_rate(floor)(number) for number in count]
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)  # float32
    rate = 1e-2 * (0.1 + 0.9 * cosine)[80:100]
    strength = 10 * (count[80:100] + 1 - 80) / 20
    dose, warning = long.dose()
    np.testing.assert_allclose(dose, np.sum(rate * strength), rtol=1e-4)
    assert not warning
    strong = Experiment(settings(steps=100, strength=1e4))
    assert "above 3" in strong.dose()[1]


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory):
    with (
        RunFolder(tmp_path_factory.mktemp("run"), {}, resume=False) as folder,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return fashion_mnist.train(experiment, folder, CONSOLE)


def test_arms_share_the_trunk_and_part_where_cage_pulls(undisturbed):
    assert list(undisturbed.arms) == list(fashion_mnist.ARMS)
    for scores in undisturbed.arms.values():
        assert all(values.shape == (2,) for values in scores)
        assert all(np.isfinite(values).all() for values in scores)
        assert not np.array_equal(*scores.train_loss)  # seeds differ
    (ste, near), (pulled, nearer) = (
        undisturbed.curves[name] for name in ("ste", "cage")
    )
    assert np.isfinite([ste, near, pulled, nearer]).all()
    np.testing.assert_array_equal(ste[:, :9], pulled[:, :9])
    assert (near[:, 9:] > nearer[:, 9:]).all()
    # The first point of all is that of the initial weights.
    for name in ("full", "ste0"):
        np.testing.assert_array_equal(undisturbed.curves[name][1][:, 0], near[:, 0])
    # After training, PTQ is full precision rounded, which is not STE.
    arms = undisturbed.arms
    for one, other in (("full", "ptq"), ("ptq", "ste"), ("ste", "averaged")):
        assert (arms[one].train_loss != arms[other].train_loss).all()
    assert (arms["ste"].train_loss != arms["ste0"].train_loss).all()


def test_a_run_that_crashed_goes_on_bit_exactly(
    experiment, undisturbed, tmp_path, monkeypatch
):
    """In the third step in which CAGE pulls, after the second one was saved."""
    original, steps = experiment.step, []

    def failing(segment, state, batch, step):
        steps.append(step)
        if len(steps) == 10 + 8 + 2 + 2:
            raise RuntimeError("the machine fails")
        if len(steps) == 10 + 8 + 2 + 1:
            monkeypatch.setattr(fashion_mnist, "SAVE_SECONDS", -1)
        return original(segment, state, batch, step)

    with (
        monkeypatch.context() as patch,
        RunFolder(tmp_path, {}, resume=False) as folder,
    ):
        patch.setattr(experiment, "settings", settings(seeds=1))
        patch.setattr(experiment, "step", failing)
        with pytest.raises(RuntimeError):
            fashion_mnist.train(experiment, folder, CONSOLE)
    monkeypatch.undo()
    steps.clear()

    def counting(segment, state, batch, step):
        steps.append((segment.name, step))
        return original(segment, state, batch, step)

    monkeypatch.setattr(experiment, "step", counting)
    # And with a seed more.
    with RunFolder(tmp_path, {}, resume=True) as folder:
        resumed = fashion_mnist.train(experiment, folder, CONSOLE)
    assert steps[:2] == [("cage", 9), ("ste0", 0)]
    assert len(steps) == 1 + 10 + (10 + 8 + 2 + 2 + 10)
    chex.assert_trees_all_equal(resumed, undisturbed)


def test_full_precision_is_adamw_and_the_average_that_of_the_last_fifth(experiment):
    segment = experiment.segments()[0]
    assert (segment.name, segment.quantized, segment.floor) == ("full", False, 0.1)
    state = experiment.first_state(0)
    params = experiment.network.initial(0)
    rate = experiment.learning_rate(0.1)
    tx = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01)
    ours, theirs = tx.init(params), []

    @jax.jit
    def step(params, ours, batch):
        gradients = jax.grad(experiment.loss)(params, batch, False)
        updates, ours = tx.update(gradients, ours, params)
        return optax.apply_updates(params, updates), ours

    for number, batch in zip(range(10), experiment.batches(0).start(0)):
        state = experiment.step(segment, state, batch, number)
        params, ours = step(params, ours, batch)
        theirs.append(jax.tree.map(np.asarray, params))
    # Two float32 programs of the same ten steps, fused differently.
    chex.assert_trees_all_close(state.params, theirs[-1], rtol=1e-3, atol=1e-5)
    expected = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *theirs[-2:])
    chex.assert_trees_all_close(state.average, expected, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, theirs[-1])
    assert max(jax.tree.leaves(moved)) > 1e-4  # the tolerance tells them apart


def test_a_loss_that_is_no_number_ends_the_run():
    bad = fashion_mnist.State(*[None] * 3, np.float32(np.nan), None, None)
    experiment = SimpleNamespace(
        settings=settings(),
        evaluations=10,
        batches=lambda seed: SimpleNamespace(start=itertools.repeat),
        first_state=lambda seed: bad,
        evaluated=lambda state, *_: state,
        step=lambda segment, state, *_: state,
    )
    progress = SimpleNamespace(
        update=lambda *_, **__: None, console=SimpleNamespace(is_terminal=True)
    )
    segment = fashion_mnist.Segment("full", 0, 10, False, 0.1, 0.0)
    checkpoints = SimpleNamespace(latest_step=lambda: None)
    with pytest.raises(ValueError, match=r"the loss of full is nan at step 10\..*bits"):
        fashion_mnist._train_segment(
            experiment, 0, segment, {}, checkpoints, progress, 0
        )


# --- what came of it ------------------------------------------------------------------


def scores(train_loss, test_loss=0.0):
    train_loss = np.asarray(train_loss, np.float64)
    ones = np.ones_like(train_loss)
    return Scores(train_loss, test_loss * ones, 0.5 * ones)


def printed(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in capture.get().splitlines()
        if line.startswith("│")
    ]


def test_the_comparison_is_paired_by_seed():
    arms = {
        "full": scores([1.0, 2.0, 3.0]),
        "ste": scores([1.4, 2.4, 3.4], test_loss=2.0),
        "cage": scores([1.3, 2.2, 3.5], test_loss=1.5),
    }
    rows = printed(fashion_mnist.comparison_table(arms))
    error = np.std([-0.1, -0.2, 0.1], ddof=1) / math.sqrt(3)
    assert [row[0] for row in rows] == [fashion_mnist.ARMS[a] for a in ("full", "ste")]
    assert rows[1][1:] == [f"-0.0667 ± {error:.4f}", "2 of 3", "-0.5000 ± 0.0000"]
    rows = printed(fashion_mnist.arms_table(settings(), arms))
    assert rows[2] == [
        "CAGE",
        f"2.3333 ± {np.std([1.3, 2.2, 3.5], ddof=1) / math.sqrt(3):.4f}",
        "1.5000 ± 0.0000",
        "50.0% ± 0.0%",
    ]


def test_the_verdict_says_who_won():
    for ours, text in (
        ([0.9, 1.9], r"CAGE beats plain STE \(-0.1000.*it recovers 20%"),
        ([1.1, 2.1], "CAGE loses to plain STE .*it recovers -20%"),
        ([0.9, 2.1], "CAGE does not differ beyond noise from plain STE"),
        ([0.9], r"CAGE has one seed, no more than a hint, .* \(-0.1000\)"),
    ):
        number = len(ours)
        other = scores([1.0, 2.0][:number])
        arms = dict.fromkeys(fashion_mnist.ARMS, other) | {"cage": scores(ours)}
        arms["full"] = scores([0.5, 1.5][:number])
        assert re.search(text, fashion_mnist.verdict(settings(), arms))
        arms["full"] = scores([1.5, 2.5][:number])
        assert "no gap to close" in fashion_mnist.verdict(settings(), arms)


def test_bad_settings_are_refused(tmp_path):
    for changes, text in (
        ({"w_bits": 1}, "`--w-bits` must be from 2 to 8; got 1"),
        ({"a_bits": 9}, "`--a-bits` must be from 2 to 8, or 16 for none; got 9"),
        ({"seeds": 0}, "`--seeds` must be at least 1; got 0"),
        ({"steps": 9}, "`--steps` must be at least 10"),
        ({"strength": -1.0}, "`--strength` must be finite"),
        ({"silence": 1.0}, "`--silence` must be in"),
        ({"floor": 1.5}, "`--floor` must be in"),
    ):
        with pytest.raises(ValueError, match=text):
            fashion_mnist.run(Settings(out=tmp_path / "new", **changes), CONSOLE)
        assert not (tmp_path / "new").exists()


def test_sizes():
    chosen = Settings().resolved()
    assert (chosen.seeds, chosen.steps) == (3, 1500)
    assert chosen.out == Path("runs/resnet-w4a4")
    chosen = Settings(tiny=True, model="vit", w_bits=2).resolved()
    assert chosen.label == "ViT W2A4"
    assert (chosen.seeds, chosen.steps) == (2, 20)
    assert chosen.out == Path("runs/vit-w2a4-tiny")
    for model, size in (("resnet", 78_000), ("vit", 72_000)):
        experiment = Experiment(Settings(model=model, tiny=True).resolved())
        large = fashion_mnist.network(Settings(model=model), experiment.rules)
        shapes = jax.eval_shape(lambda large=large: large.initial(0))
        assert abs(sum(x.size for x in jax.tree.leaves(shapes)) - size) < 500


def test_the_program_from_start_to_end(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", random_part(150), random_part(120, seed=1))
    out = tmp_path / "run"
    # The model and steps of the other tests, whose programs are compiled already.
    flags = "--tiny --seeds 1 --steps 10 --strength 300"
    flags = [*flags.split(), "--data", str(tmp_path / "data"), "--out", str(out)]

    def main(*more):
        monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", *flags, *more])
        status = fashion_mnist.main()
        return status, " ".join(capsys.readouterr().out.split())

    status, text = main()
    assert status == 0
    assert "ResNet W4A4" in text and "CAGE's dose" in text
    assert "150 images to train on, 1 seed," in text
    assert "proves nothing" in text and "CAGE beats" not in text
    record = json.loads((out / "results.json").read_text())
    assert set(record["results"]) == set(fashion_mnist.ARMS)
    assert len(record["results"]["cage"]["train_loss"]) == 1
    assert record["settings"]["steps"] == 10
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    status, text = main()
    assert status == 2 and "Add --resume to go on with it" in text
    status, text = main("--resume", "--floor", "0.2")
    assert status == 2 and "floor was 0.1, is 0.2" in text
    write(tmp_path / "data", random_part(150, seed=2), random_part(120, seed=1))
    status, text = main("--resume")
    assert status == 2 and "`--resume` must have the settings" in text
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
    status, text = main("--resume")
    assert status == 2 and "without t10k-labels-idx1-ubyte.gz" in text
    assert json.loads((out / "results.json").read_text()) == record


def test_a_long_run_has_a_verdict_and_resuming_nothing_is_said(
    tmp_path, monkeypatch, capsys, undisturbed
):
    monkeypatch.setattr(fashion_mnist, "train", lambda *_: undisturbed)
    monkeypatch.setattr(fashion_mnist, "plot", lambda *_: None)
    parts = random_part(100), random_part(100)
    monkeypatch.setattr(fashion_mnist, "load_images", lambda *_: parts)
    flags = ["--resume", "--strength", "1e4", "--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", *flags])
    assert fashion_mnist.main() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--resume finds no run in" in text
    assert "minutes on two cores" in text and "Note: " in text
    assert "ResNet W4A4, train loss: CAGE" in text and "proves nothing" not in text
