"""Kernels, interpreted: all quantizers, axes and shapes."""

import jax.numpy as jnp
import numpy as np
import pytest
import test_pallas_gpu
import test_pallas_products
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pallas_tpu import (
    CASES,
    QUANTIZERS,
    SHAPES,
    check,
    check_gradient,
    check_without_a_mask,
)

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_arrays_too")

OTHERS = [
    (name, axis)
    for name in QUANTIZERS
    for axis in (-2, -1)
    if (name, axis) not in [case[:2] for case in CASES]
]


@pytest.mark.parametrize("name, axis", OTHERS)
def test_values_and_masks(name, axis, rng):
    check(name, axis, SHAPES[axis], rng)


def test_bfloat16(rng):
    for name, axis in (("int4 groups", -2), ("int4 groups", -1), ("mxfp4", -2)):
        check(name, axis, (256, 128), rng, jnp.bfloat16)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(
    "name",
    ["int4 channel", "int4 groups", "int4 up", "mxfp4", "mxfp8", "e4m3 scales"]
    + ["nvfp4", "quest"],
)
def test_without_a_mask_the_values_are_the_same(name, axis, rng):
    check_without_a_mask(name, axis, rng)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    rows=st.sampled_from([128, 256, 384]),
    columns=st.sampled_from([128, 256, 640]),
    axis=st.sampled_from([-2, -1]),
    name=st.sampled_from(["quest", "int4 channel", "int4 groups", "mxfp4", "nvfp4"]),
)
def test_shapes(stack, rows, columns, axis, name):
    rng = np.random.default_rng(rows + columns)
    check(name, axis, (*stack, rows, columns), rng)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", ["quest", "quest 64", "int4 groups", "quest groups"])
def test_the_gradient_of_a_mask(name, axis, rng):
    check_gradient(name, axis, rng)


def test_of_many_tokens_scaled_weights_are_rounded(rng):
    test_pallas_products.check_scaled(["int4 groups of 128", "mxfp4"], rng)


# --- for GPU --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, axis, shape",
    [
        ("quest groups", -1, (64, 512)),
        ("int4 groups", -1, (160, 128)),
        ("int4 rotations in a group", -2, (256, 32)),
        ("int4 rotations in a group", -1, (32, 256)),
        ("mxfp8", -2, (64, 64)),
        ("int4 up", -1, (32, 128)),
    ],
)
def test_values_and_masks_for_gpu(name, axis, shape, rng):
    test_pallas_gpu.check(name, axis, shape, rng)


def test_bfloat16_and_stacks_for_gpu(rng):
    test_pallas_gpu.check("mxfp4", -2, (2, 3, 128, 32), rng, jnp.bfloat16)
