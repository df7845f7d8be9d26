"""The example on digits: its formulas, its arms, its errors."""

import dataclasses
import json
import math
import sys

import digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def as_users_have_it(standard_promotion):
    """A program adds a bias to a batch, as jax lets users do."""
    with jax.numpy_rank_promotion("allow"):
        yield


# One size for all tests, so that its training is compiled once.
SMALL = digits.Settings(bits=(3,), seeds=2, steps=40)


@pytest.fixture(scope="module")
def results():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return digits.run(SMALL)


def scores(train_loss, test_loss=0.0, accuracy=1.0):
    train_loss = np.asarray(train_loss, np.float64)
    ones = np.ones_like(train_loss)
    return digits.Scores(train_loss, test_loss * ones, accuracy * ones)


def quest_numpy(x, axis, bits, clip, block):
    """QuEST's quantizer in float64 NumPy: rotate, RMS scale, mid-rise grid, rotate."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    matrix /= math.sqrt(block)
    rotation = np.kron(np.eye(x.shape[axis] // block), matrix)
    rotated = np.moveaxis(np.float64(x), axis, -1) @ rotation
    step = 2 * clip * np.sqrt(np.mean(rotated**2, -1, keepdims=True)) / (2**bits - 1)
    step = np.where(step == 0, 1.0, step)
    top = 2 ** (bits - 1) - 0.5
    levels = np.clip(np.round(rotated / step + 0.5) - 0.5, -top, top)
    return np.moveaxis((levels * step) @ rotation, -1, axis)


def test_data_is_standardized_by_the_training_part_and_stratified():
    train, test = digits.load()
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.shape == (len(train.labels), 64)
    spread = np.asarray(train.images).std(0)
    # A pixel that is constant has no spread to divide by.
    np.testing.assert_allclose(spread[spread > 0], 1, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(train.images).mean(0), 0, atol=1e-5)
    shares = [np.bincount(part.labels) / len(part.labels) for part in (train, test)]
    np.testing.assert_allclose(*shares, atol=0.005)


def test_the_loss_is_the_smoothed_cross_entropy_at_quantized_weights_and_inputs(key):
    params = digits.initial_params(key)
    train, _ = digits.load()
    # Labels that the network is sure of: where it is not, smoothing changes nothing.
    guess = digits.logits_of(params, train.images[:50], digits.quantization(None))
    data = digits.Data(train.images[:50], jnp.argmax(guess, -1))
    loss = jax.jit(digits.loss_of, static_argnums=2)
    ours = loss(params, data, digits.quantization(4))

    hidden = np.asarray(data.images)
    for number, layer in enumerate(params):
        hidden = np.maximum(hidden, 0) if number else hidden
        kernel = quest_numpy(layer["kernel"], 0, 4, 2.5139305786, 32)
        hidden = quest_numpy(hidden, 1, 4, 2.5139305786, 32) @ kernel
        hidden = hidden + np.asarray(layer["bias"])
    log = hidden - np.log(np.exp(hidden).sum(-1, keepdims=True))
    targets = 0.9 * np.eye(10)[np.asarray(data.labels)] + 0.01
    # A float32 value next to the middle of two levels may round to the other one: a
    # few of 3200 inputs, each a 50th of one sample's sum.
    np.testing.assert_allclose(ours, -np.mean((targets * log).sum(-1)), rtol=1e-3)


def test_without_bits_nothing_is_quantized(key):
    params = digits.initial_params(key)
    images = digits.load()[0].images[:8]
    ours = digits.logits_of(params, images, digits.quantization(None))
    first, second = params
    hidden = jnp.maximum(images @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_array_equal(ours, expected)


def test_every_arm_is_measured_and_full_precision_is_lowest(results):
    (arms,) = results.values()
    assert list(arms) == list(digits.ARMS)
    for each in arms.values():
        assert all(values.shape == (2,) for values in each)
        assert all(np.isfinite(values).all() for values in each)
        assert (each.train_loss > digits_entropy()).all()
        assert ((each.test_accuracy > 0.3) & (each.test_accuracy <= 1)).all()
    for arm in set(digits.ARMS) - {"full"}:
        assert (arms["full"].train_loss < arms[arm].train_loss).all(), arm


def digits_entropy():
    """What no classifier can go below: the entropy of the smoothed labels."""
    return -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))


def test_without_strength_cage_is_plain_ste_to_the_bit():
    (arms,) = digits.run(dataclasses.replace(SMALL, strength=0.0)).values()
    for ours, plain in zip(arms["cage"], arms["ste"]):
        np.testing.assert_array_equal(ours, plain)


def test_recommended_cage_is_another_and_straight_through_arms_are_the_same(x64):
    # Another program may round otherwise: in float32 to another code before long.
    (published,) = digits.run(SMALL).values()
    (ours,) = digits.run(dataclasses.replace(SMALL, recommended=True)).values()
    for arm in ("ste", "ste0", "averaged"):
        for found, expected in zip(ours[arm], published[arm]):
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=arm)
    assert (ours["cage"].train_loss != ours["ste"].train_loss).all()
    assert (ours["cage"].train_loss != published["cage"].train_loss).all()


def test_the_average_is_that_of_the_last_fifth():
    # One step before the last ten is left out, and of ten steps the last two count.
    train, _ = digits.load()
    settings = digits.Settings(bits=(), seeds=1, steps=10)
    begin = digits.start(settings, len(train.labels))
    once = (jnp.array([0.1]), jnp.array([0.0]))
    last, average = digits.train(settings, None, train, begin, *once)
    shorter = begin._replace(batches=begin.batches[:, :9])
    rate = digits.learning_rate(settings, 0.1)
    before = _plain_adamw(begin.params, shorter.batches[0], train, rate)
    expected = jax.tree.map(lambda a, b: (a[0, 0] + b) / 2, last, before)
    for ours, theirs in zip(jax.tree.leaves(average), jax.tree.leaves(expected)):
        # Two float32 programs of the same nine steps, fused differently.
        np.testing.assert_allclose(ours[0, 0], theirs, rtol=1e-4, atol=1e-5)


def _plain_adamw(params, batches, data, rate):
    """AdamW (0.9, 0.95), decay 0.01, written out."""
    params = jax.tree.map(lambda x: x[0], params)
    first = second = jax.tree.map(jnp.zeros_like, params)
    gradient_of = jax.jit(jax.grad(digits.loss_of), static_argnums=2)
    for number, batch in enumerate(batches, start=1):
        part = digits.Data(data.images[batch], data.labels[batch])
        gradient = gradient_of(params, part, digits.quantization(None))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, gradient)
        lr = rate(number - 1)
        bias = (1 - 0.9**number, 1 - 0.95**number)
        params = jax.tree.map(
            lambda x, m, v, b=bias, lr=lr: (
                x - lr * (m / b[0] / (jnp.sqrt(v / b[1]) + 1e-8) + 0.01 * x)
            ),
            params,
            first,
            second,
        )
    return params


def test_the_comparison_is_paired():
    arms = {
        "full": scores([1.0, 2.0, 3.0]),
        "ste": scores([1.4, 2.4, 3.4], test_loss=2.0, accuracy=0.5),
        "cage": scores([1.3, 2.2, 3.5], test_loss=1.5, accuracy=0.75),
        "averaged": scores([1.3, 2.2, 3.5]),
        "ste0": scores([1.0, 2.0, 3.0]),
    }
    paired = digits.compare(arms)
    differences = [-0.1, -0.2, 0.1]
    error = np.std(differences, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(paired.train_loss, (np.mean(differences), error))
    assert paired.wins == 2
    np.testing.assert_allclose(paired.recovered, (0.2 / 3) / 0.4)
    np.testing.assert_allclose(paired.averaged.mean, 0, atol=1e-12)
    np.testing.assert_allclose(paired.ste0.mean, 1 / 3)
    np.testing.assert_allclose(paired.test_loss, (-0.5, 0))
    np.testing.assert_allclose(paired.test_accuracy, (0.25, 0))


@pytest.mark.parametrize(
    ("ours", "word"),
    [([0.9, 1.9], "beats"), ([1.1, 2.1], "loses to"), ([0.9, 2.1], "does not differ")],
)
def test_the_verdict_says_who_won(ours, word):
    other = scores([1.0, 2.0])
    arms = dict.fromkeys(digits.ARMS, other) | {"cage": scores(ours)}
    assert f"CAGE {word}" in digits.verdict(4, arms)


def test_tiny_is_small():
    settings = digits.Settings(tiny=True).resolved()
    assert (settings.seeds, settings.steps) == (2, 60)
    settings = digits.Settings(tiny=True, steps=500).resolved()
    assert (settings.seeds, settings.steps) == (2, 500)
    settings = digits.Settings().resolved()
    assert (settings.seeds, settings.steps) == (5, 2000)


def test_one_seed_has_no_error_and_no_winner():
    assert f"{digits.estimate(np.array([0.25])):+.2f}" == "+0.25"
    arms = dict.fromkeys(digits.ARMS, scores([1.0]))
    assert "one seed" in digits.verdict(4, arms)


def test_the_dose_is_the_sum_of_rate_times_strength():
    settings = digits.Settings(steps=100)
    count = np.arange(100)
    rate = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * count / 100)) / 2)
    strength = 10 * np.maximum((count + 1) / 100 - 0.8, 0) / 0.2
    dose, warning = digits.dose_of(settings)
    np.testing.assert_allclose(dose, np.sum(rate * strength), rtol=1e-5)  # float32
    assert not warning
    assert "above 3" in digits.dose_of(dataclasses.replace(settings, strength=1e4))[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": ()}, r"`--bits` must be one or more.*got none"),
        ({"bits": (4, 4)}, r"each once; got 4 4"),
        ({"bits": (9,)}, r"`--bits` must be from 1 to 8; got 9"),
        ({"seeds": 0}, r"`--seeds` must be at least 1; got 0"),
        ({"steps": 9}, r"`--steps` must be at least 10.*got 9"),
        ({"strength": -1.0}, r"`--strength` must be finite.*got -1"),
        ({"strength": math.nan}, r"`--strength` must be finite.*got nan"),
        ({"silence": 1.0}, r"`--silence` must be in \[0, 1\).*got 1"),
        ({"floor": 1.5}, r"`--floor` must be in \[0, 1\].*got 1.5"),
    ],
)
def test_bad_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        digits.run(digits.Settings(**change))


def test_the_program_prints_and_writes_all_figures(monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "digits.json"
    arguments = ["--bits", "3", "--seeds", "2", "--steps", "40", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
    assert digits.main() == 0
    written = json.loads(path.read_text())
    assert written["settings"]["seeds"] == 2
    assert set(written["results"]["W3A3"]) == set(digits.ARMS)
    assert len(written["results"]["W3A3"]["cage"]["train_loss"]) == 2
    printed = capsys.readouterr().out
    assert "W3A3" in printed and "CAGE's dose" in printed
    assert "CAGE is the paper's here; --recommended" in printed
    assert "W3A3: CAGE" in printed


def test_a_tiny_run_has_no_winner(monkeypatch, capsys):
    arms = dict.fromkeys(digits.ARMS, scores([1.0, 2.0]))
    monkeypatch.setattr(digits, "run", lambda settings, tell: {4: arms})
    monkeypatch.setattr(sys, "argv", ["digits.py", "--tiny", "--bits", "4"])
    assert digits.main() == 0
    printed = capsys.readouterr().out
    assert "proves nothing" in printed
    assert "W4A4: CAGE" not in printed


def test_the_program_says_what_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--json", str(tmp_path)])
    assert digits.main() == 2
    assert "`--json` must be a file" in capsys.readouterr().out
