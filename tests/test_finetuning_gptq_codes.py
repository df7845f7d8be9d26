"""GPTQ: codes against the formula in float64, and a training that starts from them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import (
    FORMULAS,
    INPUTS,
    INT4,
    OUTPUTS,
    QUANTIZERS,
    W,
    by_the_formula,
    correlated,
    multiply,
    run,
)
from scipy.linalg import hadamard

import cage_jax as cage
from cage_jax.finetuning.gptq.columns import Grids, round_columns


@pytest.mark.parametrize("name", FORMULAS)
def test_codes_are_those_of_the_formula(name):
    quantizer, rule, levels, group = FORMULAS[name]
    x = correlated(1)
    found = run(multiply, quantizer, {"w": W}, (x[:48],), (x[48:],))["w"]
    w = W
    if quantizer.hadamard:
        rotation = np.kron(np.eye(INPUTS // 8), hadamard(8) / np.sqrt(8))
        w, x = rotation @ W, x @ rotation
    expected, positions = by_the_formula(w, x, rule, levels, group)
    codes = np.asarray(quantizer.format.decode(found.codes, jnp.float32), np.float64)
    wrong = ~np.isclose(codes, expected, atol=1e-6)
    # A tie may go the other way in float32, and all after it then differs.
    for column in np.flatnonzero(wrong.any(0)):
        first = wrong[:, column].argmax()
        middles = (levels[1:] + levels[:-1]) / 2
        assert np.abs(middles - positions[first, column]).min() < 1e-3
    assert wrong.any(0).sum() <= 1


@pytest.mark.parametrize("name", QUANTIZERS)
def test_training_starts_on_the_grid(name):
    quantizer, x = QUANTIZERS[name], correlated(1)
    assert quantizer.idempotent
    w = W[::-1]  # the largest number is given errors of many inputs
    rules, params = cage.Rules([("w", quantizer)]), {"w": w}
    if name == "learned":
        params = cage.with_grids(params, rules)
    codes = run(multiply, quantizer, params, (x,))
    start = cage.dequantize(codes)
    again = cage.fake_quant(start, rules)
    start, again, plain = (
        np.asarray(tree.get("params", tree)["w"], np.float64)
        for tree in (start, again, cage.fake_quant(params, rules))
    )
    # A rotation sums; without it nothing is left to rounding.
    tolerance = 1e-6 if quantizer.hadamard else 0
    np.testing.assert_allclose(again, start, rtol=0, atol=tolerance)
    errors = [np.linalg.norm(x @ (each - w)) for each in (start, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_grids_that_other_groups_depend_on_are_kept():
    kept, forced = np.zeros((1, 2, OUTPUTS)), np.full((1, *W.shape), np.nan)
    kept[0, 1, 3], forced[0, 20] = 448, -4
    kept, forced = (jnp.asarray(x, jnp.float32) for x in (kept, forced))
    x = correlated(1)
    cell = dataclasses.replace(
        cage.nvfp4(), axis=0, group_size=None, scale_type=cage.scale_types.Float8(False)
    )
    known = Grids(cage.scales.Grid(kept), None, forced)
    values, _, grid = round_columns(
        W[None] * 400, (x.T @ x)[None], known, 0.01, quantizer=cell, group=16
    )
    assert (values[0, 20, 3], grid.scale[0, 1, 3]) == (-4, 448)
    # The numbers of other groups count for nothing.
    assert (values[0, 20] == -4).sum() < OUTPUTS
    assert (grid.scale != 448).sum() > OUTPUTS


@pytest.mark.parametrize(
    "quantizer", [cage.ternary(), cage.quest(4, hadamard=8)], ids=str
)
def test_scales_that_are_not_found_again_stay(quantizer):
    found = run(multiply, quantizer, {"w": W}, (correlated(1),))["w"]
    plain = cage.quantize(W, quantizer)  # of whole channels, so before any error
    assert not quantizer.idempotent
    np.testing.assert_array_equal(found.scale, plain.scale)


def test_learned_scales_start_from_those_of_codes():
    codes = run(multiply, INT4, {"w": W, "bias": W[0]}, (correlated(1),), pattern="w")
    rules = cage.Rules([("w", cage.lsq(4, axis=-2, group_size=8, narrow=True))])
    variables = cage.with_grids(codes, rules)
    start = cage.dequantize(codes)
    np.testing.assert_array_equal(variables["params"]["w"], start["w"])
    np.testing.assert_array_equal(variables["params"]["bias"], W[0])
    again = cage.fake_quant(variables, rules)["params"]["w"]
    np.testing.assert_array_equal(again, start["w"])
    for wrong in (cage.lsq(3, axis=-2, group_size=8), cage.lsq(4, narrow=True)):
        with pytest.raises(ValueError, match=r"`w`: `(params|grid)` must have"):
            cage.with_grids(codes, cage.Rules([("w", wrong)]))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_training_may_start_beside_the_grid(name):
    quantizer, x, rules = (
        QUANTIZERS[name],
        correlated(1),
        cage.Rules([("w", QUANTIZERS[name])]),
    )
    params = {"w": W, "bias": W[0]}
    if name == "learned":
        params = cage.with_grids(params, rules)
    codes = run(multiply, quantizer, params, (x,), pattern="w")
    start = run(multiply, quantizer, params, (x,), pattern="w", rounded=False)
    start, rounded, values = (
        tree.get("params", tree)
        for tree in (start, cage.fake_quant(start, rules), cage.dequantize(codes))
    )
    np.testing.assert_array_equal(start["bias"], W[0])
    if quantizer.hadamard is None:
        np.testing.assert_array_equal(rounded["w"], values["w"])
    else:  # which may round the other way beside a tie
        assert np.mean(np.isclose(rounded["w"], values["w"], atol=1e-5)) > 0.98
    assert np.mean(start["w"] == values["w"]) < 0.5
    # They are what the formula rounds: nearer than half a step, but for the last ones.
    assert np.abs(start["w"] - W).max() < np.abs(W).max()


def test_a_start_whose_scales_would_be_others_is_on_the_grid():
    quantizer = cage.ternary()
    start = run(multiply, quantizer, {"w": W}, (correlated(1),), rounded=False)
    codes = run(multiply, quantizer, {"w": W}, (correlated(1),))
    np.testing.assert_array_equal(start["w"], cage.dequantize(codes)["w"])
