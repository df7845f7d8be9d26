"""Sharded parameters: all quantizers, placements, kinds of mesh and options."""

import pytest
from test_kernels_on_shards import CUT_SHARDS, check_kernels_on_shards
from test_sharding import (
    AUTO,
    EXPLICIT,
    QUANTIZERS,
    SENDS,
    SPECS,
    check_inside_shard_map,
    check_training,
    check_values_and_codes,
    check_what_a_step_sends,
)

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")
each_mesh = pytest.mark.parametrize("kind", [EXPLICIT, AUTO], ids=str)


@each_mesh
@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_and_codes_are_those_of_the_whole(name, kind, rng):
    check_values_and_codes({name: list(SPECS)}, kind, rng)


@pytest.mark.parametrize(
    ("name", "placed", "kind"),
    [
        ("group", "both", EXPLICIT),
        ("channel", "both", EXPLICIT),
        ("asymmetric", "both", EXPLICIT),
        ("hadamard", "both", EXPLICIT),
        ("channel", "rows", EXPLICIT),
        ("group", "columns", EXPLICIT),
        ("group", "both", AUTO),
        ("channel", "rows", AUTO),
        ("hadamard", "stacked", EXPLICIT),
        ("channel", "layers", AUTO),
    ],
    ids=str,
)
def test_training_is_that_of_the_whole(name, placed, kind, rng):
    check_training({name: placed}, kind, rng)


@pytest.mark.parametrize("more, kind", [(False, EXPLICIT), (True, AUTO)])
def test_inside_shard_map(more, kind, rng):
    check_inside_shard_map(more, kind, rng)


@pytest.mark.parametrize(
    "name, options, kind",
    [
        (name, options, kind)
        for name, options in (
            ("group", ""),
            ("group", "frozen"),
            ("group", "frozen, measured"),
            ("channel", ""),
            ("channel", "frozen, measured"),
            ("hadamard", "frozen"),
        )
        for kind in (EXPLICIT, AUTO)
        if (name, options, kind) not in SENDS
    ],
)
def test_a_step_sends_scales_and_statistics(name, options, kind, rng):
    check_what_a_step_sends(name, options, kind, rng)


def test_where_pieces_are_cut_the_values_are_those_of_the_whole(rng, small_arrays_too):
    check_kernels_on_shards(CUT_SHARDS, EXPLICIT, rng, compared=True, statistics=True)


@each_mesh
def test_a_kernel_weights_errors_on_each_shard(kind, rng, small_arrays_too):
    weights, names = cage.curvature.fisher(factored=True), ["rows", "both"]
    check_kernels_on_shards(names, kind, rng, compared=True, curvature=weights)
