"""Prune Once for All: the schedule, the mask, and zeros that stay zeros."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import train
from contrib_cases import FLOAT64, ROTATED, RULES, arrays, drawn

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.scales import AbsMax, MinMax

train = functools.partial(train, jit=True)


@pytest.fixture
def tree(rng):
    """Draws parameters or gradients, in NumPy."""
    return functools.partial(drawn, rng)


def test_sparsity_is_a_cubic(x64):
    sparsity = jax.jit(contrib.cubic_sparsity(8, 0.7))
    for count in range(12):
        want = 0.7 * (1 - (1 - min(count / 8, 1)) ** 3)
        np.testing.assert_allclose(sparsity(count), want, rtol=1e-12)


def test_the_smallest_are_pruned_and_stay(x64, tree):
    params, gradients = tree(), [tree() for _ in range(9)]
    sparsity = contrib.cubic_sparsity(8, 0.8)
    pruning = contrib.gradual_pruning(RULES, sparsity, every=3)
    got, _ = train(optax.chain(optax.sgd(0.1), pruning), params, gradients)
    x, zeros = params["kernel"], np.zeros((8, 3), bool)
    for t, (gradient, reached) in enumerate(zip(gradients, got)):
        x = np.where(zeros, 0, x - 0.1 * gradient["kernel"])
        if t % 3 == 0:
            number = round(0.8 * (1 - (1 - min(t / 8, 1)) ** 3) * x.size)
            zeros = np.zeros(x.size, bool)
            zeros[np.argsort(np.abs(x).ravel())[:number]] = True
            zeros = zeros.reshape(x.shape)
            x = np.where(zeros, 0, x)
        chex.assert_trees_all_close(reached["kernel"], x, **FLOAT64)
    assert 0.7 < zeros.mean() < 0.8
    bias = params["bias"] - 0.1 * sum(g["bias"] for g in gradients)
    chex.assert_trees_all_close(got[-1]["bias"], bias, **FLOAT64)


def test_all_and_none_are_pruned(tree):
    params, zeros = arrays(tree(np.float32)), jax.tree.map(np.zeros_like, tree())
    for share in (0.0, 1.0):
        tx = contrib.gradual_pruning(RULES, share)
        updates, _ = tx.update(arrays(zeros), tx.init(params), params)
        reached = optax.apply_updates(params, updates)["kernel"]
        assert np.mean(np.asarray(reached) == 0) == share


def sparse(tree):
    """Parameters and the place of their zeros."""
    params = tree(np.float32)
    zeros = np.abs(params["kernel"]) < 0.7
    assert 0.3 < zeros.mean() < 0.7
    params["kernel"][zeros] = 0
    return arrays(params), zeros


MOMENTUM = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {
    "decay": optax.chain(optax.add_decayed_weights(0.1), MOMENTUM),
    "coupled": optax.chain(cage.coupled(RULES, strength=1.0), MOMENTUM),
    "adamw": cage.cage_adamw(0.1, RULES, strength=1.0),
    "post_step": cage.post_step(MOMENTUM, RULES, strength=1.0, learning_rate=0.1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_zeros_stay_zeros_in_weights_averages_and_codes(name, tree, standard_promotion):
    params, zeros = sparse(tree)
    locked = contrib.locked_zeros(RULES)
    tx = optax.chain(OPTIMIZERS[name], locked, contrib.averaging(0.9))
    gradients = [tree(np.float32) for _ in range(3)]
    trajectory, states = train(tx, params, gradients)
    free, _ = train(OPTIMIZERS[name], params, gradients)
    average = contrib.averaged(states[-1])
    values = cage.dequantize(cage.quantize(trajectory[-1], RULES))
    for each in (*trajectory, average, values):
        assert (np.asarray(each["kernel"])[zeros] == 0).all()
    assert (np.asarray(trajectory[-1]["kernel"])[~zeros] != 0).all()
    assert (np.asarray(free[-1]["kernel"])[zeros] != 0).any()
    # What is not locked moves as it would; the scale that CAGE finds may differ.
    if name == "decay":
        for one, other in zip(trajectory, free):
            chex.assert_trees_all_equal(one["bias"], other["bias"])
            chex.assert_trees_all_close(
                one["kernel"][~zeros], other["kernel"][~zeros], rtol=1e-6
            )


def test_grids_with_and_without_a_zero():
    params = {"kernel": jnp.ones((8, 4))}
    affine = cage.Quantizer(Integer(4, narrow=False), MinMax())
    for quantizer in ("int8", "fp8", "nf4", "ternary", "q4_0", affine):
        rules = cage.Rules([("kernel", quantizer)])
        if quantizer == "q4_0":  # in groups of 32
            rules = cage.Rules([("kernel", cage.int4(narrow=False))])
        if quantizer == "nf4":
            rules = cage.Rules([("kernel", cage.nf4(group_size=8))])
        contrib.locked_zeros(rules).init(params)
    without = (
        cage.binary(),
        cage.quest(4, hadamard=None),
        ROTATED,
        cage.Quantizer(
            Integer(4, narrow=False, signed=False), MinMax(zero_point=False)
        ),
        cage.Quantizer(Float("e2m1"), AbsMax(), hadamard=8),
    )
    text = "^`kernel`: `rules` must quantize locked zeros on a grid that has a zero"
    for quantizer in without:
        with pytest.raises(ValueError, match=text):
            contrib.locked_zeros(cage.Rules([("kernel", quantizer)])).init(params)
