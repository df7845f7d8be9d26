"""GGUF files that are cut off, damaged, made to do harm or of other models."""

import struct

import pytest
from small_llama import (
    CONFIG,
    on_host,
    params_of,
    with_codes,
    with_kernels,
    write_anew,
)
from small_tokenizer import split_tokenizer

import cage_jax as cage
from cage_jax.export.files import MalformedFileError
from cage_jax.export.gguf import gguf, read
from cage_jax.export.gguf_files import read_content

pytest.importorskip("gguf", reason="needs the extra oracles")
pytest.importorskip("tokenizers", reason="needs the extra demo")

import gguf as ggml
from small_gguf import rewritten


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The bytes of a file of Q4_1 with a tokenizer."""
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    codes = with_kernels(cage.q4_1())
    codes = with_codes(codes, "embedding/embedding", cage.q4_1(axis=-1))
    gguf(on_host(codes), CONFIG, path, tokenizer=split_tokenizer())
    return path.read_bytes()


def refuses(content, tmp_path, text="must"):
    path = tmp_path / "model.gguf"
    write_anew(path, content)
    with pytest.raises(MalformedFileError, match=text) as caught:
        read(path)
        pytest.fail(text)
    assert len(str(caught.value)) < 1000


def test_files_that_are_cut_off(small_file, tmp_path, rng):
    for size in [*range(40), *rng.integers(40, len(small_file) - 32, 60)]:
        refuses(small_file[:size], tmp_path)
    # The last byte of the last tensor is needed, and what pads it is not.
    write_anew(tmp_path / "model.gguf", small_file)
    last = ggml.GGUFReader(tmp_path / "model.gguf").tensors[-1]
    end = int(last.data_offset + last.n_bytes)
    refuses(small_file[: end - 1], tmp_path, "bytes or more")
    write_anew(tmp_path / "model.gguf", small_file[:end])
    assert read(tmp_path / "model.gguf").config == CONFIG


def test_flipped_bits_never_do_more_than_change_a_number(small_file, tmp_path, rng):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file)
    stored = read_content(path).tensors.values()
    begin = len(small_file) - sum(len(each.data) for each in stored)
    refused = 0
    for place in rng.integers(0, 8 * begin, 150):
        content = bytearray(small_file)
        content[place // 8] ^= 1 << (place % 8)
        write_anew(path, content)
        try:
            read(path)
        except MalformedFileError:
            refused += 1
    assert 0 < refused < 150


def replaced(content, key, old, new):
    """A file in which what follows a key is other bytes, of the same length."""
    place = content.index(key.encode()) + len(key)
    assert content[place : place + len(old)] == old, content[place : place + 16]
    return content[:place] + new + content[place + len(old) :]


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def test_counts_and_lengths_that_cannot_be(small_file, tmp_path):
    for huge in (2**17, 2**31, 2**40, 2**63, 2**64 - 1):
        refuses_counts(huge, small_file, tmp_path)


def refuses_counts(huge, small_file, tmp_path):
    for place in (8, 16):  # of the tensors, of the keys
        content = small_file[:place] + u64(huge) + small_file[place + 8 :]
        refuses(content, tmp_path, "at most 65536")
    refuses(small_file[:24] + u64(huge) + small_file[32:], tmp_path, "bytes")
    of_texts, of_ints = u32(9) + u32(8) + u64(320), u32(9) + u32(5) + u64(320)
    for key, old in {"ggml.tokens": of_texts, "ggml.token_type": of_ints}.items():
        content = replaced(small_file, key, old, old[:8] + u64(huge))
        refuses(content, tmp_path, "bytes or more")
    first = "token_embd.weight"
    for axis in range(2):
        old = u32(2) + u64(64) + u64(320)
        new = u32(2) + (u64(huge) + u64(320) if axis else u64(64) + u64(huge))
        refuses(replaced(small_file, first, old, new), tmp_path, "must have")
    old = u32(2) + u64(64) + u64(320) + u32(3) + u64(0)
    content = replaced(small_file, first, old, old[:-8] + u64(huge))
    refuses(content, tmp_path, "right after")
    token = u64(len("<|im_start|>")) + b"<|im_start|>" + u64(1)
    assert small_file.count(token) == 1
    content = small_file.replace(token, u64(huge) + token[8:])
    refuses(content, tmp_path, "bytes or more")


def test_numbers_that_are_no_model(small_file, tmp_path):
    for key, old, new, text in [
        ("llama.block_count", 2, 2**12, "have 36867 tensors"),
        ("llama.block_count", 2, 2**24, "`llama.block_count` must be from 1 to 4096"),
        (
            "llama.block_count",
            2,
            0,
            "`llama.block_count` must be from 1 to 4096; got 0",
        ),
        ("llama.block_count", 2, 3, "have 30 tensors .* got 21"),
        ("llama.embedding_length", 64, 2**24, r"have the shape \(320, 16777216\)"),
        ("llama.attention.head_count_kv", 2, 4, "have the shape"),
        ("llama.attention.value_length", 32, 8, "value_length 32; got 8"),
        ("tokenizer.ggml.bos_token_id", 1, 2**32 - 1, "a token below 320"),
    ]:
        content = replaced(small_file, key, u32(4) + u32(old), u32(4) + u32(new))
        refuses(content, tmp_path, text)


def test_other_things_that_are_no_file_of_ours(small_file, tmp_path):
    refuses(b"", tmp_path, "have a header; got an empty file")
    refuses(b"GGML" + small_file[4:], tmp_path, "begin with b'GGUF'")
    refuses(small_file[:4] + u32(1) + small_file[8:], tmp_path, "of a version among")
    big = struct.pack(">I", 3)
    refuses(small_file[:4] + big + small_file[8:], tmp_path, "little-endian")
    content = small_file.replace(b"llama.block_count", b"llama.block_c\xffunt")
    refuses(content, tmp_path, "texts in UTF-8")
    content = small_file.replace(b"llama.block_count", b"llama.vocab_sizes")
    refuses(content, tmp_path, "llama.block_count; got none")
    content = small_file.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight")
    refuses(content, tmp_path, "each tensor once")
    content = small_file.replace(b"blk.1.attn_q.weight", b"blk.2.attn_q.weight")
    refuses(content, tmp_path, "have blk.1.attn_q.weight; got none")
    old, new = u32(8) + u64(5) + b"llama", u32(9) + u32(0) + u64(1) + b"!"
    content = replaced(small_file, "general.architecture", old, new)
    refuses(content, tmp_path, r"general.architecture 'llama'; got array\(")
    old = u32(2) + u64(64) + u64(320) + u32(3)
    for new, text in {
        old[:-4] + u32(77): "a known type for 'token_embd.weight'; got type 77",
        u32(2) + u64(65) + old[12:]: "rows of whole blocks of 32",
        u32(2) + u64(64) + u64(0) + u32(3): "rows of whole blocks of 32",
        u32(5) + old[4:]: "1 to 4 axes",
    }.items():
        refuses(replaced(small_file, "token_embd.weight", old, new), tmp_path, text)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.gguf")


def test_models_that_are_not_here(tmp_path):
    plain, new = tmp_path / "plain.gguf", tmp_path / "other.gguf"
    gguf(on_host(params_of()), CONFIG, plain)
    for key, value, kind, text in [
        ("llama.rope.scaling.type", "yarn", "STRING", "rope.scaling.type none; got 'y"),
        ("llama.rope.scaling.factor", 8.0, "FLOAT32", "rope.scaling.factor 0; got 8"),
        ("llama.expert_count", 8, "UINT32", "expert_count 0; got 8"),
        ("llama.expert_count", [8, 8], "ARRAY", r"expert_count 0; got array\("),
        (
            "llama.block_count",
            [8, 8],
            "ARRAY",
            r"`llama.block_count` must be an int; got array",
        ),
        (
            "llama.rope.freq_base",
            1e300,
            "FLOAT64",
            "`llama.rope.freq_base` must be at l",
        ),
        ("general.alignment", 3, "UINT32", "power of two as general.alignment; got 3"),
        ("split.count", 2, "UINT16", "whole model; got one of 2 parts. Merge them"),
    ]:
        metadata = [(key, value, ggml.GGUFValueType[kind])]
        rewritten(plain, new, lambda _, data: (data, None), metadata)
        refuses(new.read_bytes(), tmp_path, text)
    # A plain file with a key of the package gguf: read, or refused by name.
    keys = {
        key.format(arch="llama", dense="dense")
        for part in vars(ggml.Keys).values()
        for key in (vars(part).values() if isinstance(part, type) else ())
        if isinstance(key, str) and key.startswith("{arch}.")
    }
    metadata = ggml.GGUFReader(plain).fields.keys()
    for key in keys - metadata:
        kind = ggml.GGUFValueType.FLOAT32
        rewritten(plain, new, lambda _, data: (data, None), [(key, 0.7, kind)])
        refuses(
            new.read_bytes(), tmp_path, f"have {key} |to compute a Llama; got {key}"
        )
    content = plain.read_bytes()
    content = content.replace(b"blk.1.ffn_norm.weight", b"blk.1.attn_norm.biase")
    refuses(content, tmp_path, "have blk.1.ffn_norm.weight; got none")


def test_tokenizers_that_do_not_fit_together(small_file, tmp_path):
    for old, new, text in [
        (
            u64(1) + b"a" + u64(1) + b"b",
            u64(1) + b"a" + u64(1) + b"a",
            "each token onc",
        ),
        (u64(4) + "Ġ w".encode(), u64(4) + "Ġw ".encode(), "merges of two tokens"),
        (u64(4) + "Ġ w".encode(), u64(4) + b"q xz", "merges of two tokens"),
        (u64(4) + "Ġ w".encode(), u64(4) + b"  aa", "merges of two tokens"),
        (b"add_bos_token" + u32(7), b"add_bos_token" + u32(0), "a bool as tokenizer"),
    ]:
        assert small_file.count(old) == 1, old
        refuses(small_file.replace(old, new), tmp_path, text)


def test_tokenizers_of_other_kinds_are_left_out(small_file, tmp_path):
    content = replaced(
        small_file,
        "tokenizer.ggml.model",
        u32(8) + u64(4) + b"gpt2",
        u32(8) + u64(4) + b"bert",
    )
    write_anew(tmp_path / "model.gguf", content)
    assert read(tmp_path / "model.gguf").tokenizer == {}
