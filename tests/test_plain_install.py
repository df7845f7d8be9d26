"""Without any extra: files are written and read, and errors say which extra is missing.

All of it runs in a process in which the packages of the extras cannot be imported.
"""

import sys

from own_process import run

OF_EXTRAS = ["safetensors", "gguf", "flax", "orbax", "tokenizers", "flatbuffers"]
OF_EXTRAS += ["huggingface_hub", "qwix", "rich"]


def block_extras():
    assert "jax" not in sys.modules, "jax imports flatbuffers if it is there"
    sys.modules.update(dict.fromkeys(OF_EXTRAS))


def test_files_without_extras(tmp_path):
    run(files_without_extras, tmp_path)


def files_without_extras(folder):
    block_extras()
    import numpy as np
    from small_llama import CONFIG, on_host, with_kernels

    import cage_jax as cage
    from cage_jax.export import native
    from cage_jax.llama.loaded import Model

    values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    params = {"kernel": values, "bias": np.arange(8, dtype=np.int32)}
    codes = cage.quantize(params, cage.Rules([("kernel", cage.int3(group_size=32))]))
    cage.export.save(codes, folder / "codes.safetensors")
    found = cage.load(folder / "codes.safetensors").params
    kernel = codes["kernel"]
    assert found["kernel"].quantizer == kernel.quantizer
    np.testing.assert_array_equal(found["kernel"].codes, kernel.codes)
    np.testing.assert_array_equal(found["kernel"].scale, kernel.scale)
    np.testing.assert_array_equal(found["bias"], params["bias"])

    llama = on_host(with_kernels(cage.ct_w4a16(group_size=32)))
    native.save(Model(llama, CONFIG, {}), folder / "native")
    cage.export.compressed_tensors(llama, CONFIG, folder / "transformers")
    query = llama["layers"]["query"]["kernel"]
    for name in ("native", "transformers"):
        model = cage.load(folder / name)
        assert model.config == CONFIG
        again = model.params["layers"]["query"]["kernel"]
        np.testing.assert_array_equal(again.codes, query.codes)
        np.testing.assert_array_equal(again.scale, query.scale)


def test_errors_say_what_to_install(tmp_path):
    run(errors_without_extras, tmp_path)


def errors_without_extras(folder):
    block_extras()
    import importlib

    import jax.numpy as jnp
    import pytest
    from small_llama import CONFIG

    import cage_jax as cage
    from cage_jax._project import REPOSITORY
    from cage_jax.cli.main import main
    from cage_jax.export.text import tokenizer_of

    codes = {"w": jnp.ones(3)}
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    calls = {
        "flax": [
            lambda: importlib.import_module("cage_jax.flax"),
            lambda: cage.llama.Llama,
        ],
        "export": [
            lambda: cage.export.gguf(codes, CONFIG, folder / "out.gguf"),
            lambda: cage.export.save_orbax(codes, folder / "out"),
            lambda: cage.export.stablehlo(
                lambda x: x, codes, folder / "out", arguments=[]
            ),
            lambda: cage.load(folder / "model.gguf"),
            lambda: cage.load("someone/model"),
            lambda: tokenizer_of({"tokenizer.json": b"{}"}),
        ],
    }
    for extra, each in calls.items():
        for call in each:
            with pytest.raises(ImportError) as caught:
                call()
            assert (
                f'not installed. Run pip install "cage_jax[{extra}] @ git+{REPOSITORY}"'
                in str(caught.value)
            )
    assert main(["report", str(folder / "model.gguf")]) == 1


def test_the_package_can_be_inspected(tmp_path):
    run(inspected, tmp_path)


def inspected(folder):
    """`help` and `getmembers` pass over what cannot be imported, as `hasattr` does."""
    block_extras()
    import inspect
    import pydoc

    import pytest

    import cage_jax as cage

    assert not hasattr(cage, "flax") and hasattr(cage, "export")
    with pytest.raises(AttributeError, match=r"needs the package flax.* pip install"):
        _ = cage.flax
    with pytest.raises(ImportError, match=r"needs the package flax.* pip install"):
        from cage_jax import flax  # noqa: F401
    names = {name for name, _ in inspect.getmembers(cage)}
    assert "export" in names and "flax" not in names
    assert "fake_quant" in pydoc.render_doc(cage)
