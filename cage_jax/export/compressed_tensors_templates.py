"""compressed-tensors of any transformers model, with its own folder as template."""

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from cage_jax.arrays.checks import warn
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
    is_linear,
    module_of,
    sources_of,
    table_of,
)
from cage_jax.export.template_parts import coded_tensors, leaves_of, whole_of
from cage_jax.export.templates import copy_settings, read_template, write_like
from cage_jax.export.writing import new_folder
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
    tensors, leaves = template.tensors, leaves_of(codes)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    sources = sources_of(shapes, tensors, table_of(names))
    coding = functools.partial(_coding, template=template)
    coded = coded_tensors(sources, leaves, tensors, coding, "compressed-tensors")
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
        if name in coded:
            quantizer, scheme, _ = coded[name]
            whole = whole_of(sources[name], leaves, quantizer)
            stored = stored_codes(whole, scheme)
            return {f"{module_of(name)}.{suffix}": x for suffix, x in stored.items()}
        whole = whole_of(sources[name], leaves).reshape(tensors[name].shape)
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


def _coding(name, like_all, template):
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
    quantizer, scheme = like_all.quantizer, exact_scheme(like_all)
    if scheme is None:
        supported = SUPPORTED.replace(", axis -2", "")
        raise ValueError(
            f"{quantizer}, which compressed-tensors does not hold. Choose one of "
            f"{supported}, or leave it unquantized."
        )
    scale = np.dtype(like_all.scale.dtype)
    if needed := needed_dtype(like_all, dtype):
        raise ValueError(
            f"{scale} scales in a template of {dtype}, in which readers "
            f"compute the weights: they would be rounded. Use a template of {needed}"
            + (f", or a quantizer with {dtype} scales." if needed in FLOATS else ".")
        )
    return _Coded(quantizer, scheme, scale)
