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
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.folding import Array, folded
from cage_jax.llama.loaded import Model
from cage_jax.quantizers.quantizer import Quantizer


class Place(NamedTuple):
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


def _of_layer(path, huggingface, gguf):
    return Place(
        f"layers/{path}",
        f"model.layers.{{}}.{huggingface}.weight",
        f"blk.{{}}.{gguf}.weight",
    )


PLACES = {
    place.path: place
    for place in (
        Place("embedding/embedding", "model.embed_tokens.weight", "token_embd.weight"),
        _of_layer("attention_norm/scale", "input_layernorm", "attn_norm"),
        _of_layer("query/kernel", "self_attn.q_proj", "attn_q"),
        _of_layer("key/kernel", "self_attn.k_proj", "attn_k"),
        _of_layer("value/kernel", "self_attn.v_proj", "attn_v"),
        _of_layer("output/kernel", "self_attn.o_proj", "attn_output"),
        _of_layer("mlp_norm/scale", "post_attention_layernorm", "ffn_norm"),
        _of_layer("gate/kernel", "mlp.gate_proj", "ffn_gate"),
        _of_layer("up/kernel", "mlp.up_proj", "ffn_up"),
        _of_layer("down/kernel", "mlp.down_proj", "ffn_down"),
        Place("norm/scale", "model.norm.weight", "output_norm.weight"),
        Place("head/kernel", "lm_head.weight", "output.weight"),
    )
}


class Tensor(NamedTuple):
    """One tensor of a file, in our layout (in, out).

    Attributes:
      place: the parameter that the tensor is, or is one layer of.
      layer: number of the layer, or None.
      array: floats, or codes with a quantizer for this array alone.
    """

    place: Place
    layer: int | None
    array: Array

    @property
    def path(self) -> str:
        """Path with the layer's number, such as "layers/3/query/kernel"."""
        return _path(self.place, self.layer)


def tensors(codes: Any, config: LlamaConfig) -> Iterator[Tensor]:
    """Yields the parameters one by one, layer by layer.

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
    for path, shape in config.shapes().items():
        place = PLACES[path]
        apart = place.in_layers and path not in given
        for number in range(config.layers) if apart else (None,):
            expected[_path(place, number)] = shape if number is None else shape[1:]
    _check_paths(given, expected)
    for path, shape in expected.items():
        leaf = given[path]
        if leaf.shape != shape:
            raise ValueError(
                f"`{path}`: `codes` must have the shapes that `config` says; got "
                f"{leaf.shape} for {shape}. Give the config of this model."
            )
    for path in config.shapes():
        place = PLACES[path]
        if not place.in_layers:
            yield _checked(Tensor(place, None, given[path]))
    for number in range(config.layers):
        for path in config.shapes():
            place = PLACES[path]
            if not place.in_layers:
                continue
            stacked = given.get(path)
            array = (
                given[_path(place, number)]
                if stacked is None
                else layer_of(stacked, number)
            )
            yield _checked(Tensor(place, number, array))


def _checked(tensor):
    """Returns the tensor; raises if it has NaN or infinity, which no file may ship."""
    array = tensor.array
    codes = _is_codes(array)
    values = array.scale if codes else array
    if not jnp.isfinite(values.astype(jnp.float32)).all():
        what = "scales" if codes else "values"
        raise ValueError(
            f"`{tensor.path}`: `codes` must have finite {what}; got NaN or infinity. "
            f"Look at the last steps of the training, or take an earlier checkpoint."
        )
    return tensor


def by_path(tree: Any) -> dict[str, Array]:
    """Returns the leaves of a tree of floats and codes by path."""
    if isinstance(tree, Model):
        raise TypeError(
            "`codes` must be parameters; got a whole Model. Use model.params."
        )
    paths, leaves, _ = flatten_with_paths(tree, _is_codes)
    for path, leaf in zip(paths, leaves):
        if not _is_codes(leaf) and not (
            hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        ):
            place = f"`{path}`: " if path else ""
            raise TypeError(
                f"{place}`codes` must be floats and QuantizedArrays; got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Give what "
                f"quantize(params, rules) returns."
            )
    return dict(zip(paths, leaves))


def layer_of(stacked: Array, number: int) -> Array:
    """Takes one layer out of stacked parameters."""
    if not isinstance(stacked, QuantizedArray):
        return stacked[number]

    def of(array):
        # Layers that share a scale have one entry for all.
        return None if array is None else array[number if array.shape[0] > 1 else 0]

    return dataclasses.replace(
        stacked,
        codes=stacked.codes[number],
        scale=of(stacked.scale),
        zero_point=of(stacked.zero_point),
        offset=of(stacked.offset),
        tensor_divisor=of(stacked.tensor_divisor),
        quantizer=_of_layer_quantizer(stacked.quantizer, stacked.codes.ndim),
    )


def _of_layer_quantizer(quantizer: Quantizer, ndim: int) -> Quantizer:
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
      found: the arrays, (in, out), by path in `PLACES` and layer.
      config: the model's dimensions.

    Returns:
      A nested dict with the paths of `config.shapes()`. Codes stay codes if all layers
      of the parameter have the same quantizer; otherwise they become floats.

    Raises:
      ValueError: if parameters are missing, unexpected or of another shape.
    """
    expected = {
        (path, number): shape[1:] if PLACES[path].in_layers else shape
        for path, shape in config.shapes().items()
        for number in (range(config.layers) if PLACES[path].in_layers else (None,))
    }
    _check_paths(
        {_path(PLACES[path], number) for path, number in found},
        {_path(PLACES[path], number) for path, number in expected},
    )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise ValueError(
                f"`{_path(PLACES[key[0]], key[1])}`: the file must have the shape that "
                f"its config says, {shape}; got {found[key].shape}. Get the file again."
            )
    tree: dict[str, Any] = {}
    for path in config.shapes():
        if PLACES[path].in_layers:
            array = stacked([found[path, number] for number in range(config.layers)])
        else:
            array = found[path, None]
        *inner, last = path.split("/")
        node = tree
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = array
    return tree


def stacked(arrays: list[Array]) -> Array:
    """Stacks layers: as codes if all have the same quantizer, else as floats."""
    alike = {
        (array.quantizer, array.dtype) if isinstance(array, QuantizedArray) else None
        for array in arrays
    }
    if len(alike) > 1:
        arrays = [
            decoded(array) if isinstance(array, QuantizedArray) else array
            for array in arrays
        ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *arrays)


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)


def _path(place, number):
    return place.path if number is None else _numbered(place.path, number)


def _numbered(path, number):
    return path.replace("layers/", f"layers/{number}/", 1)


def _check_paths(given, expected):
    missing = [path for path in expected if path not in given]
    more = [path for path in given if path not in expected]
    if missing or more:
        text = f"missing {missing[:3]}" if missing else f"{more[:3]} too many"
        count = len(missing or more)
        raise ValueError(
            f"the parameters must be those that the config says; got {count} "
            f"{text}{' and others' if count > 3 else ''}. Give the config of this "
            f"model: its layers, and whether its embedding is tied to the head."
        )
