"""Conversion of a Llama's parameters between our tree and the tensors of files.

In our tree the parameters of all layers are stacked, and a kernel is (in, out), see
`LlamaConfig.shapes`. In a file each layer has its own tensors, and a kernel is
(out, in).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.finite import check_finite
from cage_jax.core.quantize import dequantize
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.folding import Array, folded
from cage_jax.llama.loaded import Model


class ParameterNames(NamedTuple):
    """The names of a parameter in our tree and in files.

    Attributes:
      path: path in our tree; parameters in "layers/" have a leading axis of layers.
      huggingface: name in transformers; "{}" stands for the layer.
      gguf: name in GGUF.
    """

    path: str
    huggingface: str
    gguf: str

    @property
    def in_layers(self) -> bool:
        """Whether each layer has this parameter."""
        return self.path.startswith("layers/")

    @property
    def is_kernel(self) -> bool:
        """Whether the parameter is a matrix, which files store transposed."""
        return self.path.endswith("/kernel")

    @property
    def suffix(self) -> str:
        """Ending of the names of its floats in files, "weight" or "bias"."""
        return "bias" if self.path.endswith("/bias") else "weight"

    def path_in(self, layer: int | None) -> str:
        """Returns the path with the number of a layer, such as "layers/3/up/kernel"."""
        if layer is None:
            return self.path
        return self.path.replace("layers/", f"layers/{layer}/", 1)


def _of_layer(path, huggingface, gguf):
    suffix = ParameterNames(path, huggingface, gguf).suffix
    return ParameterNames(
        f"layers/{path}",
        f"model.layers.{{}}.{huggingface}.{suffix}",
        f"blk.{{}}.{gguf}.{suffix}",
    )


PARAMETERS = {
    names.path: names
    for names in (
        ParameterNames(
            "embedding/embedding", "model.embed_tokens.weight", "token_embd.weight"
        ),
        _of_layer("attention_norm/scale", "input_layernorm", "attn_norm"),
        _of_layer("query/kernel", "self_attn.q_proj", "attn_q"),
        _of_layer("key/kernel", "self_attn.k_proj", "attn_k"),
        _of_layer("value/kernel", "self_attn.v_proj", "attn_v"),
        _of_layer("query/bias", "self_attn.q_proj", "attn_q"),
        _of_layer("key/bias", "self_attn.k_proj", "attn_k"),
        _of_layer("value/bias", "self_attn.v_proj", "attn_v"),
        _of_layer("query_norm/scale", "self_attn.q_norm", "attn_q_norm"),
        _of_layer("key_norm/scale", "self_attn.k_norm", "attn_k_norm"),
        _of_layer("output/kernel", "self_attn.o_proj", "attn_output"),
        _of_layer("mlp_norm/scale", "post_attention_layernorm", "ffn_norm"),
        _of_layer("gate/kernel", "mlp.gate_proj", "ffn_gate"),
        _of_layer("up/kernel", "mlp.up_proj", "ffn_up"),
        _of_layer("down/kernel", "mlp.down_proj", "ffn_down"),
        ParameterNames("norm/scale", "model.norm.weight", "output_norm.weight"),
        ParameterNames("head/kernel", "lm_head.weight", "output.weight"),
    )
}


class Tensor(NamedTuple):
    """One tensor of a file, in our layout (in, out).

    Attributes:
      names: the names of its parameter.
      layer: number of the layer, or None.
      array: floats, or codes with a quantizer for this array alone.
    """

    names: ParameterNames
    layer: int | None
    array: Array

    @property
    def path(self) -> str:
        """Path with the layer's number, such as "layers/3/query/kernel"."""
        return self.names.path_in(self.layer)


def expected_tensors(
    config: LlamaConfig,
) -> Iterator[tuple[ParameterNames, int | None, tuple[int, ...]]]:
    """Yields the names, layer and shape (in, out) of each tensor, layer by layer."""
    shapes = config.shapes()
    for path in shapes:
        if not PARAMETERS[path].in_layers:
            yield PARAMETERS[path], None, shapes[path]
    for layer in range(config.layers):
        for path in shapes:
            if PARAMETERS[path].in_layers:
                yield PARAMETERS[path], layer, shapes[path][1:]


def tensors(codes: Any, config: LlamaConfig) -> Iterator[Tensor]:
    """Yields the parameters one by one, in the order of `expected_tensors`.

    Rotations are folded into the preceding weights where possible, see
    `cage_jax.llama.folding`.

    Args:
      codes: a tree of floats and `QuantizedArray`s with the paths and shapes of
        `config.shapes()`, as `quantize(params, rules)` returns it. Layers may also be
        separate, with paths such as "layers/3/query/kernel".
      config: the model's dimensions.

    Raises:
      TypeError: if `config` is not a `LlamaConfig`, or if a leaf is neither floats nor
        a `QuantizedArray`.
      ValueError: if parameters are missing, unexpected, of another shape or not finite.
    """
    if not isinstance(config, LlamaConfig):
        raise TypeError(
            f"`config` must be a LlamaConfig; got {type(config).__name__}. Use "
            f"LlamaConfig(vocabulary=..., ...), or LlamaConfig.from_huggingface(dict)."
        )
    given = folded(by_path(codes), config)
    expected = {}
    for names, layer, shape in expected_tensors(config):
        if layer is not None and names.path in given:
            expected[names.path] = (config.layers, *shape)
        else:
            expected[names.path_in(layer)] = shape
    _check_paths(given, expected)
    for path, shape in expected.items():
        if given[path].shape != shape:
            raise ValueError(
                f"`{path}`: `codes` must have the shapes that `config` says; got "
                f"{given[path].shape} for {shape}. Pass the config of this model."
            )
    for names, layer, _ in expected_tensors(config):
        if layer is not None and names.path in given:
            array = layer_of(given[names.path], layer)
        else:
            array = given[names.path_in(layer)]
        check_finite({names.path_in(layer): array})
        yield Tensor(names, layer, array)


def by_path(tree: Any) -> dict[str, Array]:
    """Returns the leaves of a tree of floats and codes by path."""
    if isinstance(tree, Model):
        raise TypeError(
            "`codes` must be parameters; got a whole Model. Use model.params."
        )
    paths, leaves, _ = flatten_with_paths(tree, QuantizedArray)
    for path, leaf in zip(paths, leaves):
        if not isinstance(leaf, QuantizedArray) and not (
            hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        ):
            prefix = f"`{path}`: " if path else ""
            raise TypeError(
                f"{prefix}`codes` must be floats and QuantizedArrays; got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Pass what "
                f"quantize(params, rules) returns."
            )
    return dict(zip(paths, leaves))


def layer_of(stacked: Array, number: int) -> Array:
    """Takes one layer out of stacked parameters."""

    def take(array):
        # Layers that share a scale have one entry for all.
        return array[number if array.shape[0] > 1 else 0]

    layer = jax.tree.map(take, stacked)
    if isinstance(stacked, QuantizedArray):
        quantizer = _without_layers(stacked.quantizer, stacked.codes.ndim)
        layer = dataclasses.replace(layer, quantizer=quantizer)
    return layer


def _without_layers(quantizer, ndim):
    """Returns the quantizer of one layer of an array that has `ndim` axes."""
    if quantizer.axis is None:
        return quantizer
    axes = quantizer.axis if isinstance(quantizer.axis, tuple) else (quantizer.axis,)
    sizes = dict(zip((axis % ndim for axis in axes), quantizer.group_sizes))
    sizes.pop(0, None)
    counted = tuple(axis - ndim for axis in sizes)  # from the end, as presets do
    if len(counted) == 1:
        (axis,), (size,) = counted, sizes.values()
        return dataclasses.replace(quantizer, axis=axis, group_size=size)
    return dataclasses.replace(
        quantizer, axis=counted, group_size=tuple(sizes.values())
    )


def tree_of(found: Mapping[tuple[str, int | None], Array], config: LlamaConfig) -> Any:
    """Builds the tree of parameters from the arrays of a file.

    Args:
      found: the arrays, (in, out), by path in `PARAMETERS` and layer.
      config: the model's dimensions.

    Returns:
      A nested dict with the paths of `config.shapes()`. Codes stay codes if all layers
      of the parameter have the same quantizer; otherwise they become floats.

    Raises:
      ValueError: if parameters are missing, unexpected or of another shape.
    """
    expected = {
        names.path_in(layer): ((names.path, layer), shape)
        for names, layer, shape in expected_tensors(config)
    }
    _check_paths({PARAMETERS[path].path_in(layer) for path, layer in found}, expected)
    for path, (key, shape) in expected.items():
        if found[key].shape != shape:
            raise ValueError(
                f"`{path}`: the file must have the shape that its config says, "
                f"{shape}; got {found[key].shape}. Get the file again."
            )
    return nested(
        {
            path: stacked([found[path, layer] for layer in range(config.layers)])
            if PARAMETERS[path].in_layers
            else found[path, None]
            for path in config.shapes()
        }
    )


def nested(params: Mapping[str, Array]) -> dict[str, Any]:
    """Converts parameters by path to a nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *inner, last = path.split("/")
        node = tree
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def stacked(arrays: list[Array]) -> Array:
    """Stacks layers: as codes if all have the same quantizer, else as floats."""
    alike = {
        (array.quantizer, array.dtype) if isinstance(array, QuantizedArray) else None
        for array in arrays
    }
    if len(alike) > 1:
        arrays = dequantize(arrays)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *arrays)


def _check_paths(given, expected):
    missing = [path for path in expected if path not in given]
    more = [path for path in given if path not in expected]
    if missing or more:
        what, paths = ("missing", missing) if missing else ("unexpected", more)
        raise ValueError(
            f"the parameters must be those of the config; got {len(paths)} {what}, "
            f"such as {paths[:3]}. Pass the config of this model: its layers, and "
            f"whether its embedding is tied to the head."
        )
