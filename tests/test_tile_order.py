"""Groups in the order of a TPU's memory: the same values."""

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

GROUPS = [*((-1, n) for n in (32, 64, 128, 256)), *((-2, n) for n in (8, 32, 128))]
X = np.random.default_rng(0).normal(size=(2, 256, 512)).astype(np.float32)


@pytest.mark.parametrize("axis, size", GROUPS)
def test_groups_are_found_and_spread_as_numpy_does(axis, size):
    def largest(x, axes):
        return {"max": jnp.max(x, axis=axes, keepdims=True)}

    split = (2, 256, -1, size) if axis == -1 else (2, -1, size, 512)
    expected = np.abs(X).reshape(split).max(axis)
    found = tile_order.reduce_in_tiles(largest, jnp.abs(X), axis, size)["max"]
    np.testing.assert_array_equal(found, expected)
    spread = tile_order.spread_in_tiles(found, axis, size)
    np.testing.assert_array_equal(spread, np.repeat(expected, size, axis))


def test_pieces_are_whole_tiles_and_groups():
    sharding = jax.typeof(jnp.zeros(8)).sharding

    def pieces(shape, axis, size):
        return tile_order.tile_pieces(shape, axis, size, sharding)

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
        ((64, 1024), -1, 32),  # small
        ((2**20,), -1, 32),
        ((2048, 64, 128), -3, 32),
    ):
        assert pieces(shape, axis, size) is None, (shape, axis, size)


QUANTIZERS = {
    "int4": cage.int4(group_size=32, axis=-1),
    "int4 of rows": cage.int4(group_size=32),
    "clipped": cage.int4(group_size=128, axis=-1, scale=scales.AbsMax(0.8)),
    "zero point": cage.int4(group_size=32, axis=-1, symmetric=False),
    "gaussian": cage.quest(4, group_size=64, axis=-1, hadamard=None),
    "gaussian of rows": cage.quest(4, group_size=128, hadamard=None),
    "mxfp4": cage.mxfp4(axis=-1),
    "nvfp4": cage.nvfp4(),
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


@pytest.mark.parametrize("name", ["int4", "int4 of rows"])
def test_explicit_shards_stay_where_they_are(forms, name):
    quantizer = QUANTIZERS[name]
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
ROWS, shape = cage.int4(group_size=32), (65536, 4096)
found = {f"{size}": moved(quantized(LAST[size]), shape) for size in LAST}
found["of rows"] = moved(quantized(ROWS), shape)
found["codes"] = moved(lambda x: cage.quantize(x, LAST[128]).codes, shape)
for name, quantizer in {"128": LAST[128], "32": LAST[32], "of rows": ROWS}.items():
    case = kernels.Case(quantizer, "step")
    found[f"step {name}"] = [kernels.counted(case, "v5e", "xla")["units"], 0]
for name, spec in {"rows": P("d", None), "columns": P(None, "d")}.items():
    found[f"split {name}"] = moved(quantized(LAST[32]), shape, spec=spec)
    found[f"split {name} of rows"] = moved(quantized(ROWS), shape, spec=spec)
found["cut"] = moved(quantized(LAST[32]), (65536, 4224), spec=P(None, "d"))
print(json.dumps(found))
"""


@needs_libtpu
def test_compiled_for_tpu_nothing_is_copied_or_sent():
    found = on([], SCRIPT)
    sent = {name: each[1] for name, each in found.items()}
    assert not any(sent.values()), sent
    units = {name: each[0] for name, each in found.items()}
    # Read twice and written once, or a step and once more; of each group a number is
    # padded to a whole row, or spread over the tiles of a group first.
    most = {"128": 3.05, "32": 3.2, "of rows": 3.6, "codes": 2.2}
    most |= {"step 128": 8.1, "step 32": 8.4, "step of rows": 8.6}
    for name in ("split rows", "split columns"):
        most |= {name: 3.3, f"{name} of rows": 3.6}
    assert {name for name in most if units[name] > most[name]} == set(), units
    # Shards that would cut a tile are left as they were.
    assert units["cut"] > 6
