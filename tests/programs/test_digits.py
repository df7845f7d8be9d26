"""The example on digits: its formulas, its arms, its errors."""

import dataclasses
import json
import math
import sys

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import program
import pytest

pytestmark = pytest.mark.usefixtures("as_users_have_it")


# One size for all tests, so that its training is compiled once.
SMALL = digits.Settings(bits=(3,), seeds=2, steps=40)


def scores(train_loss, test_loss=0.0, accuracy=1.0):
    train_loss = np.asarray(train_loss, np.float64)
    ones = np.ones_like(train_loss)
    return digits.Scores(train_loss, test_loss * ones, accuracy * ones)


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["digits.py", *map(str, flags)])
    return digits.main()


def quest_numpy(x, axis, bits, clip, block):
    """QuEST's quantizer in float64 NumPy: rotate, RMS scale, mid-rise grid, rotate."""
    rotated = np.moveaxis(oracles.rotate(x, block, axis), axis, -1)
    step = 2 * clip * np.sqrt(np.mean(rotated**2, -1, keepdims=True)) / (2**bits - 1)
    step = np.where(step == 0, 1.0, step)
    top = 2 ** (bits - 1) - 0.5
    levels = np.clip(np.round(rotated / step + 0.5) - 0.5, -top, top)
    return oracles.rotate(np.moveaxis(levels * step, -1, axis), block, axis)


def logits_numpy(params, hidden, quantize):
    for number, layer in enumerate(params):
        hidden = np.maximum(hidden, 0) if number else np.float64(hidden)
        kernel = quantize(np.float64(layer["kernel"]), 0)
        hidden = quantize(hidden, 1) @ kernel + np.float64(layer["bias"])
    return hidden


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
    images = np.asarray(digits.load()[0].images)[:50]
    logits_of = jax.jit(digits.logits_of, static_argnums=2)
    guess = logits_of(params, images, digits.quantization(None))
    expected = logits_numpy(params, images, lambda x, axis: x)
    np.testing.assert_allclose(guess, expected, rtol=1e-5, atol=1e-5)  # float32
    # Labels that the network is sure of: where it is not, smoothing changes nothing.
    labels = np.argmax(guess, -1).astype(np.int32)
    loss = jax.jit(digits.loss_of, static_argnums=2)
    ours = loss(params, digits.Data(images, labels), digits.quantization(4))
    logits = logits_numpy(
        params, images, lambda x, axis: quest_numpy(x, axis, 4, 2.5139305786, 32)
    )
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = 0.9 * np.eye(10)[labels] + 0.01
    # A float32 value next to the middle of two levels may round to the other one: a
    # few of 3200 inputs, each a 50th of one sample's sum.
    np.testing.assert_allclose(ours, -np.mean((targets * log).sum(-1)), rtol=1e-3)


def test_the_program_measures_prints_and_writes_every_arm(
    monkeypatch, tmp_path, capsys
):
    path = tmp_path / "new" / "digits.json"
    flags = "--bits", 3, "--seeds", 2, "--steps", 40, "--json", path
    assert main(monkeypatch, *flags) == 0
    written = json.loads(path.read_text())
    assert written["settings"]["seeds"] == 2
    arms = {
        arm: {name: np.array(values) for name, values in each.items()}
        for arm, each in written["results"]["W3A3"].items()
    }
    assert list(arms) == list(digits.ARMS)
    # Nothing goes below the entropy of the smoothed labels.
    entropy = -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))
    for arm, each in arms.items():
        assert all(values.shape == (2,) for values in each.values())
        assert all(np.isfinite(values).all() for values in each.values())
        assert (each["train_loss"] > entropy).all()
        assert ((each["test_accuracy"] > 0.3) & (each["test_accuracy"] <= 1)).all()
        below = arms["full"]["train_loss"] < each["train_loss"]
        assert below.all() == (arm != "full"), arm
    printed = capsys.readouterr().out
    assert "W3A3" in printed and "CAGE's dose" in printed
    assert "CAGE is the paper's here; --recommended" in printed
    assert "W3A3: CAGE" in printed
    assert f"{arms['cage']['train_loss'].mean():.4f} ±" in printed


def test_without_strength_cage_is_plain_ste_to_the_bit():
    (arms,) = digits.run(dataclasses.replace(SMALL, strength=0.0)).values()
    for ours, plain in zip(arms["cage"], arms["ste"]):
        np.testing.assert_array_equal(ours, plain)


def trained(settings, bits):
    """Last and average parameters of STE, STE with the rate to 0, and CAGE."""
    data, _ = digits.load()
    begin = digits.start(settings, len(data.labels))
    arms = jnp.array([0.1, 0.0, 0.1]), jnp.array([0.0, 0.0, 1.0])
    ends = digits.train(settings, bits, data, begin, *arms)
    return begin, data, jax.tree.map(np.asarray, ends)


def test_recommended_cage_is_another_and_straight_through_arms_are_the_same(x64):
    # Another program may round otherwise: in float32 to another code before long.
    settings = digits.Settings(bits=(), seeds=1, steps=20)
    silence = program.RECOMMENDED_SILENCE
    changed = dataclasses.replace(settings, recommended=True, silence=silence)
    ours, published = (jax.tree.leaves(trained(s, 3)[2]) for s in (changed, settings))
    for found, expected in zip(ours, published):
        np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-9, atol=1e-12)
        assert not np.array_equal(found[2], found[0])
        assert not np.array_equal(found[2], expected[2])


def test_full_precision_is_adamw_and_the_average_that_of_the_last_fifth():
    settings = digits.Settings(bits=(), seeds=1, steps=10)
    begin, data, (last, average) = trained(settings, None)
    rate = digits.learning_rate(settings, 0.1)
    tx = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01)

    @jax.jit
    def iterates(params, batches):
        def step(carry, batch):
            params, state = carry
            part = digits.Data(data.images[batch], data.labels[batch])
            how = digits.quantization(None)
            gradient = jax.grad(digits.loss_of)(params, part, how)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    found = iterates(jax.tree.map(lambda x: x[0], begin.params), begin.batches[0])
    for kind, count in ((last, 1), (average, 2)):
        expected = jax.tree.map(lambda x, n=count: np.asarray(x)[-n:].mean(0), found)
        for ours, theirs in zip(jax.tree.leaves(kind), jax.tree.leaves(expected)):
            # Two float32 programs of the same ten steps, fused differently.
            np.testing.assert_allclose(ours[0, 0], theirs, rtol=1e-4, atol=1e-5)


def test_the_comparison_is_paired_and_the_verdict_says_who_won():
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
    for ours, word in (
        ([0.9, 1.9], "beats"),
        ([1.1, 2.1], "loses to"),
        ([0.9, 2.1], "does not differ"),
    ):
        other = dict.fromkeys(digits.ARMS, scores([1.0, 2.0]))
        assert f"CAGE {word}" in digits.verdict(4, other | {"cage": scores(ours)})
    # One seed has no error and no winner.
    assert f"{digits.estimate(np.array([0.25])):+.2f}" == "+0.25"
    assert "one seed" in digits.verdict(4, dict.fromkeys(digits.ARMS, scores([1.0])))


def test_a_tiny_run_is_small_and_has_no_winner(monkeypatch, capsys):
    for changes, expected in (
        ({"tiny": True}, (2, 60)),
        ({"tiny": True, "steps": 500}, (2, 500)),
        ({}, (5, 2000)),
    ):
        settings = digits.Settings(**changes).resolved()
        assert (settings.seeds, settings.steps) == expected
    arms = dict.fromkeys(digits.ARMS, scores([1.0, 2.0]))
    monkeypatch.setattr(digits, "run", lambda settings, tell: {4: arms})
    assert main(monkeypatch, "--tiny", "--bits", 4) == 0
    printed = capsys.readouterr().out
    assert "proves nothing" in printed and "W4A4: CAGE" not in printed


def test_the_dose_is_the_sum_of_rate_times_strength():
    settings = digits.Settings(steps=100)
    count = np.arange(100)
    rate = 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * count / 100)) / 2)
    strength = 10 * np.maximum((count + 1) / 100 - 0.8, 0) / 0.2
    dose, warning = digits.dose_of(settings)
    np.testing.assert_allclose(dose, np.sum(rate * strength), rtol=1e-5)  # float32
    assert not warning
    assert "above 3" in digits.dose_of(dataclasses.replace(settings, strength=1e4))[1]


def test_bad_settings_are_refused(monkeypatch, tmp_path, capsys):
    for change, text in (
        ({"bits": ()}, r"`--bits` must be one or more.*got none"),
        ({"bits": (4, 4)}, r"each once; got 4 4"),
        ({"bits": (9,)}, r"`--bits` must be from 1 to 8; got 9"),
        ({"seeds": 0}, r"`--seeds` must be at least 1; got 0"),
        ({"steps": 9}, r"`--steps` must be at least 10.*got 9"),
        ({"strength": -1.0}, r"`--strength` must be finite.*got -1"),
        ({"strength": math.nan}, r"`--strength` must be finite.*got nan"),
        ({"silence": 1.0}, r"`--silence` must be in \[0, 1\).*got 1"),
        ({"floor": 1.5}, r"`--floor` must be in \[0, 1\].*got 1.5"),
    ):
        with pytest.raises(ValueError, match=text):
            digits.run(digits.Settings(**change))
    assert main(monkeypatch, "--json", tmp_path) == 2
    assert "`--json` must be a file" in capsys.readouterr().out
