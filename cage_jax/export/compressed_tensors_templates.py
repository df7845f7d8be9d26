"""compressed-tensors of any transformers model, with its own folder as template."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import first_lines, warn
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.compressed_tensors_arrays import stored_codes, stored_floats
from cage_jax.export.compressed_tensors_schemes import (
    FLOATS,
    SUPPORTED,
    Scheme,
    exact_scheme,
    needed_dtype,
    quantization_config,
    warn_of_mixed_layers,
)
from cage_jax.export.files import Path, write_json
from cage_jax.export.safetensors_files import Like
from cage_jax.export.template_names import (
    LISTED,
    is_linear,
    module_of,
    sources_of,
    table_of,
)
from cage_jax.export.template_parts import along_inputs, joined, part_of, taken
from cage_jax.export.templates import copy_settings, read_template, write_like
from cage_jax.export.writing import new_folder
from cage_jax.llama.loaded import Model
from cage_jax.quantizers.quantizer import Quantizer

_EXPERT = re.compile(r".*\.experts\.\d+\..*")
# Models whose layers are of another class, which stores (in, out).
_WITHOUT_LINEAR = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class _Coded(NamedTuple):
    """A tensor that becomes codes: its quantizer for (out, in), and its scheme."""

    quantizer: Quantizer
    scheme: Scheme
    scale_dtype: np.dtype


def write_by_template(
    codes: Any, folder: Path, path: Path, *, names: Any, overwrite: bool
) -> None:
    """Writes a copy of a model's folder with codes, see `compressed_tensors`."""
    template = read_template(folder)
    tensors, leaves = template.tensors, _leaves(codes)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    sources = sources_of(shapes, tensors, table_of(names))
    coded = _coded(sources, leaves, template)
    schemes = {
        module_of(name): coded[name].scheme if name in coded else None
        for name, tensor in tensors.items()
        if name in coded or is_linear(name, tensor)
    }
    if "lm_head.weight" not in tensors:  # it is the embedding
        schemes["lm_head"] = None

    def like_of(name):
        if name not in coded:
            return {name: tensors[name]}
        _, scheme, scale = coded[name]
        return {
            f"{module_of(name)}.{suffix}": Like(
                scale if len(dtypes) > 1 else np.dtype(dtypes[0]), shape
            )
            for suffix, (dtypes, shape) in scheme.tensors(tensors[name].shape).items()
        }

    def arrays_of(name):
        parts = []
        for source in sources[name]:
            parts.append(part_of(leaves[source.path], source))
            check_finite({source.path: parts[-1]})
        if name in coded:
            quantizer, scheme, _ = coded[name]
            stored = stored_codes(joined(parts, quantizer), scheme)
            return {f"{module_of(name)}.{suffix}": x for suffix, x in stored.items()}
        whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
        paths = " and ".join(source.path for source in sources[name])
        return {name: stored_floats(whole, tensors[name].dtype.name, paths)}

    with new_folder(path, overwrite=overwrite) as target:
        replaced = {
            name: like_of(name)
            for name, parts in sources.items()
            if not template.holds(name, leaves[parts[0].path])
        }
        write_like(template, target, replaced, arrays_of)
        copy_settings(template, target)
        config = dict(template.config)
        if coded:
            config["quantization_config"] = quantization_config(schemes, by_name=True)
        write_json(target / "config.json", config)
    warn_of_mixed_layers(schemes, path)
    if experts := [name for name in coded if _EXPERT.fullmatch(name)]:
        warn(
            f"`codes` must have floats for experts, for transformers 5 to read them; "
            f"got codes for {len(experts)} matrices, such as {experts[0]}. Leave them "
            f"unquantized, unless only vLLM reads {path}."
        )


def _leaves(codes):
    """Returns the parameters of a tree by path."""
    if isinstance(codes, Model):
        raise TypeError(
            "`codes` must be parameters; got a whole Model. Use model.params."
        )
    paths, leaves, _ = flatten_with_paths(codes, QuantizedArray)
    for path, leaf in zip(paths, leaves):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"`{path}`: `codes` must be arrays and QuantizedArrays; got "
                f"{type(leaf).__name__}. Pass what quantize(params, rules) returns."
            )
    return dict(zip(paths, leaves))


def _coded(sources, leaves, template):
    """Finds how each quantized tensor is stored; raises for all that cannot be."""
    coded, problems = {}, []
    for name, parts in sources.items():
        arrays = [leaves[part.path] for part in parts]
        paths = " and ".join(f"`{part.path}`" for part in parts)
        try:
            if any(isinstance(array, QuantizedArray) for array in arrays):
                coded[name] = _coding(name, parts, arrays, template)
            else:
                _check_dtypes(arrays, template.tensors[name].dtype)
        except ValueError as error:
            problems.append(f"{paths}: {error}")
    if problems:
        problems = list(dict.fromkeys(problems))  # a stack has the same one many times
        raise ValueError(
            f"`codes` must be what compressed-tensors holds in this template; got\n"
            f"{first_lines(problems, LISTED)}"
        )
    return coded


def _check_dtypes(arrays, dtype):
    for array in arrays:
        floats = [jnp.issubdtype(each, jnp.floating) for each in (array.dtype, dtype)]
        if array.dtype != dtype and not all(floats):
            raise ValueError(f"{array.dtype}, for {dtype} in the template")


def _coding(name, parts, arrays, template):
    """Finds how a tensor is stored as codes; raises ValueError if it cannot be."""
    tensor, dtype = template.tensors[name], template.dtype
    tied = template.config.get("tie_word_embeddings") and name == "lm_head.weight"
    if template.config.get("model_type") in _WITHOUT_LINEAR or not (
        is_linear(name, tensor) and str(tensor.dtype) in FLOATS and not tied
    ):
        raise ValueError(
            f"codes for `{name}` {tensor.dtype} {list(tensor.shape)}, but readers take "
            f"only the weights of linear layers, not embeddings, heads that are tied "
            f"to them, convolutions and stacks of experts. Leave it unquantized."
        )
    if not all(isinstance(array, QuantizedArray) for array in arrays):
        raise ValueError(f"floats and codes in `{name}`. Quantize all of it or nothing")
    like = {along_inputs(array, part) for array, part in zip(arrays, parts)}
    found = {(array.scale.dtype, jnp.dtype(array.dtype)) for array in arrays}
    if len(like) > 1 or len(found) > 1:
        raise ValueError(f"several quantizers in `{name}`. Give all parts the same one")
    quantizer = like.pop()
    like_all = dataclasses.replace(arrays[0], quantizer=quantizer)
    scheme = exact_scheme(like_all)
    if scheme is None:
        supported = SUPPORTED.replace(", axis -2", "")
        raise ValueError(
            f"{quantizer}, which compressed-tensors does not hold. Choose one of "
            f"{supported}, or leave it unquantized."
        )
    divisors = [
        np.asarray(taken(array.tensor_divisor, part, array.shape)).ravel()
        for array, part in zip(arrays, parts)
        if array.tensor_divisor is not None
    ]
    if divisors and len(set(np.concatenate(divisors).tolist())) > 1:
        raise ValueError(f"several tensor divisors in `{name}`. Quantize it as a whole")
    scale = np.dtype(like_all.scale.dtype)
    if needed := needed_dtype(like_all, dtype):
        raise ValueError(
            f"{scale} scales in a template of {dtype}, in which readers "
            f"compute the weights: they would be rounded. Use a template of {needed}"
            + (f", or a quantizer with {dtype} scales." if needed in FLOATS else ".")
        )
    return _Coded(quantizer, scheme, scale)
