"""NaN and infinities are in nothing that is written or judged."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from all_writers import RULES, WRITERS
from small_llama import CONFIG, params_of, with_leaf

import cage_jax as cage
from cage_jax.core.finite import check_finite, not_finite
from cage_jax.llama.tensors import by_path

NAN, ENDLESS = float("nan"), float("inf")
KERNEL = "layers/up/kernel"


def with_value(path, value, dtype=jnp.float32):
    """The parameters with one value in one of them."""
    array = np.array(by_path(params_of())[path])
    array.flat[3] = value
    return with_leaf(params_of(), path, jnp.asarray(array, dtype))


def with_part(codes, name, value):
    kernel = by_path(codes)[KERNEL]
    part = np.array(getattr(kernel, name))
    part.flat[-1] = value  # of the last layer
    return with_leaf(codes, KERNEL, dataclasses.replace(kernel, **{name: part}))


def cases():
    """Trees that are not finite, with the parameter and the part that is to blame."""
    codes = cage.quantize(params_of(), RULES)
    for value in (NAN, ENDLESS, -ENDLESS):
        for dtype in (jnp.float32, jnp.bfloat16):
            norm = with_value("norm/scale", value, dtype)
            yield cage.quantize(norm, RULES), "norm/scale", "values"
            kernel = with_value(KERNEL, value, dtype)
            yield cage.quantize(kernel, RULES), KERNEL, "scales"
        yield with_part(codes, "scale", value), KERNEL, "scales"


@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_writes_them(tmp_path, writer):
    for tree, path, part in cases():
        # Writers of a Llama may name the layer.
        name = path.replace("layers/", r"layers/(\d/)?")
        text = rf"^`{name}`: `\w+` must have finite {part}; got NaN or infinity in \d+ "
        with pytest.raises(ValueError, match=text):
            WRITERS[writer](tree, tmp_path / "a")
        assert not list(tmp_path.iterdir())


def test_codes_that_are_no_numbers(tmp_path):
    rules = cage.Rules([(r"layers/.*/kernel", cage.fp8(axis=-2)), (r".*", None)])
    tree = with_part(cage.quantize(params_of(), rules), "codes", NAN)
    for writer in ("native", "compressed_tensors", "save"):
        with pytest.raises(ValueError, match=r"up/kernel`: .* must have finite codes"):
            WRITERS[writer](tree, tmp_path / "a")
        assert not list(tmp_path.iterdir())


def test_all_parts_are_looked_at():
    x = jnp.linspace(-1.0, 2.0, 64).reshape(32, 2)
    for quantizer, part in (
        (cage.q4_1(), "offset"),
        (cage.nvfp4(), "tensor_divisor"),
        (cage.fp8(), "codes"),
    ):
        codes = cage.quantize(x, quantizer)
        assert not not_finite(codes)
        wrong = jnp.full_like(getattr(codes, part), NAN)
        codes = dataclasses.replace(codes, **{part: wrong})
        assert sum(not_finite(codes).values()) == wrong.size


def test_the_error_names_the_parameters_and_counts():
    leaves = {name: np.array([1.0, value]) for name, value in zip("abc", (NAN, 0, NAN))}
    with pytest.raises(
        ValueError, match=r"^`a`: `params` .* in 1 places; also c\. Look"
    ):
        check_finite(leaves, "params")
    check_finite({"b": leaves["b"], "large": np.array([1e300]), "n": np.arange(3)})


def test_perplexity_is_a_number_or_an_error():
    pytest.importorskip("flax", reason="the model needs flax")
    from cage_jax.llama.perplexity import perplexity

    for dtype in (jnp.float32, jnp.bfloat16):
        params = with_value(KERNEL, NAN, dtype)
        with pytest.raises(
            ValueError, match=r"^`layers/up/kernel`: `params` must have"
        ):
            perplexity(params, np.arange(8), CONFIG)
    params = with_leaf(params_of(), "norm/scale", jnp.full([CONFIG.width], 1e38))
    with pytest.raises(ValueError, match=r"`params` must give finite logits"):
        perplexity(params, np.arange(8), CONFIG)
