"""Groups in the order of a TPU's memory: the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage
from cage_jax import scales
from cage_jax.arrays import blocks, tile_order

GROUPS = [*((-1, n) for n in (32, 64, 128, 256)), *((-2, n) for n in (8, 32, 128))]
X = np.random.default_rng(0).normal(size=(2, 256, 512)).astype(np.float32)


def test_groups_are_found_and_spread_as_numpy_does():
    def largest(x, axes):
        return {"max": jnp.max(x, axis=axes, keepdims=True)}

    @jax.jit
    def run(x):
        found = {}
        for axis, size in GROUPS:
            of_group = tile_order.reduce_in_tiles(largest, x, axis, size)["max"]
            spread = tile_order.spread_in_tiles(of_group, axis, size)
            found[axis, size] = of_group, spread
        return found

    for (axis, size), (found, spread) in run(np.abs(X)).items():
        split = (2, 256, -1, size) if axis == -1 else (2, -1, size, 512)
        expected = np.abs(X).reshape(split).max(axis)
        np.testing.assert_array_equal(found, expected, err_msg=f"{axis, size}")
        expected = np.repeat(expected, size, axis)
        np.testing.assert_array_equal(spread, expected, err_msg=f"{axis, size}")


def test_pieces_are_whole_tiles_and_groups():
    mesh = AbstractMesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    whole, columns = (NamedSharding(mesh, spec) for spec in (P(), P(None, "d")))

    def pieces(shape, axis, size, sharding=whole):
        return tile_order.tile_pieces(shape, axis, size, sharding)

    # Nine tiles are not for eight devices.
    assert pieces((4096, 1024), -1, 32, columns) == 8
    assert pieces((4096, 1152), -1, 32) == 1
    assert pieces((4096, 1152), -1, 32, columns) is None
    assert pieces((2048, 1024), -1, 32) == 8
    assert pieces((4096, 1536), -1, 256) == 2
    assert pieces((3, 2048, 1280), -1, 128) == 2
    assert pieces((2048, 1024), -2, 32) == 8
    assert pieces((768, 4096), -2, 128) == 2
    for shape, axis, size in (
        ((2052, 1024), -1, 32),  # rows that are no tiles
        ((4096, 960), -1, 32),  # columns that are none
        ((4096, 960), -2, 32),
        ((4096, 1152), -1, 768),  # groups that are none
        ((4096, 1024), -1, 48),
        ((4096, 1024), -2, 20),
        ((4096, 1024), -2, 4),
        ((4096, 1024), -1, 16),  # too many side by side
        ((2**20,), -1, 32),
        ((2048, 64, 128), -3, 32),
    ):
        assert pieces(shape, axis, size) is None, (shape, axis, size)


QUANTIZERS = {
    "int4": cage.int4(group_size=32, axis=-1),
    "int4 of rows": cage.int4(group_size=32, axis=-2),
    "clipped": cage.int4(group_size=128, axis=-1, scale=scales.AbsMax(0.8)),
    "zero point": cage.int4(group_size=32, axis=-1, symmetric=False),
    "gaussian": cage.quest(4, group_size=64, axis=-1, hadamard=None),
    "gaussian of rows": cage.quest(4, group_size=128, axis=-2, hadamard=None),
    "mxfp4": cage.mxfp4(axis=-1),
    "nvfp4": cage.nvfp4(axis=-2),
    "q4_0": cage.q4_0(axis=-1),
    "q4_1": cage.q4_1(axis=-1),
    "lsq": cage.lsq(4, group_size=32, axis=-1),
}


@pytest.fixture
def forms(monkeypatch):
    """Has every form for TPU be run here; gives how many there were."""
    taken = []

    def dispatch(default, variants, *args):
        found = [each.function for each in variants.found if each.platform == "tpu"]
        taken.extend(found)
        return (found or [default])[0](*args)

    monkeypatch.setattr(blocks, "dispatch", dispatch)
    jax.clear_caches()
    yield taken
    monkeypatch.undo()
    jax.clear_caches()


def everything(quantizer, x):
    """What comes of an array: values, gradient, codes, what these stand for, error."""
    rules = cage.Rules([(".*", quantizer)])
    params = {"x": x}
    if quantizer.scale.learned:
        params = cage.with_grids(params, rules)

    def loss(params):
        value = cage.fake_quant(params, rules)
        values = (value["params"] if "grids" in params else value)["x"]
        return jnp.sum(jnp.sin(x) * values)

    codes = cage.quantize(params, rules)
    return {
        "gradient": jax.grad(loss)(params),
        "codes": codes,
        "values": cage.dequantize(codes),
        "error": cage.quantization_error(params, rules),
    }


def of_all(names):
    """Compiles what comes of an array, by the names of quantizers."""
    return jax.jit(lambda x: {name: everything(QUANTIZERS[name], x) for name in names})


def test_all_that_comes_of_an_array_is_the_same(request):
    expected = {name: of_all([name])(X * 3) for name in QUANTIZERS}
    taken = request.getfixturevalue("forms")

    def compare(path, one, other):
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        # Sums over a group have another order: of a scale, and of what it scales.
        error = np.abs(one - other) > 1e-6 * np.abs(other).max()
        assert error.mean() < 1e-4, jax.tree_util.keystr(path)

    for name in QUANTIZERS:
        before = len(taken)
        found = of_all([name])(X * 3)
        assert len(taken) > before, name
        jax.tree_util.tree_map_with_path(compare, found, {name: expected[name][name]})


def test_explicit_shards_stay_where_they_are(forms):
    run = of_all(["int4", "int4 of rows"])
    expected = run(X)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        before = len(forms)
        found = run(jax.device_put(X, P(None, "a", "b")))
        assert len(forms) > before
    for each in found.values():
        for array in (each["error"]["x"], each["codes"]["x"].scale):
            assert jax.typeof(array).sharding.spec == P(None, "a", "b")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
