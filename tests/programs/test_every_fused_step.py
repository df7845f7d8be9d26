"""The kernel of the fused step, interpreted: what tests/test_fused.py leaves out."""

import jax.numpy as jnp
import pytest
from test_fused import (
    EACH,
    QUANTIZERS,
    check_hundred_steps,
    check_kernel,
    params,  # noqa: F401
)

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_arrays_too")

EVERY = [
    (name, axis, at_updated, measured)
    for name in QUANTIZERS
    for axis in (-2, -1)
    for at_updated in (False, True)
    for measured in (False, True)
    if name in ("channels", "groups") or not (at_updated or measured)
]


@pytest.mark.parametrize(
    ("name", "axis", "at_updated", "measured"),
    [case for case in EVERY if case not in EACH],
)
def test_the_kernel(name, axis, at_updated, measured, rng):
    check_kernel(name, axis, at_updated, measured, rng)


@pytest.mark.parametrize(
    "changes",
    [{"mu_dtype": jnp.bfloat16}, {"statistics": True, "placement": "post_step"}],
    ids=str,
)
def test_a_hundred_steps_are_those_of_the_transformation(params, changes):  # noqa: F811
    check_hundred_steps(params, changes)
