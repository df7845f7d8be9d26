"""Trees of codes in one file and in a folder of Orbax: all bits, and hostile files."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNEL, PRESETS, QUANTIZERS, assert_raises, assert_same, random_codes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_llama import write_anew

import cage_jax as cage
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import trees
from cage_jax.export.files import MalformedFileError
from cage_jax.export.orbax_folders import save_orbax

safetensors = pytest.importorskip("safetensors.numpy", reason="the file's format")


@pytest.fixture
def x(rng):
    return rng.standard_normal(KERNEL).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "codes.safetensors"


def codes_of(quantizer, shape=KERNEL, dtype="float32"):
    """Draws codes, the same for each quantizer."""
    return random_codes(np.random.default_rng(0), quantizer, shape, dtype)


def save_and_load(codes, path):
    """Saves to a file or a folder, by the path's name, and loads again."""
    if path.suffix:
        trees.save(codes, path)
    else:
        pytest.importorskip("orbax.checkpoint", reason="it writes the folder")
        save_orbax(codes, path)
    return trees.load(path)


kinds = pytest.mark.parametrize("name", ["codes.safetensors", "codes"])


@kinds
def test_every_quantizer_bit_for_bit(name, tmp_path):
    codes = {key: codes_of(q) for key, q in (QUANTIZERS | PRESETS).items()}
    codes["bfloat16"] = codes_of(cage.int4(), dtype="bfloat16")
    codes["tiles"] = codes_of(cage.int8(axis=(-2, -1), group_size=(16, 8)))
    codes["rounded"] = cage.quantize(np.ones(KERNEL, np.float32), cage.int4())
    assert_same(save_and_load(codes, tmp_path / name), codes)


@kinds
def test_every_dtype_of_arrays(name, tmp_path):
    names = "float16 bfloat16 float32 float8_e4m3fn float8_e5m2 float8_e8m0fnu int8 "
    names += "int16 int32 uint8 uint16 uint32 bool"
    tree = {
        # e8m0 has no zero, which becomes NaN.
        each: (np.arange(6) + ("e8m0" in each)).astype(jnp.dtype(each)).reshape(2, 3)
        for each in names.split()
    }
    tree["jax"] = jnp.asarray(tree["float32"])
    tree["number"] = np.float32(3)
    assert_same(save_and_load(tree, tmp_path / name), tree)


@kinds
def test_dicts_and_lists_come_back(name, x, tmp_path):
    codes = codes_of(cage.nvfp4())
    tree = {
        "params": {"layers": [{"kernel": codes}, None, [], {"a": [codes]}], "a/b": x},
        "batch_stats": {"0": {"mean": x}},
        "none": None,
    }
    assert_same(save_and_load(tree, tmp_path / name), tree)
    # And a tree of one array.
    (tmp_path / "one").mkdir()
    found = save_and_load(codes, tmp_path / "one" / name)
    assert_same(found, codes)
    assert isinstance(found, QuantizedArray)
    assert found.nbytes == codes.nbytes


def test_trees_without_arrays(file):
    for tree in ({}, None, [[]], [None]):
        trees.save(tree, file, overwrite=True)
        assert trees.load(file) == tree
        with pytest.raises(ValueError, match="`codes` must contain an array; got none"):
            save_orbax(tree, file.with_suffix(""))


def test_a_state_of_nnx_comes_back_as_dicts(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    zeros = nnx.initializers.zeros_init()
    layers = (nnx.Linear(32, 32, rngs=nnx.Rngs(i), kernel_init=zeros) for i in range(2))
    model = nnx.Sequential(*layers)
    state = nnx.state(model)
    pure = nnx.to_pure_dict(state)
    for number, layer in pure["layers"].items():
        layer["kernel"] = codes_of(cage.int4(group_size=16 + 16 * number), (32, 32))
    codes = nnx.state(model)
    nnx.replace_by_pure_dict(codes, pure)
    for name in ("codes.safetensors", "codes"):
        found = save_and_load(codes, tmp_path / name)
        assert set(found) == set(pure) == {"layers"}
        for layer, part in pure["layers"].items():
            assert_same(found["layers"][str(layer)], dict(part))
    # And into the model again.
    values = cage.dequantize(found)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(values))
    nnx.update(model, state)
    kernel = values["layers"]["1"]["kernel"]
    np.testing.assert_array_equal(model.layers[1].kernel[...], kernel)


def test_variables_of_linen_come_back(x, tmp_path):
    flax = pytest.importorskip("flax")
    codes = {
        "params": {
            "Dense_0": {"kernel": codes_of(cage.int4(group_size=16)), "bias": x[0]},
            "BatchNorm_0": {"scale": x[1], "bias": x[2]},
        },
        "batch_stats": {"BatchNorm_0": {"mean": x[3], "var": x[4]}},
    }
    for name in ("codes.safetensors", "codes"):
        found = save_and_load(flax.core.freeze(codes), tmp_path / name)
        assert_same(found, codes)


def test_the_size_of_the_file(file):
    # The bits of scales of a group, and of a tensor, by hand.
    for quantizer, bits, of_group, group, of_tensor in [
        (cage.int4(group_size=32), 4, 32, 32, 0),
        (cage.int3(), 3, 32, 512, 0),
        (cage.int2(), 2, 32, 512, 0),
        (cage.ternary(), 2, 0, 1, 32),
        (cage.mxfp4(), 4, 8, 32, 0),
        (cage.nvfp4(), 4, 8, 16, 32),
        (cage.int8(), 8, 32, 512, 0),
        (cage.q4_1(), 4, 32, 32, 0),
    ]:
        codes = codes_of(quantizer, (512, 512))
        trees.save({"kernel": codes}, file, overwrite=True)
        expected = (bits * 512**2 + of_group * 512**2 / group + of_tensor) / 8
        assert expected <= file.stat().st_size < 1.02 * expected, quantizer


def test_safetensors_alone_reads_it(x, file):
    codes = codes_of(cage.int4(group_size=16))
    trees.save({"kernel": codes, "bias": x[0]}, file)
    found = safetensors.load_file(file)
    np.testing.assert_array_equal(found["bias"], x[0])
    data = found["kernel"]
    numbers = np.stack([data[:1024] & 15, data[:1024] >> 4], axis=1).reshape(64, 32)
    numbers = numbers.astype(np.int8)
    values = np.where(numbers > 7, numbers - 16, numbers)
    np.testing.assert_array_equal(values, np.int8(codes.codes))
    scale = data[1024:].view(np.float32).reshape(4, 32)
    np.testing.assert_array_equal(scale, codes.scale)


def test_orbax_alone_reads_it(x, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="it writes the folder")
    codes = codes_of(cage.int4(group_size=16))
    save_orbax({"layer": {"kernel": codes, "bias": x[0]}}, tmp_path / "codes")
    with ocp.StandardCheckpointer() as checkpointer:
        like = {
            "layer/kernel": {
                "codes": jax.ShapeDtypeStruct((64, 32), jnp.int4),
                "scale": jax.ShapeDtypeStruct((4, 32), jnp.float32),
            },
            "layer/bias": jax.ShapeDtypeStruct((32,), jnp.float32),
        }
        found = checkpointer.restore(tmp_path / "codes" / "arrays", like)
    np.testing.assert_array_equal(found["layer/kernel"]["codes"], codes.codes)
    np.testing.assert_array_equal(found["layer/bias"], x[0])


@kinds
def test_onto_devices(name, x, tmp_path):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    codes = {
        "layers": [
            {"kernel": codes_of(cage.int4(group_size=32)), "bias": x[0]},
            {"kernel": codes_of(cage.nvfp4())},
        ],
        "scale": x,
    }
    path = tmp_path / name
    save_and_load(codes, path)
    both, rows = P("rows", "columns"), P("rows")
    found = trees.load(path, shardings=NamedSharding(mesh, both))
    assert_same(found, codes)
    kernel, other = (layer["kernel"] for layer in found["layers"])
    assert kernel.codes.sharding.spec == both
    # Two groups along the first axis, which four devices do not divide.
    assert kernel.scale.sharding.spec == P(None, "columns")
    assert other.scale.sharding.spec == both
    assert other.tensor_divisor.sharding.spec == P(None, None)
    assert found["layers"][0]["bias"].sharding.spec == rows
    whole = NamedSharding(mesh, P())
    found = trees.load(
        path, shardings={"layers": whole, "scale": NamedSharding(mesh, rows)}
    )
    assert_same(found, codes)
    assert found["layers"][1]["kernel"].codes.sharding.spec == P()
    assert found["scale"].sharding.spec == rows
    # As the arrays of another tree are.
    found = trees.load(path, shardings=jax.tree.map(lambda x: x.sharding, found))
    assert found["scale"].sharding.spec == rows
    with pytest.raises(ValueError, match="layers"):
        trees.load(path, shardings={"scale": whole})


def test_sharded_codes_are_saved(tmp_path):
    mesh = jax.make_mesh((8,), ("rows",))
    codes = {"kernel": codes_of(cage.int8(axis=-1))}
    placed = jax.device_put(codes, NamedSharding(mesh, P("rows")))
    for name in ("codes.safetensors", "codes"):
        assert_same(save_and_load(placed, tmp_path / name), codes)


@kinds
def test_nothing_is_overwritten_unasked(name, tmp_path):
    path = tmp_path / name
    x = codes_of(cage.int4())
    save_and_load({"a": x}, path)
    save = trees.save if path.suffix else save_orbax
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save({"a": x, "b": x}, path)
    assert_same(trees.load(path), {"a": x})
    save({"b": x}, path, overwrite=True)
    assert_same(trees.load(path), {"b": x})
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_memory(file):
    for quantizer in (cage.int4(group_size=32), cage.int2()):
        codes = codes_of(quantizer, (2**11, 2**12))
        trees.save({"kernel": codes}, file, overwrite=True)
        tracemalloc.start()
        try:
            trees.load(file)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 10 * file.stat().st_size


# --- what cannot be saved -------------------------------------------------------------


def test_what_is_no_tree_of_codes(tmp_path):
    path, one = tmp_path / "codes.safetensors", np.ones(3)
    swapped = one.astype(one.dtype.newbyteorder())
    assert_raises(
        (lambda save=save, tree=tree: save(tree, path), error, text)
        for save in (trees.save, save_orbax)
        for tree, error, text in [
            ({"a": [1.0]}, TypeError, "`a/0`: `codes` must be .*; got float"),
            ({"a": "text"}, TypeError, "`a`: .*got str"),
            ({"a": swapped}, ValueError, "`a`: .*byte order.*f8. Use array.astype"),
            ({"a": jax.random.key(0)}, TypeError, "`a`: .*got key<fry>"),
            ({"a": one.astype(jnp.int4)}, TypeError, "`a`: .*got int4"),
            ({"a": one.astype(complex)}, TypeError, "`a`: .*got complex128"),
            ({"a/b": one, "a": {"b": one}}, ValueError, "`a/b`: .*got two"),
        ]
    )
    assert not list(tmp_path.iterdir())


def test_stacked_codes_of_another_axis(file):
    layers = [codes_of(cage.int4(axis=0))] * 2
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *layers)
    with pytest.raises(
        ValueError, match=r"`a`: `scale` must be .*\(1, 64, 32\) for its quant"
    ):
        trees.save({"a": stacked}, file)


def test_other_refusals(x, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in \.safetensors"):
        trees.save({"a": x}, tmp_path / "codes.npz")
    with pytest.raises(ValueError, match=r"`a`: .* Orbax; got shape \(0, 32\)"):
        save_orbax({"a": x[:0]}, tmp_path / "codes")
    with pytest.raises(FileNotFoundError):
        trees.load(tmp_path / "none.safetensors")
    deep = x
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="at most 64 keys; got 100"):
        trees.save(deep, tmp_path / "codes.safetensors")


def test_float64_needs_x64(file):
    with jax.enable_x64(True):
        codes = {"a": codes_of(cage.int4(), dtype="float64")}
        trees.save(codes, file)
        assert_same(trees.load(file), codes)
    with pytest.raises(ValueError, match=r"`a`: .* 64 bits .* Set JAX_ENABLE_X64=1"):
        trees.load(file)


# --- hostile files --------------------------------------------------------------------


def rewritten(path, arrays=None, metadata=None, **entries):
    """The file with other entries of its tree."""
    with safetensors.safe_open(str(path), "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = file.metadata()
    tree = json.loads(texts["tree"])
    for name, change in entries.items():
        tree[name] = change(tree[name]) if callable(change) else change
    texts = texts | {"tree": json.dumps(tree)} | (metadata or {})
    write_anew(path, safetensors.save(arrays or found, texts))


def test_files_without_a_named_axis(file):
    """Older files left the axis -2 out, and gave a stack one scale for axis=None."""
    new = cage.int4(axis=-2, group_size=32), cage.int8(axis=(-3, -2, -1))
    codes = {"a": codes_of(new[0]), "b": codes_of(new[1], (3, 4, 8))}
    trees.save(codes, file)
    tree = json.loads(safetensors.safe_open(str(file), "np").metadata()["tree"])
    old = [dict(tree[name]["quantizer"]) for name in "ab"]
    assert old[0].pop("axis") == -2
    rewritten(
        file, a=entry(quantizer=old[0]), b=entry(quantizer=old[1] | {"axis": None})
    )
    assert_same(trees.load(file), codes)


def entry(**fields):
    return lambda before: before | fields


@pytest.fixture
def saved(x, file):
    """The content of a small file."""
    trees.save({"kernel": codes_of(cage.int4(group_size=32)), "bias": x[0]}, file)
    return file.read_bytes()


def test_malformed(saved, file):
    for changes, message in [
        ({"metadata": {"version": "2"}}, "got '2': written by a newer version"),
        ({"metadata": {"format": "pt"}}, "must be written by cage_jax.export.save"),
        ({"metadata": {"tree": ""}}, "must be JSON"),
        ({"metadata": {"tree": "[" * 100_000}}, "must be JSON"),
        ({"metadata": {"tree": "[]"}}, "must be an object; got list"),
        ({"metadata": {"tree": "{}"}}, "must have the arrays of its tree"),
        ({"kernel": 3}, "`kernel`: its entry must be an object"),
        ({"kernel": entry(kind="script")}, "`kind` must be one of"),
        ({"kernel": entry(kind=["codes"])}, "`kind` must be one of"),
        (
            {"kernel": entry(kind="array")},
            "got {'quantizer'}: damaged, or written by a",
        ),
        ({"kernel": entry(kind="none")}, "must have the arrays of its tree"),
        ({"kernel": entry(tiles=8)}, "got {'tiles'}: damaged, or written by a newer"),
        ({"kernel": entry(shape=[64, 33])}, "int4 .* must be uint8 of shape|must be"),
        ({"kernel": entry(shape=[48, 32])}, "`kernel`: `group_size` must divide"),
        ({"kernel": entry(shape=[64])}, "`kernel`: `axis` must be within"),
        ({"kernel": entry(shape=[2**40, 32])}, "must be uint8 of shape"),
        ({"kernel": entry(shape=[2**60, 2**60])}, "`shape` must be a list of lengths"),
        ({"kernel": entry(shape=[0, 2**62])}, "`shape` must be a list of lengths"),
        ({"kernel": entry(shape=[1] * 1000)}, "`shape` must be a list of lengths"),
        ({"kernel": entry(shape=[-64, -32])}, "`shape` must be a list of lengths"),
        ({"kernel": entry(shape=[64.0, 32])}, "`shape` must be a list of lengths"),
        ({"kernel": entry(shape="64")}, "`shape` must be a list of lengths"),
        ({"kernel": entry(dtype="float128")}, "`dtype` must be one of"),
        ({"kernel": entry(dtype="O")}, "`dtype` must be one of"),
        ({"kernel": entry(dtype="int32")}, "`dtype` must be one of floats"),
        ({"kernel": entry(quantizer=None)}, "`kernel`: the description of a Quantizer"),
        ({"kernel": entry(quantizer={"class": "eval"})}, "newer version"),
        (
            {"kernel": entry(keys=["kernel", "a"])},
            "its `keys` must be those of the path",
        ),
        ({"kernel": entry(keys="kernel")}, "its `keys` must be those of the path"),
        ({"kernel": entry(keys=[["kernel"]])}, "its `keys` must be those of the path"),
        (
            {"-1": {"kind": "none", "keys": [-1]}},
            "its `keys` must be those of the path",
        ),
        ({"bias": entry(shape=[31])}, "it must be float32 of shape"),
        ({"bias": entry(dtype="int32")}, "it must be int32 of shape"),
        ({"kernel/a": {"kind": "none"}}, "an array cannot contain another array"),
        ({"3": {"kind": "none", "keys": [3]}}, "a list must have an item for each"),
        ({str(2**60): {"kind": "none", "keys": [2**60]}}, "a list must have an item"),
        ({"a/" * 99: {"kind": "none"}}, "those of the path, at most 64"),
        ({"arrays": {"kernel": np.zeros(9)}}, "must have the arrays of its tree"),
    ]:
        write_anew(file, saved)
        rewritten(file, **changes)
        with pytest.raises(MalformedFileError, match=message) as caught:
            trees.load(file)
            pytest.fail(message)
        assert len(str(caught.value)) < 2000


def test_damaged_bytes(saved, file, rng):
    content = saved
    header = 8 + int.from_bytes(content[:8], "little")
    for cut in [0, 1, 7, 8, 9, header // 2, header, len(content) - 1]:
        write_anew(file, content[:cut])
        with pytest.raises(MalformedFileError):
            trees.load(file)
    kept = 0
    for place in range(header):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        write_anew(file, damaged)
        try:
            trees.load(file)
        except MalformedFileError:
            continue
        kept += 1  # such as a digit of a number that is a default
    assert kept < header / 4


def test_a_damaged_folder(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="it writes the folder")
    codes = {"kernel": codes_of(cage.int4(group_size=32))}
    path = tmp_path / "codes"
    save_orbax(codes, path)
    description = path / "description" / "metadata"
    text = description.read_text()
    for changed, message in [
        (text.replace('"1"', '"2"'), "newer version"),
        (text.replace("[64, 32]", "[32, 32]"), "must be a complete folder"),
        (text.replace("[64, 32]", "[274877906944, 32]"), "must be a complete folder"),
        (text.replace('"bits": 4', '"bits": 8'), "arrays that do not match its"),
        (text.replace('"kernel"', '"query"'), "arrays that do not match its"),
        (text[:-9], "must be a complete folder"),
        ("[" * 100_000, "must be a complete folder"),
        ("[]", "must be written by cage_jax"),
        ("{}", "must be written by cage_jax"),
    ]:
        assert changed != text
        description.write_text(changed)
        with pytest.raises(MalformedFileError, match=message):
            trees.load(path)
    description.write_text(text)
    assert_same(trees.load(path), codes)
    with pytest.raises(MalformedFileError, match="must be a complete folder"):
        trees.load(tmp_path)
