"""Rules for a model trained with qwix: qwix's own quantizer for each weight.

qwix decides inside the forward pass which factor of each product is a weight and how to
quantize it. So the model is traced with qwix active, without computing anything. Each
array that qwix quantizes is followed back to its parameter. The quantizer of that
parameter lays it out in the same way and calls qwix.

This uses private modules of qwix, so it works with one version only.
"""

from importlib.metadata import PackageNotFoundError, version

from cage_jax._project import install

_VERSION = "0.1.8"

try:
    _found = version("qwix")
except PackageNotFoundError:
    _found = "none"
if _found != _VERSION:
    raise ImportError(
        f"`cage_jax.qwix` needs qwix {_VERSION}, of which it uses private modules; "
        f"got {_found}. " + install("qwix")
    )

from cage_jax.qwix.quantizer import QwixQuantizer  # noqa: E402
from cage_jax.qwix.rules import rules  # noqa: E402

__all__ = ["QwixQuantizer", "rules"]
