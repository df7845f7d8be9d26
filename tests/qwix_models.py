"""Models and rules of qwix for the tests of `cage_jax.qwix`."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

qwix = pytest.importorskip("qwix")
bridge = pytest.importorskip("cage_jax.qwix", exc_type=ImportError)
nnx = pytest.importorskip("flax.nnx")

EXACT = {"use_original_residuals": False}


@contextlib.contextmanager
def implicit_promotion():
    """Allows what qwix and flax make use of."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rules_and_warnings(*args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rules = bridge.rules(*args, **kwargs)
    return rules, [str(warning.message) for warning in caught]


def exact_rules(*args, **kwargs):
    """Rules that nothing is said against but what is true of qwix's defaults."""
    rules, texts = rules_and_warnings(*args, **kwargs)
    assert not [text for text in texts if text.startswith("`")]
    return rules


def quantizing(qtype, **options):
    """A rule of qwix's for weights."""
    return qwix.QtRule(weight_qtype=qtype, **options)


def one_hot(*shape):
    """Inputs such that a product gives each value of a weight."""
    return np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)


class Own(nnx.Module):
    """A product of one's own."""

    def __init__(self, product, shape=(8, 8), dtype="float32", values=None):
        if values is None:
            values = np.random.default_rng(3).standard_normal(shape)
            values = values.astype(np.float32).astype(jnp.dtype(dtype))
        self.w = nnx.Param(jax.device_put(values))
        self.product = nnx.static(product)

    def __call__(self, x):
        return self.product(self.w[...], x)


def contracted(w, x):
    return jnp.einsum("bi,io->bo", x, w)


def over_7(**options):
    """Such that no value lies in the middle of two codes."""
    method = "absmax,1.0714286"
    return quantizing("int4", weight_calibration_method=method, **options)


def without_values(make):
    """A module without arrays, for which initializers would have to be compiled."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def quantized_by_qwix(model, qwix_rules, inputs):
    """What `qwix.quantize_model` makes of a model, which it calls without computing."""
    quantized = nnx.eval_shape(
        lambda model: qwix.quantize_model(model, qwix.QtProvider(qwix_rules), inputs),
        model,
    )
    nnx.update(quantized, nnx.state(model))
    return quantized
