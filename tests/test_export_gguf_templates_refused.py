"""What a GGUF as template refuses: codes that do not fit, and files of harm."""

import dataclasses

import numpy as np
import pytest
from cases import assert_raises, random_codes
from small_llama import CONFIG, params_of, write_anew

import cage_jax as cage
from cage_jax import export
from cage_jax.export import TensorName
from cage_jax.export.files import MalformedFileError
from cage_jax.export.gguf import gguf

pytest.importorskip("gguf", reason="needs the extra oracles")

import gguf as ggml
from small_gguf import file_of

Q8_0 = cage.q8_0(axis=-1)


@pytest.fixture
def template(tmp_path, rng):
    return file_of(tmp_path / "template.gguf", rng)


def test_wrong_codes(template, rng, tmp_path):
    weights = export.read_tensors(template)

    def write(changes=(), **options):
        given = weights | dict(changes)
        given = {name: leaf for name, leaf in given.items() if leaf is not None}
        gguf(given, template, tmp_path / "out.gguf", **options)

    def coded(name, quantizer, shape=None):
        shape = weights[name].shape if shape is None else shape
        return {name: random_codes(rng, quantizer, shape)}

    up, norm = "blk.0.ffn_up.weight", "blk.0.attn_norm.weight"
    line = TensorName("ours", up)
    assert_raises(
        [
            (
                lambda: write({up: None, norm: None}),
                ValueError,
                r"attn_norm.weight` \[64\] of the template: no parameter.*ffn_up",
            ),
            (
                lambda: write({"x": weights[up]}),
                ValueError,
                "`x`: no tensor of the template",
            ),
            (
                lambda: write({"ours": weights[up]}, names=[line]),
                ValueError,
                r"`blk.0.ffn_up.weight` \[40, 64\] and `ours` \[40, 64\]: for",
            ),
            (
                lambda: write({up: weights["output.weight"]}),
                ValueError,
                r"`blk.0.ffn_up.weight` \[11, 64\]: for .* \[40, 64\] of the template",
            ),
            (
                lambda: write(coded(up, cage.q4_0(axis=-2), (64, 64))),
                ValueError,
                r"\[64, 64\]: for",
            ),
            (
                lambda: write(
                    coded("blk.0.ffn_up_exps.weight", cage.q4_0(axis=0), (32, 8, 64))
                ),
                ValueError,
                r"\[32, 8, 64\]: for",
            ),
            (
                lambda: write(
                    coded("blk.0.ffn_down.weight", cage.int4(axis=-2))
                    | coded(up, cage.int4(axis=-1, group_size=16))
                ),
                ValueError,
                "ffn_down.weight`: int4.*Use axis=-1.*ffn_up.*mxfp4, or leave",
            ),
            (
                lambda: write(coded(up, cage.int4(axis=-1, group_size=32))),
                ValueError,
                "GGUF does not hold",
            ),
            (
                lambda: write(coded(up, cage.q4_0(axis=-1), None) | {norm: 1.0}),
                TypeError,
                "must be arrays",
            ),
            (
                lambda: write(
                    coded(up, dataclasses.replace(cage.q4_0(axis=-1), hadamard=32))
                ),
                ValueError,
                "rotation",
            ),
            (
                lambda: write(coded(norm, Q8_0)),
                ValueError,
                "only matrices of products",
            ),
            (
                lambda: write(coded("blk.0.ffn_gate_inp.weight", Q8_0)),
                ValueError,
                "only matrices of products",
            ),
            (
                lambda: write({up: np.zeros((40, 64), np.int32)}),
                ValueError,
                "int32, for float16",
            ),
            (
                lambda: write({up: np.full((40, 64), 1e6, np.float32)}),
                ValueError,
                "`blk.0.ffn_up.weight`: `dtype` must hold the values; got 'float16'",
            ),
            (
                lambda: write({norm: np.full(64, np.nan, np.float32)}),
                ValueError,
                "`blk.0.attn_norm.weight`: `codes` must have finite values",
            ),
            (lambda: write(names="tunix"), ValueError, "Use one of .*transformers"),
            (lambda: write(name="x"), ValueError, "`name` must be None"),
            (lambda: write(tokenizer={}), ValueError, "`tokenizer` must be None"),
            (
                lambda: write(float_dtype="float32"),
                ValueError,
                "`float_dtype` must be None",
            ),
            (
                lambda: gguf(params_of(), CONFIG, tmp_path / "out.gguf", names=[]),
                ValueError,
                "`names` must be None with a LlamaConfig",
            ),
        ]
    )
    assert not (tmp_path / "out.gguf").exists()


def test_wrong_templates(template, rng, tmp_path):
    weights = {name: np.array(x) for name, x in export.read_tensors(template).items()}
    content = template.read_bytes()

    def write(file=template):
        gguf(weights, file, tmp_path / "out.gguf")

    def with_bytes(content):
        write_anew(tmp_path / "bad.gguf", content)
        write(tmp_path / "bad.gguf")

    end = max(
        int(tensor.data_offset + tensor.n_bytes)
        for tensor in ggml.GGUFReader(template).tensors
    )
    part = file_of(tmp_path / "part.gguf", rng, split_DOT_count=2)
    # An alignment that would take all memory.
    none = file_of(tmp_path / "none.gguf", rng, {}, general_DOT_alignment=2**31)
    assert_raises(
        [
            (
                lambda: write("Qwen/Qwen2"),
                FileNotFoundError,
                "'Qwen/Qwen2', which does",
            ),
            (lambda: write(none), MalformedFileError, "must have tensors"),
            (lambda: export.read_tensors("Qwen/Qwen2"), FileNotFoundError, ""),
            (lambda: write(tmp_path), ValueError, "a folder. Make one of it"),
            (lambda: write(part), ValueError, "a part of one. Merge all"),
            (lambda: with_bytes(content[: end - 1]), MalformedFileError, "or more"),
            (lambda: with_bytes(b"GGML" + content[4:]), MalformedFileError, "begin wi"),
            (lambda: with_bytes(b""), MalformedFileError, "an empty file"),
            (
                lambda: with_bytes(content.replace(b"output.weight", b"output.weighs")),
                ValueError,
                "`output.weight`: no tensor of the template",
            ),
        ]
    )
    assert not (tmp_path / "out.gguf").exists()


def test_damaged_templates(template, rng, tmp_path):
    weights = {name: np.array(x) for name, x in export.read_tensors(template).items()}
    content, refused = template.read_bytes(), 0
    begin = min(int(tensor.data_offset) for tensor in ggml.GGUFReader(template).tensors)
    for place in rng.integers(0, 8 * begin, 100):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        write_anew(tmp_path / "bad.gguf", damaged)
        try:
            gguf(weights, tmp_path / "bad.gguf", tmp_path / "out.gguf")
            (tmp_path / "out.gguf").unlink()
        except ValueError:
            refused += 1
            assert not (tmp_path / "out.gguf").exists()
    assert 0 < refused < 100
