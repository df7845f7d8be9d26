"""Calls of all writers of files, for codes of the small Llama."""

import jax
import jax.numpy as jnp
import pytest
from small_llama import CONFIG

import cage_jax as cage
from cage_jax.export import native
from cage_jax.llama.loaded import Model

# What every writer can hold.
RULES = cage.Rules([(r"layers/.*/kernel", cage.q4_0(axis=-2)), (r".*", None)])


def _native(codes, path, **options):
    native.save(Model(codes, CONFIG, {}), path, **options)


def _compressed_tensors(codes, path, **options):
    cage.export.compressed_tensors(codes, CONFIG, path, **options)


def _stablehlo(codes, path, **options):
    pytest.importorskip("flatbuffers", reason="a program is written with it")
    x = [jax.ShapeDtypeStruct((CONFIG.width,), jnp.float32)]
    cage.export.stablehlo(
        lambda params, x: x * params["norm"]["scale"],
        codes,
        path,
        arguments=x,
        **options,
    )


def _orbax(codes, path, **options):
    pytest.importorskip("orbax.checkpoint", reason="a folder is written with it")
    cage.export.save_orbax(codes, path, **options)


def _gguf(codes, path, **options):
    pytest.importorskip("gguf", reason="files of GGUF are written with it")
    cage.export.gguf(codes, CONFIG, path.with_suffix(".gguf"), **options)


def _save(codes, path, **options):
    cage.export.save(codes, path.with_suffix(".safetensors"), **options)


# Functions of codes, a path without an ending, and options.
WRITERS = {
    "native": _native,
    "compressed_tensors": _compressed_tensors,
    "stablehlo": _stablehlo,
    "orbax": _orbax,
    "gguf": _gguf,
    "save": _save,
}
