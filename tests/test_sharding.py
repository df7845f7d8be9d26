"""Sharded parameters: the same values, stable types, and no gathered weight."""

import dataclasses
import math
import re
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
from cage_jax.pallas import tiles

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
    "group": cage.int4(group_size=16),
    "channel": cage.int4(),
    "tensor": cage.int4(axis=None),
    "asymmetric": cage.int4(group_size=16, symmetric=False),
    "hadamard": cage.quest(4, hadamard=16),
}
each_mesh = pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
each_quantizer = pytest.mark.parametrize("name", list(QUANTIZERS))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def weight_for(spec, rng):
    shape = (4, *SHAPE)[-len(spec) :]
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture
def weight(rng):
    return weight_for(SPECS["both"], rng)


@pytest.fixture
def weights(rng):
    """One for each sharding."""
    return {placed: weight_for(spec, rng) for placed, spec in SPECS.items()}


def shardings_on(mesh):
    return {placed: NamedSharding(mesh, spec) for placed, spec in SPECS.items()}


def assert_sharded(array, spec):
    """As the weight, along the axes in which the array has several elements."""
    axes = P(*(None if n == 1 else axis for axis, n in zip(spec, array.shape)))
    expected = NamedSharding(array.sharding.mesh, axes)
    assert array.sharding.is_equivalent_to(expected, array.ndim), array.sharding


def assert_close(name, sharded, whole, scale=1.0):
    """Absmax is exact in any order; sums and products are not."""
    atol = 0.0 if name in ("group", "channel", "tensor") else 2e-6 * scale
    chex.assert_trees_all_close(
        jax.device_get(sharded), jax.device_get(whole), rtol=0, atol=atol
    )


@each_mesh
@each_quantizer
def test_values_and_codes_are_those_of_the_whole(name, kind, weights):
    rules = cage.Rules([(".*", QUANTIZERS[name])])

    @jax.jit
    def quantize(weights):
        return cage.fake_quant(weights, rules), cage.quantize(weights, rules)

    whole, whole_codes = quantize(weights)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        values, quantized = quantize(jax.device_put(weights, shardings_on(mesh)))
    assert_close(name, values, whole)
    for placed, spec in SPECS.items():
        got, expected = quantized[placed], whole_codes[placed]
        for array in (values[placed], got.codes, got.scale):
            assert_sharded(array, spec)
        assert_close(name, got.scale, expected.scale)
        if name != "hadamard":  # sums in another order may round to another code
            np.testing.assert_array_equal(got.codes, expected.codes)


def train(tx, params, gradients, steps):
    """The last parameters and state, all states' types, and how often it compiled."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    types = [jax.tree.map(jax.typeof, (params, state))]
    shardings = []
    for _ in range(steps):
        params, state = step(params, state)
        types.append(jax.tree.map(jax.typeof, (params, state)))
        shardings.append(jax.tree.map(lambda x: x.sharding, (params, state)))
    return params, state, types, shardings, step._cache_size()


@pytest.mark.parametrize(
    ("name", "placed", "kind"),
    [
        ("group", "both", AxisType.Explicit),
        ("channel", "both", AxisType.Explicit),
        ("asymmetric", "both", AxisType.Explicit),
        ("hadamard", "both", AxisType.Explicit),
        ("channel", "rows", AxisType.Explicit),
        ("group", "columns", AxisType.Explicit),
        ("group", "both", AxisType.Auto),
        ("channel", "rows", AxisType.Auto),
        ("hadamard", "stacked", AxisType.Explicit),
        ("channel", "layers", AxisType.Auto),
    ],
    ids=str,
)
def test_training_is_that_of_the_whole(name, placed, kind, rng):
    weight = weight_for(SPECS[placed], rng)
    rules = cage.Rules([(r".*kernel", QUANTIZERS[name])])
    tx = cage.cage_adamw(
        1e-2,
        rules,
        cage.silence_then_constant(4, 5.0, silence=0.25),
        freeze_scale=True,
        statistics=True,
    )
    params = {"kernel": weight, "bias": jnp.ones(SHAPE[1])}
    gradients = {
        "kernel": jnp.asarray(rng.normal(size=weight.shape), jnp.float32),
        "bias": jnp.ones(SHAPE[1]),
    }
    whole, whole_state, *_ = train(tx, params, gradients, 4)
    mesh = mesh_of(kind)
    place = {
        "kernel": NamedSharding(mesh, SPECS[placed]),
        "bias": NamedSharding(mesh, P(None)),
    }
    with jax.set_mesh(mesh):
        params, gradients = jax.device_put((params, gradients), (place, place))
        got, state, types, shardings, compiled = train(tx, params, gradients, 4)
    kept = [tree_get(state, each) for each in ("mu", "nu", "previous_codes")]
    for array in (each["kernel"] for each in (got, *kept)):
        assert_sharded(array, SPECS[placed])
    assert_sharded(tree_get(state, "grids")["kernel"].scale, SPECS[placed])
    # From the very first state on; in an explicit mesh shardings are in the types.
    assert all(later == types[0] for later in types)
    assert all(later == shardings[0] for later in shardings)
    if kind == AxisType.Explicit:
        assert compiled == 1
    else:  # without types, jax spells the sharding of the first state otherwise
        assert compiled <= 2
    # Adam's division, and sums over shards, are rounded in another order.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=0, atol=1e-5
    )
    assert_close(name, tree_get(state, "grids"), tree_get(whole_state, "grids"))
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


@each_mesh
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("name", ["group", "channel", "asymmetric", "hadamard"])
def test_inside_shard_map(name, more, kind, weight):
    quantizer = QUANTIZERS[name]
    tx = cage.cage_adamw(
        1e-2,
        cage.Rules([(".*", quantizer)]),
        cage.silence_then_constant(4, 5.0, silence=0.25),
        freeze_scale=more,
        statistics=more,
    )

    def train(weight):
        state = tx.init(weight)
        for _ in range(4):
            gradient = jax.grad(lambda w: jnp.sum(cage.fake_quant(w, quantizer) ** 2))(
                weight
            )
            updates, state = tx.update(gradient, state, weight)
            weight = optax.apply_updates(weight, updates)
        return weight

    # Sums over rotated rows are, of other shapes, in another order, and a code flips.
    parts = jnp.split(weight, 8 if name == "hadamard" else 1, axis=1)
    whole = jnp.concatenate([jax.jit(train)(part) for part in parts], axis=1)
    mesh, spec = mesh_of(kind), P(None, ("data", "model"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, spec))
        mapped = jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec)
        program = jax.jit(mapped).lower(placed).compile()
        got = program(placed)
    assert nothing_is_sent(program)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    # Adam's division is rounded in another order.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=0, atol=1e-6
    )


def nothing_is_sent(program):
    """Not in any branch of a condition."""
    return not any(kind in program.as_text() for kind in hlo.COLLECTIVES)


@each_mesh
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("group", ""),
        ("group", "frozen"),
        ("group", "frozen, measured"),
        ("channel", ""),
        ("channel", "frozen, measured"),
        ("hadamard", "frozen"),
    ],
)
def test_a_step_sends_scales_and_statistics(name, options, kind, weights):
    rules = cage.Rules([(".*", QUANTIZERS[name])])
    tx = cage.cage_sgd(
        1e-2,
        rules,
        cage.silence_then_ramp(10),
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

    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, shardings_on(mesh))
        program = step.lower(weights, jax.jit(tx.init)(weights)).compile()
    # The scales of columns whose rows are on several devices, four bytes each.
    split = [w for w in weights.values() if w.sharding.spec[-2] is not None]
    split = [] if name == "group" else split
    shards = [w.sharding.shard_shape(w.shape) for w in split]
    columns = sum(4 * math.prod(shard) // shard[-2] for shard in shards)
    # They are found for `fake_quant` and for CAGE, of statistics for error and codes.
    times = 4 if "measured" in options else 2
    # Four norms and a count, along one axis of the mesh and then along the other.
    numbers = 2 * 5 * len(weights) if "measured" in options else 0
    if not split and not numbers:
        assert nothing_is_sent(program)
        return
    sent = hlo.moved(program.as_text())
    assert set(sent.counts) == {"all-reduce"}
    assert sent.counts["all-reduce"] <= times * len(split) + numbers
    assert sent.collectives["all-reduce"] <= times * columns + 4 * numbers


# Pieces of 24 rows lie in a shard of 192 / 8 rows; those of 48 rows are two shards, and
# those of 16 and 64 are neither.
CUT = {
    "inside": (cage.int4(group_size=24), False),
    "two shards": (cage.int4(group_size=48), False),
    "some cut": (cage.int4(group_size=16), True),
    "rotated inside": (cage.quest(4, hadamard=8), False),
    "rotated across": (cage.quest(4, hadamard=64), True),
}


@each_mesh
@pytest.mark.parametrize("case", list(CUT))
def test_the_report_warns_where_weights_are_sent(case, kind, rng):
    quantizer, warns = CUT[case]
    rules = cage.Rules([(".*", quantizer)])
    weight = jnp.asarray(rng.normal(size=(192, 64)), jnp.float32)
    error = jax.jit(cage.quantization_error, static_argnums=1)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, SPECS["all rows"]))
        program = error.lower(placed, quantizer).compile()
        got = program(placed)
    # A rotation, and a mean square, are summed in another order.
    atol = 0 if quantizer.hadamard is None else 2e-6
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(error(weight, quantizer)), rtol=0, atol=atol
    )
    assert_sharded(got, SPECS["all rows"])
    if kind == AxisType.Explicit:  # automatic axes lose it behind such a rotation
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

    weight = weight_for(SPECS["all rows"], rng)
    whole = gradient(cage.with_grids({"kernel": weight}, rules))
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, SPECS["all rows"]))
        got = gradient(cage.with_grids({"kernel": placed}, rules))
    # The gradient of a scale is a sum over shards.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=1e-5, atol=1e-6
    )


def kernels_in(function, *args):
    """Names of those in the program for TPU."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))
    return set(re.findall(r'kernel_name = "(cage_\w+)"', lowered.as_text()))


EXPLICIT = {
    "rows": (cage.int4(group_size=32), P(("data", "model"), None), True),
    "columns": (cage.quest(4), P(None, ("data", "model")), True),
    "both": (cage.quest(4, hadamard=32, group_size=32), P("data", "model"), True),
    "nowhere": (cage.int4(), P(None, None), True),
    "a group is cut": (cage.int4(group_size=128), P(("data", "model"), None), False),
    "a tensor is cut": (cage.nvfp4(), P("data", None), False),
    "a channel is cut": (cage.int4(), P("data", None), False),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_kernel_runs_on_each_explicit_shard(name, rng, monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST", 0)
    quantizer, spec, expected = EXPLICIT[name]
    quantizer = dataclasses.replace(quantizer, gradient="clip")
    weight = jnp.asarray(rng.normal(size=(512, 1024)), jnp.float32)

    def both(x):
        value, back = jax.vjp(lambda x: cage.fake_quant(x, quantizer), x)
        return value, *back(jnp.cos(value))

    rules = cage.Rules([("w", quantizer)])
    tx = cage.cage_adamw(1e-2, rules, 5.0, statistics=True)

    def step(params, state):
        gradients = jax.tree.map(jnp.sin, params)
        return tx.fused_step(gradients, state, params)

    whole = {"w": weight}
    values = jax.jit(both)(weight)
    stepped = jax.jit(step)(whole, tx.init(whole))
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        x = jax.device_put(weight, spec)
        params = {"w": x}
        state = jax.jit(tx.init)(params)
        found, after = jax.jit(both)(x), jax.jit(step)(params, state)
        assert found[0].sharding.spec == spec == after[0]["w"].sharding.spec
        named = kernels_in(both, x), kernels_in(step, params, state)
    assert named == (
        ({"cage_fake_quant", "cage_masked_gradient"}, {"cage_adamw_step"})
        if expected
        else (set(), set())
    )
    chex.assert_trees_all_close(found, values, atol=1e-6)
    chex.assert_trees_all_close(after, stepped, rtol=1e-5, atol=1e-6)
