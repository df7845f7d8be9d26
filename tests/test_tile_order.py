"""Groups along the last axis in the order of a TPU's memory: the same values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_kernels_for_tpu import needs_libtpu, on

import cage_jax as cage
from cage_jax import rounding, scales, tile_order

SIZES = (16, 32, 128, 256)
X = np.random.default_rng(0).normal(size=(2, 256, 512)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_groups_are_found_and_spread_as_numpy_does(size):
    def largest(x, axes):
        return {"max": jnp.max(x, axis=axes, keepdims=True)}

    groups = np.abs(X).reshape(2, 256, -1, size)
    found = tile_order.reduce_in_tiles(largest, jnp.abs(X), size)["max"]
    np.testing.assert_array_equal(found, groups.max(-1))
    spread = tile_order.spread_in_tiles(found, size)
    np.testing.assert_array_equal(spread, np.repeat(groups.max(-1), size, axis=-1))


def test_pieces_are_whole_tiles_and_groups():
    sharding = jax.typeof(jnp.zeros(8)).sharding

    def pieces(shape, size):
        return tile_order.tile_pieces(shape, size, sharding)

    assert pieces((2048, 1024), 32) == 8
    assert pieces((4096, 1536), 256) == 2
    assert pieces((3, 2048, 1280), 128) == 2
    for shape, size in (
        ((2052, 1024), 32),  # rows that are no tiles
        ((4096, 960), 32),  # columns that are none
        ((4096, 1152), 384 * 2),  # groups that are none
        ((4096, 1024), 48),
        ((4096, 1024), 8),  # too many side by side
        ((64, 1024), 32),  # small
        ((2**20,), 32),
    ):
        assert pieces(shape, size) is None, (shape, size)


QUANTIZERS = {
    "int4": cage.int4(group_size=32, axis=-1),
    "clipped": cage.int4(group_size=128, axis=-1, scale=scales.AbsMax(0.8)),
    "zero point": cage.int4(group_size=16, axis=-1, symmetric=False),
    "gaussian": cage.quest(4, group_size=64, axis=-1, hadamard=None),
    "mxfp4": cage.mxfp4(axis=-1),
    "nvfp4": cage.nvfp4(axis=-1),
    "q4_0": cage.q4_0(axis=-1),
    "q4_1": cage.q4_1(axis=-1),
    "lsq": cage.lsq(4, group_size=32, axis=-1),
}


@pytest.fixture
def forms(monkeypatch):
    """Has every form for TPU be run here; gives how many there were."""
    taken = []

    def either(default, kernels, *args, **_):
        if kernels.xla_tpu is None:
            return default(*args)
        taken.append(kernels.xla_tpu)
        return kernels.xla_tpu(*args)

    monkeypatch.setattr(rounding, "either", either)
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


@functools.cache
def as_usual(name):
    return jax.tree.map(np.asarray, everything(QUANTIZERS[name], jnp.asarray(X * 3)))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_that_comes_of_an_array_is_the_same(name, request):
    expected = as_usual(name)
    taken = request.getfixturevalue("forms")
    found = everything(QUANTIZERS[name], jnp.asarray(X * 3))
    assert taken

    def compare(path, one, other):
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        # Sums over a group have another order: of a scale, and of what it scales.
        error = np.abs(one - other) > 1e-6 * np.abs(other).max()
        assert error.mean() < 1e-4, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, found, expected)


def test_explicit_shards_stay_where_they_are(forms):
    quantizer = QUANTIZERS["int4"]
    expected = everything(quantizer, jnp.asarray(X))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, P(None, "a", "b"))
        before = len(forms)
        found = everything(quantizer, x)
        assert len(forms) > before
        assert jax.typeof(found["error"]["x"]).sharding.spec == P(None, "a", "b")
        scale = found["codes"]["x"].scale
        assert jax.typeof(scale).sharding.spec == P(None, "a", "b")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


SCRIPT = """
import json, sys
import hlo, jax, jax.numpy as jnp
import kernels
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import cage_jax as cage

devices = topologies.get_topology_desc(
    platform="tpu", topology_name=kernels.CHIPS["v5e"]
).devices
mesh = jax.sharding.Mesh(devices, "d", axis_types=(AxisType.Auto,))

def moved(function, shape, dtype="float32", spec=None):
    if spec is None:
        x = kernels.array(shape, dtype, "v5e")
    else:
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    found = hlo.moved(jax.jit(function).lower(x).compile().as_text())
    unit = x.size * x.dtype.itemsize / (1 if spec is None else 4)
    return [found.memory / unit, sum(found.collectives.values())]

def quantized(quantizer):
    return lambda x: cage.fake_quant(x, quantizer, implementation="xla")

LAST = {size: cage.int4(group_size=size, axis=-1) for size in (32, 128)}
found = {f"{size}": moved(quantized(LAST[size]), (65536, 4096)) for size in LAST}
found["bfloat16"] = moved(quantized(LAST[128]), (65536, 4096), "bfloat16")
found["codes"] = moved(lambda x: cage.quantize(x, LAST[128]).codes, (65536, 4096))
for size in LAST:
    case = kernels.Case(LAST[size], "step")
    found[f"step {size}"] = [kernels.counted(case, "v5e", "xla")["units"], 0]
rows, columns = P("d", None), P(None, "d")
found["rows"] = moved(quantized(LAST[32]), (65536, 4096), spec=rows)
found["columns"] = moved(quantized(LAST[32]), (65536, 4096), spec=columns)
found["cut"] = moved(quantized(LAST[32]), (65536, 4224), spec=columns)
print(json.dumps(found))
"""


@needs_libtpu
def test_compiled_for_tpu_nothing_is_copied_or_sent():
    found = on([], SCRIPT)
    sent = {name: each[1] for name, each in found.items()}
    assert not any(sent.values()), sent
    units = {name: each[0] for name, each in found.items()}
    # Read twice and written once; of each group a number is padded to a whole row.
    assert units["128"] <= 3.05 and units["bfloat16"] <= 3.1
    assert units["32"] <= 3.2
    assert units["codes"] <= 2.2
    assert units["step 128"] <= 8.1 and units["step 32"] <= 8.4
    assert units["rows"] <= 3.3 and units["columns"] <= 3.3
    # Shards that would cut a tile are left as they were.
    assert units["cut"] > 6
