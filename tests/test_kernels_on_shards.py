"""Kernels on the parts of sharded parameters, explicit and as `Rules.placed` was told.

programs/test_every_sharding.py compares the values of more of them.
"""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import AUTO, EXPLICIT, mesh_of

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

# By name: the quantizer, the shards, the shape, and that of a shard with a kernel. All
# of these differ, so that they tell whose kernel it is.
ON_SHARDS = {
    "rows": (
        cage.int4(group_size=32),
        P(("data", "model"), None),
        (512, 1024),
        (64, 1024),
    ),
    "columns": (cage.quest(4), P(None, ("data", "model")), (512, 1024), (512, 128)),
    "both": (
        cage.quest(4, hadamard=32, group_size=32),
        P("data", "model"),
        (512, 1024),
        (128, 512),
    ),
    "nowhere": (cage.int4(), P(None, None), (512, 1024), (512, 1024)),
    "a group is cut": (
        cage.int4(group_size=128),
        P(("data", "model"), None),
        (512, 256),
        None,
    ),
    "a tensor is cut": (cage.nvfp4(), P("data", None), (512, 256), None),
    "a channel is cut": (cage.int4(), P("data", None), (512, 256), None),
}

CUT_SHARDS = ["a group is cut", "a tensor is cut", "a channel is cut"]


def check_kernels_on_shards(names, kind, rng, compared, **options):
    """Finds the kernels in a program for TPU, and compares what it finds without them.

    Args:
      names: of weights.
      kind: of the axes of the mesh; if automatic, the rules are told the placement.
      rng: of NumPy.
      compared: whether values are compared with those of whole weights.
      **options: of `cage_adamw`.
    """
    cases = {name: ON_SHARDS[name] for name in names}
    mesh = mesh_of(kind)
    whole = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, (_, _, shape, _) in cases.items()
    }
    specs = {name: spec for name, (_, spec, _, _) in cases.items()}
    params = {
        name: jax.device_put(whole[name], NamedSharding(mesh, specs[name]))
        for name in cases
    }
    rules = cage.Rules(
        [
            (name, dataclasses.replace(quantizer, gradient="clip"))
            for name, (quantizer, *_) in cases.items()
        ]
    ).placed(params)
    assert bool(rules.placements) == (kind == AUTO)
    tx = cage.cage_adamw(1e-2, rules, strength=5.0, **options)

    @jax.jit
    def run(params, state):
        values, back = jax.vjp(lambda params: cage.fake_quant(params, rules), params)
        gradients = jax.tree.map(jnp.sin, params)
        stepped = tx.fused_step(gradients, state, params)
        return values, back(jax.tree.map(jnp.cos, values)), stepped

    init = jax.jit(tx.init)
    with jax.set_mesh(mesh):
        state = init(params)
        traced = run.trace(params, state)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        program = traced.lower().compile()
        found = program(params, state) if compared else None
    values, _, (after, _) = program.output_shardings
    for name, spec in specs.items():
        for each in (values[name], after[name]):
            assert each.is_equivalent_to(NamedSharding(mesh, spec), 2), name
    pattern = r'kernel_name = "(cage_\w+)".* -> \(?tensor<1x(\d+)x(\d+)x'
    named = {(name, (int(m), int(n))) for name, m, n in re.findall(pattern, text)}
    kernels = ("cage_fake_quant", "cage_masked_gradient", "cage_adamw_step")
    shards = [shard for *_, shard in cases.values() if shard is not None]
    assert named == {(kernel, shard) for kernel in kernels for shard in shards}
    assert ("tpu_custom_call" in text) == bool(shards)
    if compared:
        # Without a placement the program is the same on one device.
        *expected, stepped = run(whole, init(whole))
        *values, after = found
        chex.assert_trees_all_close(values, expected, atol=1e-6)
        chex.assert_trees_all_close(after, stepped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO], ids=str)
def test_a_kernel_runs_on_each_shard(kind, rng, small_arrays_too):
    names = ["rows", "columns", "both", "nowhere"]
    check_kernels_on_shards(names, kind, rng, compared=True, statistics=True)
    check_kernels_on_shards(CUT_SHARDS, kind, rng, compared=False, statistics=True)


def test_a_placement_is_for_arrays_of_its_shape_on_an_automatic_mesh(rng):
    mesh, spec = mesh_of(AUTO), P(None, ("data", "model"))
    weight = rng.standard_normal((128, 64)).astype(np.float32)
    plain = cage.Rules([("kernel", cage.int4(group_size=32)), (".*", None)])
    sharding = NamedSharding(mesh, spec)
    params = {"kernel": jax.device_put(weight, sharding), "norm": jnp.ones(4)}
    rules = plain.placed(params)
    assert {path: each.shape for path, each in rules.placements.items()} == {
        "kernel": weight.shape
    }
    assert rules != plain and rules == plain.placed(params)
    assert hash(rules) == hash(plain.placed(params))
    assert rules.at(params, {}).placements == rules.placements
    fake_quant = jax.jit(cage.fake_quant, static_argnums=1)
    expected = fake_quant({"kernel": weight}, plain)["kernel"]

    def values(weights):
        return cage.fake_quant({"kernel": weights}, rules)["kernel"]

    # One device's columns, and each of a stack: the placement is not theirs.
    local = jax.shard_map(values, mesh=mesh, in_specs=spec, out_specs=spec)
    for found in (
        jax.jit(local)(params["kernel"]),
        jax.jit(jax.vmap(values))(weight[None])[0],
        fake_quant(params, rules)["kernel"],
    ):
        np.testing.assert_array_equal(found, expected)
