"""Floats on a grid, as in checkpoints of quantization-aware training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_codes

import cage_jax as cage
from cage_jax import export
from cage_jax.core.on_grid import on_grid

# Scales of full range are not found again by their own rule, those of q4_0 are.
FULL = cage.ct_w4a16(axis=-1, group_size=32)
Q4_0 = cage.q4_0(axis=-1)


def on_levels(rng, quantizer, dtype):
    """Draws codes and the floats of a training on their grid, by NumPy."""
    codes = random_codes(rng, quantizer, (16, 96))
    numbers = np.asarray(codes.codes).astype(np.float64)
    if quantizer is Q4_0:
        numbers[:, ::32] = -8  # each group has a value at the end of the range
        codes = dataclasses.replace(codes, codes=jnp.asarray(numbers, jnp.int4))
    scales = np.repeat(np.asarray(codes.scale).astype(np.float64), 32, axis=-1)
    return codes, (numbers * scales).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_floats_on_the_grid_of_the_rule(tmp_path, rng, dtype):
    codes, floats = on_levels(rng, Q4_0, dtype)
    path = tmp_path / "it.safetensors"
    export.save({"a": floats}, path)
    rules = cage.Rules([("a", Q4_0)])
    audit = cage.audit(path, cage.load(path).params, rules)
    assert audit.ok
    (row,) = audit.rows
    found = [len(np.unique(group)) for group in floats.reshape(-1, 32).astype(float)]
    assert row.grid.share == 1 and row.grid.levels == 16
    assert row.grid.values == max(found)
    again = cage.quantize(jnp.asarray(floats), Q4_0)
    np.testing.assert_array_equal(*(np.asarray(x.codes, int) for x in (again, codes)))
    # A few values that a training has moved from their levels, by a third of a step.
    step = np.repeat(np.asarray(codes.scale).astype(float), 32, axis=-1)
    moved = np.array(floats)
    moved[3, 5:12] = (floats.astype(float) + step / 3)[3, 5:12].astype(dtype)
    export.save({"a": moved}, path, overwrite=True)
    audit = cage.audit(path, cage.load(path).params, rules)
    (row,) = audit.rows
    assert row.grid.share == pytest.approx(1 - 7 / floats.size, abs=1e-12)
    assert "99.5% on the grid" in audit.findings[0].text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_scales_that_their_rule_does_not_find_again(rng, dtype):
    codes, floats = on_levels(rng, FULL, dtype)
    measured = on_grid(floats, cage.quantize(jnp.asarray(floats), FULL))
    assert measured.share < 0.5 and measured.recovered == 1
    grid = export.recovered_grid(floats, FULL)
    scale = np.asarray(codes.scale).astype(np.float64)
    # A group without the largest levels is on several grids, of larger steps too.
    ends = np.abs(np.asarray(codes.codes).astype(int)).reshape(16, 3, 32).max(-1) > 4
    half = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(grid.scale)[ends], scale[ends], half)
    again = cage.quantize(jnp.asarray(floats), FULL, grid=grid)
    same = np.asarray(again.codes, int) == np.asarray(codes.codes, int)
    assert same.reshape(16, 3, 32).all(-1)[ends].all()


def test_floats_on_no_grid(rng):
    floats = rng.standard_normal((64, 256)).astype(jnp.bfloat16)
    found = on_grid(floats, cage.quantize(jnp.asarray(floats), FULL))
    assert found.values > 16 and found.recovered < 0.5
    # Off the grid, as many values are near a level as chance says, within 10 %.
    quantizer = cage.int8(axis=-1)
    eights = on_grid(floats, cage.quantize(jnp.asarray(floats), quantizer))
    assert eights.share == pytest.approx(eights.by_chance, rel=0.1)
    assert eights.recovered is None


def test_grids_with_offsets_and_rotations(rng):
    x = rng.standard_normal((8, 64)).astype(np.float32)
    for quantizer in (
        cage.q4_1(axis=-1),
        cage.int4(axis=-1, symmetric=False),
        cage.nf4(axis=-1, group_size=64),
        cage.int4(axis=-1, hadamard=64),
    ):
        floats = cage.dequantize(cage.quantize(jnp.asarray(x), quantizer))
        # Near the offset's opposite a value is small, and the roundings are not.
        floats = floats.astype("float32" if quantizer.hadamard else "bfloat16")
        found = on_grid(floats, cage.quantize(floats, quantizer))
        assert found.share == 1, quantizer
        assert on_grid(x, cage.quantize(jnp.asarray(x), quantizer)).share < 0.3


def test_quantizers_with_more_than_scales_are_refused():
    x = np.ones((32, 4), np.float32)
    for quantizer in (cage.int8(), cage.q4_1(), cage.int4(hadamard=32), cage.nvfp4()):
        with pytest.raises(ValueError, match="have scales alone and at most 32 levels"):
            export.recovered_grid(x, quantizer)
