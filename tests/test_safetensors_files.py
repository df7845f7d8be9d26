"""safetensors against the library itself, and against files made to do harm."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the library that writes the files")

from cage_jax.export.files import MalformedFileError
from cage_jax.export.safetensors_files import read, write

# The names of dtypes in files.
NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
    **{"float8_e8m0fnu": "F8_E8M0", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
}


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.fixture
def arrays(rng):
    found = {
        name: rng.integers(0, 2, (3, 4)).astype(np.float32).astype(jnp.dtype(name))
        for name in NAMES
    }
    return found | {
        "transposed": rng.normal(size=(3, 4)).T,
        "scalar": np.asarray(np.float32(3)),
        "nothing": np.zeros((0, 5), np.int8),
    }


def test_the_library_reads_what_is_written(arrays, tmp_path):
    import safetensors

    write(tmp_path / "file", arrays, {"format": "pt"})
    with safetensors.safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == {"format": "pt"}
    found = dict(safetensors.deserialize((tmp_path / "file").read_bytes()))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name]["dtype"] == NAMES[array.dtype.name]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


def test_what_the_library_writes_is_read(arrays, tmp_path):
    from safetensors.numpy import save_file

    plain = {
        name: np.ascontiguousarray(array)
        for name, array in arrays.items()
        if not name.startswith(("bfloat", "float8"))
    }
    save_file(plain, tmp_path / "file", {"by": "another"})
    found, metadata = read(tmp_path / "file")
    assert metadata == {"by": "another"}
    assert set(found) == set(plain)
    for name, array in plain.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


def test_every_dtype_there_and_back(arrays, tmp_path):
    write(tmp_path / "file", arrays)
    found, metadata = read(tmp_path / "file")
    assert metadata == {}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(bits(found[name]), bits(array))


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(TypeError, match=r"`codes`: .*got int4\. Pack"):
        write(tmp_path / "file", {"codes": np.zeros(3).astype(jnp.int4)})


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":%s}'
HOSTILE = {
    "nothing": b"",
    "a length alone": struct.pack("<Q", 2),
    "a huge header": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "a header of many tensors": file_of({f"{i}": entry() for i in range(80_000)}),
    "no JSON": file_of(b"{"),
    "no object": file_of(b"[]"),
    "deep JSON": file_of(b"[" * 100_000),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "a list for an object": file_of(b'{"a":["F32",[1],[0,4]]}', b"1234"),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "metadata of a list": file_of({"__metadata__": []}),
    "half a character": file_of({"\ud800": entry()}, b"1234"),
    "an unknown dtype": file_of({"a": entry("F31")}, b"1234"),
    "a dtype without whole bytes": file_of({"a": entry("F4", [2], [0, 1])}, b"1"),
    "a complex dtype": file_of({"a": entry("C64", [1], [0, 8])}, b"12345678"),
    "a negative size": file_of({"a": entry(shape=[-1])}, b"1234"),
    "sizes that overflow": file_of({"a": entry(shape=[2**33, 2**33])}, b"1234"),
    "a huge size beside 0": file_of({"a": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "huge sizes and 0": file_of({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}),
    "many dimensions": file_of({"a": entry("U8", [1] * 65, [0, 1])}, b"1"),
    "a shape of other size": file_of({"a": entry(shape=[2])}, b"1234"),
    "an end before the begin": file_of({"a": entry(offsets=[4, 0])}, b"1234"),
    "offsets beyond the file": file_of({"a": entry(offsets=[0, 4])}, b"12"),
    "huge offsets": file_of({"a": entry(offsets=[0, 2**64])}, b"1234"),
    "a gap": file_of({"a": entry(offsets=[4, 8])}, b"12345678"),
    "an overlap": file_of({"a": entry(), "b": entry()}, b"1234"),
    "bytes of nothing": file_of({"a": entry()}, b"12345678"),
    "another of that name": file_of(
        TWICE % b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b"1234"
    ),
}


def test_files_made_to_do_harm(tmp_path):
    for what, content in HOSTILE.items():
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(MalformedFileError, match="file"):
            read(tmp_path / "file")
            pytest.fail(what)


def test_damage_is_seen_or_is_in_the_numbers(arrays, tmp_path, rng):
    import safetensors

    write(tmp_path / "file", arrays, {"a": "text"})
    whole = (tmp_path / "file").read_bytes()
    refused = 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(1000):
        damaged = bytearray(whole)
        if rng.integers(5):
            end = len(whole) if rng.integers(2) else header
            damaged[rng.integers(end)] ^= 1 << rng.integers(8)
        else:
            del damaged[rng.integers(len(whole)) :]
        (tmp_path / "file").write_bytes(damaged)
        try:
            found, _ = read(tmp_path / "file")
        except MalformedFileError as error:
            refused += 1
            if "with dtypes of" not in str(error):
                with pytest.raises(safetensors.SafetensorError):
                    safetensors.deserialize(bytes(damaged))
        else:
            theirs = dict(safetensors.deserialize(bytes(damaged)))
            assert theirs.keys() == found.keys()
            for name, array in found.items():
                assert NAMES[array.dtype.name] == theirs[name]["dtype"]
                assert tuple(theirs[name]["shape"]) == array.shape
                assert bytes(theirs[name]["data"]) == array.tobytes()
    assert 400 < refused < 900
