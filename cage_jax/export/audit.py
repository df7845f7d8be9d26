"""An audit: whether a shipped file is the model that was trained."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths, is_nnx_module, path_in_errors
from cage_jax.core.finite import check_values
from cage_jax.core.grids import grid_at
from cage_jax.core.quantize import quantize
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.export.audit_arrays import compared
from cage_jax.export.audit_files import Pair, pairs
from cage_jax.export.audit_report import Audit
from cage_jax.export.files import Path, as_path
from cage_jax.export.template_names import TensorName
from cage_jax.llama.loaded import Model


@names_checked
def audit(
    file: Path,
    params: Any,
    rules: Rules | None = None,
    *,
    names: str | Sequence[TensorName] | None = None,
) -> Audit:
    r"""Compares a shipped file with the training that made it, tensor by tensor.

    The codes of the parameters are computed again, and compared with those of the file:
    codes, scales, zero points, shapes, which tensors are codes, floats and what their
    dtype changed, tensors without parameters, parameters without tensors, and the
    layers that config.json lists. Codes are compared by the values that they stand for,
    so that 3 bits may be stored in 4. Floats that equal those of training rounded to
    the dtype of the file are the same, and the table says how much that changed.

    A file may have floats where training has codes, as the "unquantized" checkpoints of
    a quantization-aware training do. The audit then says how many of them lie on the
    grid, within the rounding of their dtype, and how many different values a group has.
    If all lie there, rounding them again loses nothing, and they are no finding. For
    such a checkpoint alone, `params` are its own tensors, as `export.read_tensors` or
    `load(file).params` returns them. The share by chance says what that means: it is
    near 100% where the dtype is too coarse to tell, as bfloat16 is for 8 bits.

    Args:
      file: anything that `load` reads; or a model of any architecture: the folder of
        a transformers model, of floats or compressed-tensors, or a GGUF.
      params: the parameters of the training: floats, codes, or the variables of
        `with_grids`. With the paths of the file, or such that `names` maps to them.
      rules: the rules of the training; None if `params` has codes.
      names: for a transformers model, what the parameters are called in it, as in
        `export.compressed_tensors`; for a GGUF, as in `export.gguf`.

    Returns:
      An `Audit`: `ok`, `findings` and `rows`, shown as a table.

    Raises:
      FileNotFoundError, ImportError, MalformedFileError, ValueError: as `load` does, if
        the file cannot be read.
      TypeError: if `params` is not a tree of arrays, or `rules` are not `Rules`.
      ValueError: if the rules match no parameter, or round stochastically, so that
        codes cannot be computed again.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import pathlib, tempfile
      >>> params = {"up": jnp.eye(32), "norm": jnp.ones(32)}
      >>> rules = cage.Rules([("up", cage.int4(group_size=32)), (".*", None)])
      >>> path = pathlib.Path(tempfile.mkdtemp(), "codes.safetensors")
      >>> cage.export.save(cage.quantize(params, rules), path)
      >>> cage.audit(path, params, rules).ok
      True
      >>> audit = cage.audit(path, params | {"norm": jnp.zeros(32)}, rules)
      >>> print(*audit.findings)
      `norm`: 32 of 32 values differ, first at (0,): 1 in the file, 0 in training
    """
    file = as_path(file, "file")
    trained = _trained(params, rules)
    rows, findings = [], []
    for each in pairs(file, trained, names):
        if isinstance(each, Pair):
            row, found = compared(*each)
            rows.append(row)
            findings += found
        else:
            findings.append(each)
    return Audit(os.fspath(file), tuple(rows), tuple(findings))


def _trained(params, rules):
    """Returns the codes and floats of a training by path, on the host."""
    if isinstance(params, Model) or is_nnx_module(params):
        raise TypeError(
            f"`params` must be a tree of arrays; got {type(params).__name__}. Use "
            f"model.params, or nnx.state(model, nnx.Param)."
        )
    has_grids = isinstance(params, Mapping) and set(params) == {"params", "grids"}
    tree = params["params"] if has_grids else params
    paths, leaves, _ = flatten_with_paths(tree, QuantizedArray)
    trained = dict(zip(paths, leaves))
    for path, leaf in trained.items():
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"`{path}`: `params` must be arrays and QuantizedArrays; got "
                f"{type(leaf).__name__}. Pass the parameters of the training alone."
            )
    check_values(trained, "params")
    if rules is not None:
        check_rules(rules)
        floats = {
            path: leaf
            for path, leaf in trained.items()
            if not isinstance(leaf, QuantizedArray)
        }
        if len(floats) == len(trained) and rules.misses(floats):
            raise ValueError(
                f"`rules` must match a parameter; got {rules.in_words}: "
                f"{nothing_quantized(rules, floats)}"
            )
        for path, (quantizer, leaf) in rules.quantized(floats).items():
            with path_in_errors(path):
                grid = grid_at(path, params, None)
                trained[path] = _codes(leaf, quantizer, grid)
    return {
        path: jax.tree.map(np.asarray, leaf) if _is_codes(leaf) else leaf
        for path, leaf in trained.items()
    }


def _codes(leaf, quantizer, grid):
    if quantizer.rounding == "stochastic":
        raise ValueError(
            f"`rules` must round to the nearest level for codes to be computed again; "
            f"got {quantizer}. Give the codes that were shipped as `params`."
        )
    return quantize(leaf, quantizer, grid=grid)


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
