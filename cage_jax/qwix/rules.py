"""Rules for a model trained with qwix, and warnings where both conflict."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import qwix
from flax import linen, nnx

from cage_jax.arrays.checks import warn
from cage_jax.core.rules import Rules
from cage_jax.qwix.quantizer import QwixQuantizer
from cage_jax.qwix.trace import quantized_parameters


def rules(
    model: Any,
    qwix_rules: Sequence[qwix.QuantizationRule],
    *inputs: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Rules:
    """Returns rules with the quantizers that qwix uses for a model's weights.

    Under `jax.jit`, `fake_quant(w, rules.match(path))` is bit-identical to the weight
    in qwix's compiled step, so CAGE pulls toward the grid that the model is trained on.
    Train with `qwix.quantize_model(model, qwix.QtProvider(qwix_rules), *inputs)` and
    add `coupled(rules, ...)` or a related transformation to the optimizer. qwix
    computes the forward pass, and so the gradient. It also makes the codes: CAGE's
    `quantize`, `freeze_scale` and `statistics` do not support these rules.

    If an array that qwix quantizes cannot be followed back to one parameter, it is left
    alone, with a warning that names the path and the reason. Other warnings report
    settings of qwix that conflict with CAGE: gradients at the unquantized weights,
    grids that are not idempotent, and weights that are not quantized.

    Args:
      model: an NNX module, or a Linen module.
      qwix_rules: the rules given to `qwix.QtProvider`.
      inputs: inputs of the model, as for `qwix.quantize_model`: arrays, or
        `jax.ShapeDtypeStruct`, because nothing is computed.
      method: name of the method to call.
      kwargs: keyword arguments of the call, and of `init` for a Linen module.

    Returns:
      A `Rules` with one rule for each weight that qwix quantizes.

    Raises:
      TypeError: if `model` is not a module or `qwix_rules` are not qwix's.
      ValueError: if there are no inputs, or if qwix quantizes no weight.

    Example:
      >>> import cage_jax as cage
      >>> import cage_jax.qwix
      >>> import jax.numpy as jnp
      >>> import qwix
      >>> from flax import nnx
      >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
      >>> rule = qwix.QtRule(
      ...     weight_qtype="int4",
      ...     weight_calibration_method="absmax,1.0714286",  # over 7, not 7.5
      ...     additional_qt_config={"use_original_residuals": False},
      ... )
      >>> rules = cage.qwix.rules(model, [rule], jnp.ones((2, 64)))
      >>> print(rules.match("kernel"))
      int4 by qwix, absmax,1.0714286, a scale for each index of axis 1
    """
    _check_arguments(model, qwix_rules, inputs, kwargs)
    provider = qwix.QtProvider(qwix_rules)
    uses, params = quantized_parameters(model, provider, method, inputs, kwargs)
    quantizers: dict[str, QwixQuantizer | None] = {}
    for path in (path for path in params if path in uses):
        quantizers[path], problem = _quantizer(uses[path], params[path])
        if problem is not None:
            warn(f"`{path}`: {problem}")
    if not quantizers:
        raise ValueError(
            f"`qwix_rules` must quantize a weight of the model; got module_path="
            f"{[rule.module_path for rule in qwix_rules]}, parameters {list(params)}. "
            f"Match their paths without the last part, set `weight_qtype`, and use the "
            f"layers of flax or jnp.einsum; qwix does not see `x @ w`."
        )
    for text in _conflicts(uses, quantizers, qwix_rules, params):
        warn(text)
    return Rules([(re.escape(path), each) for path, each in quantizers.items()])


def _check_arguments(model, qwix_rules, inputs, kwargs):
    if not isinstance(model, (linen.Module, nnx.Module)):
        raise TypeError(
            f"`model` must be an NNX or a Linen module; got {type(model).__name__}. "
            f"Pass the module itself, not its variables."
        )
    if not isinstance(qwix_rules, (list, tuple)) or not all(
        isinstance(rule, qwix.QuantizationRule) for rule in qwix_rules
    ):
        raise TypeError(
            f"`qwix_rules` must be a list of qwix's rules; got {qwix_rules!r}. Use "
            f"[qwix.QtRule(weight_qtype='int4')], not the provider."
        )
    if not inputs and not kwargs:
        raise ValueError(
            "`inputs` must be those of the model; got none. Pass what the model is "
            "called with; shapes are enough."
        )


def _quantizer(uses, like):
    """Returns the quantizer of a parameter, or None and the reason."""
    changed = next((use.changed for use in uses if use.steps is None), None)
    if changed is not None and changed.startswith("jnp."):
        return None, (
            f"qwix quantizes it in {changed}. If jax has cached a trace of {changed}, "
            f"qwix does not see it, so CAGE leaves it alone. Use jnp.einsum, which "
            f"qwix always sees."
        )
    if changed is not None:
        return None, (
            f"qwix quantizes an array that {changed} computes from it, so CAGE leaves "
            f"it alone. Use cage_jax.fake_quant instead of qwix."
        )
    if len(set(uses)) > 1:
        return None, (
            f"qwix quantizes it in several ways, "
            f"{' and '.join(sorted({str(use.how) for use in uses}))}, so CAGE leaves "
            f"it alone. Let everything that shares it match one qwix rule, and use it "
            f"in one orientation."
        )
    return QwixQuantizer(use=uses[0], dtype=np.dtype(like.dtype)), None


def _conflicts(uses, quantizers, qwix_rules, params):
    """Yields a warning for each way in which training with qwix conflicts with CAGE."""
    tiled = [
        path
        for path, (use, *_) in uses.items()
        if use.how.tiles or use.how.name in ("mxfp8", "mxfp4", "nvfp4")
    ]
    original = [
        path
        for path in uses
        if path not in tiled and _original_residuals(_rule_of(path, qwix_rules))
    ]
    if original:
        yield (
            f"in the backward pass qwix multiplies by the unquantized values of these "
            f"weights, so earlier layers do not get the gradient of the loss at the "
            f"quantized weights: {_listed(original)}. Use additional_qt_config="
            f"{{'use_original_residuals': False}} in qwix's rule."
        )
    if tiled:
        yield (
            f"in the backward pass qwix multiplies by the unquantized values of these "
            f"weights, as always for tiles and MX types: {_listed(tiled)}. Use no "
            f"`tile_size`, or use cage_jax.fake_quant instead of qwix."
        )
    drifting = [
        path
        for path, quantizer in quantizers.items()
        if quantizer is not None and not quantizer.idempotent
    ]
    if drifting:
        yield (
            f"these quantizers are not idempotent, so a long pull moves their grids: "
            f"{_listed(drifting)}. For integers use weight_calibration_method="
            f"'absmax,f' with f = 1 + 1 / (2**bits - 2), 1.0714286 for 4 bits, in "
            f"qwix's rule."
        )
    unseen = [
        path
        for path, like in params.items()
        if len(like.shape) > 1
        and path not in uses
        and (rule := _rule_of(path, qwix_rules)) is not None
        and rule.weight_qtype is not None
    ]
    if unseen:
        yield (
            f"a rule of qwix's matches the module of these parameters, but qwix "
            f"quantizes no product of them: {_listed(unseen)}. It does not see "
            f"`x @ w`, jnp.dot, jnp.matmul, `Embed.attend` and lookups; use "
            f"jnp.einsum, or leave the module out of the rule."
        )


def _listed(paths, most=6):
    """Lists the first paths, quoted, and the number of the others."""
    text = ", ".join(f"`{path}`" for path in paths[:most])
    more = len(paths) - most
    return f"{text} and {more} more" if more > 0 else text


def _rule_of(path, qwix_rules):
    """Finds qwix's rule for the products of a parameter's module, or None."""
    module = path.rpartition("/")[0]
    for rule in qwix_rules:
        if not rule.op_names and re.fullmatch(rule.module_path, module):
            return rule
    return None


def _original_residuals(rule):
    """Tells, as qwix decides it, whether gradients use the unquantized factors."""
    config = dict(getattr(rule, "additional_qt_config", None) or {})
    default = getattr(rule, "bwd_qtype", None) is None
    return config.get("use_original_residuals", default)
