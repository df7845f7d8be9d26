"""Sharded parameters: the same values, stable types, and no gathered weight."""

import re

import chex
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
each_spec = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
each_quantizer = pytest.mark.parametrize("name", list(QUANTIZERS))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.fixture
def weight(rng):
    return jnp.asarray(rng.normal(size=SHAPE), jnp.float32)


def assert_close(name, sharded, whole, scale=1.0):
    """Absmax is exact in any order; sums and products are not."""
    atol = 0.0 if name in ("group", "channel", "tensor") else 2e-6 * scale
    chex.assert_trees_all_close(
        jax.device_get(sharded), jax.device_get(whole), rtol=0, atol=atol
    )


@each_mesh
@each_spec
@each_quantizer
def test_fake_quant_is_that_of_the_whole(name, spec, kind, weight):
    quantize = jax.jit(cage.fake_quant, static_argnums=1)
    whole = quantize(weight, QUANTIZERS[name])
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        sharded = quantize(jax.device_put(weight, sharding), QUANTIZERS[name])
    assert sharded.sharding.is_equivalent_to(sharding, 2)
    assert_close(name, sharded, whole)


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
    ],
    ids=str,
)
def test_training_is_that_of_the_whole(name, placed, kind, weight, rng):
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
        "kernel": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
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
    assert got["kernel"].sharding.is_equivalent_to(place["kernel"], 2)
    codes = tree_get(state, "previous_codes")["kernel"]
    assert codes.sharding.is_equivalent_to(place["kernel"], 2)
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
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["group", "channel", "asymmetric"])
def test_inside_shard_map(name, frozen, kind, weight):
    quantizer = QUANTIZERS[name]
    tx = cage.cage_adamw(
        1e-2,
        cage.Rules([(".*", quantizer)]),
        cage.silence_then_constant(4, 5.0, silence=0.25),
        freeze_scale=frozen,
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

    whole = jax.jit(train)(weight)
    mesh, spec = mesh_of(kind), P(None, ("data", "model"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, spec))
        mapped = jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec)
        program = jax.jit(mapped).lower(placed).compile()
        got = program(placed)
    assert not COLLECTIVE.search(program.as_text())
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    # Adam's division is rounded in another order.
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(whole), rtol=0, atol=1e-6
    )


COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-to-all|collective-permute|all-reduce)"
    r"(?:-start)?\("
)


def collectives(tx, params):
    """The kind and the number of elements of each collective of an update."""
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    found = set()
    for _, shape, name in COLLECTIVE.findall(compiled.as_text()):
        found.add((name, int(np.prod([int(n) for n in shape.split(",") if n]))))
    return found


@each_mesh
@each_spec
@pytest.mark.parametrize("freeze_scale", [False, True])
def test_groups_inside_a_shard_need_no_collective(freeze_scale, spec, kind, weight):
    rules = cage.Rules([(".*", QUANTIZERS["group"])])
    tx = cage.cage(rules, cage.silence_then_ramp(10), freeze_scale=freeze_scale)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, spec))
        assert not collectives(tx, placed)


@each_mesh
@each_spec
@pytest.mark.parametrize("name", ["channel", "hadamard"])
def test_a_scale_across_shards_needs_only_its_reduction(name, spec, kind, weight):
    rules = cage.Rules([(".*", QUANTIZERS[name])])
    tx = cage.cage(rules, cage.silence_then_ramp(10))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, spec))
        found = collectives(tx, placed)
    assert {kind for kind, _ in found} <= {"all-reduce"}
    # One number for each channel at the most, never a weight.
    assert all(size <= SHAPE[1] for _, size in found)
    assert bool(found) == (spec != SPECS["columns"])


def test_the_search_for_collectives_finds_a_gather(weight):
    # A rotation across the shards has to bring them together.
    rules = cage.Rules([(".*", cage.quest(4, hadamard=128))])
    tx = cage.cage(rules, 1.0)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, SPECS["rows"]))
        found = collectives(tx, placed)
        updates, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
    assert any(kind != "all-reduce" or size > SHAPE[1] for kind, size in found)
    whole, _ = tx.update(weight, tx.init(weight), weight)
    # A rotation is rounded in another order.
    chex.assert_trees_all_close(
        jax.device_get(updates), jax.device_get(whole), rtol=0, atol=2e-6
    )
