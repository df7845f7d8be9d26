"""Sharded parameters: the same values, stable types, and no gathered weight.

Each placement is checked once; programs/test_every_sharding.py crosses all with all.
"""

import math
import warnings

import chex
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_get

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPE = (128, 64)
SPECS = {
    "rows": P("data", None),  # FSDP
    "columns": P(None, "model"),  # tensor parallel
    "both": P("data", "model"),
    "all rows": P(("data", "model"), None),
    "stacked": P(None, "data", "model"),  # layers, then as above
    "layers": P("data", None, "model"),
}
# Groups and rotations of 16 rows lie inside a shard of 128 / 8 rows.
QUANTIZERS = {
    "group": cage.int4(axis=-2, group_size=16),
    "channel": cage.int4(axis=-2),
    "tensor": cage.int4(axis=None),
    "asymmetric": cage.int4(axis=-2, group_size=16, symmetric=False),
    "hadamard": cage.quest(4, axis=-2, hadamard=16),
}
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def weight_for(placed, rng):
    shape = (4, *SHAPE)[-len(SPECS[placed]) :]
    return rng.standard_normal(shape).astype(np.float32)


def assert_sharded(array, spec):
    """Asks for the sharding of the weight along axes with several elements."""
    axes = P(*(None if n == 1 else axis for axis, n in zip(spec, array.shape)))
    expected = NamedSharding(array.sharding.mesh, axes)
    assert array.sharding.is_equivalent_to(expected, array.ndim), array.sharding


def assert_close(name, sharded, whole, scale=1.0):
    """Absmax is exact in any order; sums and products are not."""
    atol = 0.0 if name in ("group", "channel", "tensor") else 2e-6 * scale
    chex.assert_trees_all_close(
        jax.device_get(sharded), jax.device_get(whole), rtol=0, atol=atol
    )


def check_values_and_codes(placements, kind, rng):
    """Compares what is made of sharded weights with what is made of whole ones.

    Args:
      placements: by the name of a quantizer, names of placements.
      kind: of the axes of the mesh.
      rng: of NumPy.
    """

    @jax.jit
    def quantize(weights):
        found = {}
        for name, each in weights.items():
            rules = cage.Rules([(".*", QUANTIZERS[name])])
            found[name] = cage.fake_quant(each, rules), cage.quantize(each, rules)
        return found

    # One weight for all placements of a matrix, another for those of a stack.
    arrays = {len(SPECS[placed]): weight_for(placed, rng) for placed in SPECS}
    dimensions = {
        name: {len(SPECS[p]) for p in placements[name]} for name in placements
    }
    whole = quantize(
        {name: {n: arrays[n] for n in each} for name, each in dimensions.items()}
    )
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        found = quantize(
            {
                name: {
                    placed: jax.device_put(
                        arrays[len(SPECS[placed])], NamedSharding(mesh, SPECS[placed])
                    )
                    for placed in each
                }
                for name, each in placements.items()
            }
        )
    for name, (values, quantized) in found.items():
        for placed, value in values.items():
            spec, got = SPECS[placed], quantized[placed]
            expected = whole[name][0][len(spec)]
            expected_codes = whole[name][1][len(spec)]
            assert_close(name, value, expected)
            for array in (value, got.codes, got.scale):
                assert_sharded(array, spec)
            assert_close(name, got.scale, expected_codes.scale)
            if name != "hadamard":  # sums in another order may round to another code
                np.testing.assert_array_equal(got.codes, expected_codes.codes)


def test_values_and_codes_are_those_of_the_whole(rng):
    placements = {name: ["both", "stacked"] for name in QUANTIZERS}
    placements["channel"] = list(SPECS)
    placements["hadamard"] = ["all rows", "columns", "stacked"]
    check_values_and_codes(placements, EXPLICIT, rng)
    placements = {"channel": ["all rows", "stacked"], "hadamard": ["both"]}
    check_values_and_codes(placements, AUTO, rng)


def train(tx, params, gradients, steps, init):
    """The last parameters and state, all states' types, and how often it compiled."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = init(params)
    types = [jax.tree.map(jax.typeof, (params, state))]
    shardings = []
    for _ in range(steps):
        params, state = step(params, state)
        types.append(jax.tree.map(jax.typeof, (params, state)))
        shardings.append(jax.tree.map(lambda x: x.sharding, (params, state)))
    return params, state, types, shardings, step._cache_size()


def check_training(placements, kind, rng):
    """Compares a training of sharded kernels with that of whole ones.

    Args:
      placements: by the name of a quantizer, that of the placement of its kernel.
      kind: of the axes of the mesh.
      rng: of NumPy.
    """
    rules = cage.Rules([(name, QUANTIZERS[name]) for name in placements])
    tx = cage.cage_adamw(
        1e-2,
        rules,
        strength=cage.silence_then_constant(4, 5.0, silence=0.25),
        freeze_scale=True,
        statistics=True,
    )
    params = {name: weight_for(placed, rng) for name, placed in placements.items()}
    gradients = {name: weight_for(placed, rng) for name, placed in placements.items()}
    params["bias"] = gradients["bias"] = np.ones(SHAPE[1], np.float32)
    whole, whole_state, *_ = train(tx, params, gradients, 4, jax.jit(tx.init))
    mesh = mesh_of(kind)
    place = {
        name: NamedSharding(mesh, SPECS[each]) for name, each in placements.items()
    }
    place["bias"] = NamedSharding(mesh, P(None))
    with jax.set_mesh(mesh):
        params, gradients = jax.device_put((params, gradients), (place, place))
        got, state, types, shardings, compiled = train(
            tx, params, gradients, 4, tx.init
        )
    kept = [tree_get(state, each) for each in ("mu", "nu", "previous_codes")]
    for name, placed in placements.items():
        for array in (each[name] for each in (got, *kept)):
            assert_sharded(array, SPECS[placed])
        assert_sharded(tree_get(state, "grids")[name].scale, SPECS[placed])
    # From the very first state on; in an explicit mesh shardings are in the types.
    assert all(later == types[0] for later in types)
    assert all(later == shardings[0] for later in shardings)
    if kind == EXPLICIT:
        assert compiled == 1
    else:  # without types, jax spells the sharding of the first state otherwise
        assert compiled <= 2
    # Adam's division, and sums over shards, are rounded in another order.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=0, atol=1e-5
    )
    for name in placements:
        grids = (tree_get(each, "grids")[name] for each in (state, whole_state))
        assert_close(name, *grids)
    for statistic in (
        "relative_error_mean",
        "relative_error_max",
        "correction_ratio",
        "codes_flipped",
        "norm_drift",
    ):
        # A norm over 8192 weights, summed by shard.
        np.testing.assert_allclose(
            tree_get(state, statistic),
            tree_get(whole_state, statistic),
            rtol=1e-4,
            atol=1e-6,
            err_msg=statistic,
        )


@pytest.mark.parametrize(
    ("placements", "kind"),
    [
        ({"group": "both", "hadamard": "stacked"}, EXPLICIT),
        ({"asymmetric": "columns", "channel": "layers"}, AUTO),
    ],
    ids=["explicit", "auto"],
)
def test_training_is_that_of_the_whole(placements, kind, rng):
    check_training(placements, kind, rng)


def check_inside_shard_map(more, kind, rng):
    """Compares a training inside of `shard_map` with one for each device's columns.

    Args:
      more: whether scales are kept, and statistics taken.
      kind: of the axes of the mesh.
      rng: of NumPy.
    """
    names = ("group", "channel", "asymmetric", "hadamard")
    rules = cage.Rules([(name, QUANTIZERS[name]) for name in names])
    tx = cage.cage_adamw(
        1e-2,
        rules,
        strength=cage.silence_then_constant(4, 5.0, silence=0.25),
        freeze_scale=more,
        statistics=more,
    )

    def loss(weights):
        return sum(
            jnp.sum(each**2) for each in cage.fake_quant(weights, rules).values()
        )

    def step(carry, _=None):
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    def train(weights):
        (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), length=4)
        return weights

    weights = {name: weight_for("both", rng) for name in names}
    # Of other shapes, sums over rotated rows are in another order, and a code flips.
    alone = jax.jit(train)
    parts = [
        alone({name: np.split(w, 8, axis=1)[i] for name, w in weights.items()})
        for i in range(8)
    ]
    whole = jax.tree.map(lambda *each: np.concatenate(each, axis=1), *parts)
    mesh, spec = mesh_of(kind), P(None, ("data", "model"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, NamedSharding(mesh, spec))
        mapped = jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec)
        program = jax.jit(mapped).lower(placed).compile()
        got = program(placed)
    assert nothing_is_sent(program)
    for each in got.values():
        assert each.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    # Adam's division is rounded in another order.
    chex.assert_trees_all_close(jax.device_get(got), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("more, kind", [(True, EXPLICIT), (False, AUTO)])
def test_inside_shard_map(more, kind, rng):
    check_inside_shard_map(more, kind, rng)


def nothing_is_sent(program):
    """Not in any branch of a condition."""
    return not any(kind in program.as_text() for kind in hlo.COLLECTIVES)


def check_what_a_step_sends(name, options, kind, rng):
    """Compares what a step sends with scales and statistics.

    Args:
      name: of a quantizer.
      options: "frozen", "measured", or both.
      kind: of the axes of the mesh.
      rng: of NumPy.
    """
    rules = cage.Rules([(".*", QUANTIZERS[name])])
    tx = cage.cage_sgd(
        1e-2,
        rules,
        strength=cage.silence_then_ramp(10),
        freeze_scale="frozen" in options,
        statistics="measured" in options,
    )

    def loss(weights):
        quantized = cage.fake_quant(weights, rules)
        return sum(jnp.sin(each).sum() for each in quantized.values())

    @jax.jit
    def step(weights, state):  # without quantizing it would send nothing
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = {placed: weight_for(placed, rng) for placed in SPECS}
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        shardings = {
            placed: NamedSharding(mesh, spec) for placed, spec in SPECS.items()
        }
        weights = jax.device_put(weights, shardings)
        program = step.lower(weights, jax.jit(tx.init)(weights)).compile()
    # The scales of columns whose rows are on several devices, four bytes each.
    split = [w for w in weights.values() if w.sharding.spec[-2] and name != "group"]
    shards = [w.sharding.shard_shape(w.shape) for w in split]
    columns = sum(4 * math.prod(shard) // shard[-2] for shard in shards)
    # They are found for `fake_quant` and for CAGE, of statistics for error and codes.
    times = 4 if "measured" in options else 2
    # Four norms and a count, along both axes of the mesh.
    numbers = 2 * 5 * len(weights) * ("measured" in options)
    if not split and not numbers:
        assert nothing_is_sent(program)
        return
    sent = hlo.moved(program.as_text())
    assert set(sent.counts) == {"all-reduce"}
    assert sent.counts["all-reduce"] <= times * len(split) + numbers
    assert sent.collectives["all-reduce"] <= times * columns + 4 * numbers


SENDS = [
    ("group", "", EXPLICIT),
    ("channel", "frozen, measured", EXPLICIT),
    ("hadamard", "frozen", AUTO),
]


@pytest.mark.parametrize("name, options, kind", SENDS)
def test_a_step_sends_scales_and_statistics(name, options, kind, rng):
    check_what_a_step_sends(name, options, kind, rng)


# Pieces of 24 rows lie in a shard of 192 / 8 rows; those of 48 rows are two shards, and
# those of 16 and 64 are neither.
CUT = {
    "inside": (cage.int4(group_size=24), False),
    "two shards": (cage.int4(group_size=48), False),
    "some cut": (cage.int4(group_size=16), True),
    "rotated inside": (cage.quest(4, hadamard=8), False),
    "rotated across": (cage.quest(4, hadamard=64), True),
}


@pytest.mark.parametrize("case", CUT)
def test_the_report_warns_where_weights_are_sent(case, rng):
    quantizer, warns = CUT[case]
    rules = cage.Rules([(".*", quantizer)])
    weight = rng.standard_normal((192, 64)).astype(np.float32)
    error = jax.jit(cage.quantization_error, static_argnums=1)
    whole = jax.device_get(error(weight, quantizer))
    for kind in (EXPLICIT, AUTO):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            placed = jax.device_put(weight, NamedSharding(mesh, SPECS["all rows"]))
            program = error.lower(placed, quantizer).compile()
            got = program(placed)
        # A rotation, and a mean square, are summed in another order.
        atol = 0 if quantizer.hadamard is None else 2e-6
        chex.assert_trees_all_close(jax.device_get(got), whole, rtol=0, atol=atol)
        assert_sharded(got, SPECS["all rows"])
        if kind == EXPLICIT:  # automatic axes lose it behind such a rotation
            assert_sharded(cage.quantize(placed, quantizer).codes, SPECS["all rows"])
        sent = sum(hlo.moved(program.as_text()).collectives.values())
        # What finds a scale together sends less than a shard of the weights.
        assert (sent >= weight.nbytes // 8) == warns
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            report = rules.report(placed)
        assert bool(report.splits) == warns
        assert tuple(str(each.message) for each in seen) == report.splits


def test_a_learned_scale_of_shards_has_the_gradient_of_the_whole(rng):
    rules = cage.Rules([("kernel", cage.lsq(4, axis=-2, group_size=64))])

    @jax.jit
    def gradient(variables):
        return jax.grad(
            lambda v: jnp.sin(cage.fake_quant(v, rules)["params"]["kernel"]).sum()
        )(variables)

    weight = weight_for("all rows", rng)
    whole = gradient(cage.with_grids({"kernel": jnp.asarray(weight)}, rules))
    mesh = mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, SPECS["all rows"]))
        got = gradient(cage.with_grids({"kernel": placed}, rules))
    # The gradient of a scale is a sum over shards.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=1e-5, atol=1e-6
    )
