"""Names of parameters in the files of a template, and the layouts of both.

A table has one line per kind of parameter. `sources_of` finds where each tensor of a
template comes from, and lists all that does not fit.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cage_jax.arrays.checks import first_lines
from cage_jax.export.safetensors_files import Like
from cage_jax.llama.tensors import PARAMETERS

LISTED = 40  # problems in one error
# Constants that some files list among the weights.
_CONSTANT = re.compile(
    r".*rotary_emb\.inv_freq|(?:.*\.)?rope_(?:freqs|factors_long|factors_short)\.weight"
)
# Modules that are no linear layers, though their weights are matrices.
_EMBEDDING = re.compile(
    r"(.*\.)?(embed_(tokens|positions|in)|\w*embeddings?|wte|wpe|shared)"
)


@dataclasses.dataclass(frozen=True)
class TensorName:
    r"""A line of a table from parameters to the tensors of a transformers model.

    Args:
      path: regular expression that matches a parameter's whole path.
      tensor: name of its tensor, which may refer to groups of `path` as in `re.sub`;
        "{}" stands for the place in a stack. Several names for a fused matrix that is
        cut along its outputs into these. Several parameters with one name are joined
        along their outputs, in the order of the table, or make the places of a stack.
      axes: a letter for each axis of the parameter: "i" inputs, "o" outputs, "l" the
        places in a stack, such as "io" for a kernel of Flax, "lio" for one of many
        layers, and "ioo" for one with outputs (heads, size). None if its axes are those
        of the tensor.

    Raises:
      ValueError: if `path` is no regular expression, or `axes` has other letters.

    Example:
      >>> from cage_jax.export import TensorName
      >>> qkv = [f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkv"]
      >>> fused = TensorName(r"layers/qkv/kernel", tuple(qkv), axes="lio")
      >>> gate = TensorName(r"block(\d+)/gate", r"h.\1.gate.weight", axes="io")
    """

    path: str
    tensor: str | tuple[str, ...]
    axes: str | None = None

    def __post_init__(self):
        try:
            re.compile(self.path)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`path` must be a regular expression; got {self.path!r}: {error}. Use "
                f"one such as r'layers/(\\d+)/up/kernel'."
            ) from error
        axes = self.axes
        if axes is not None and (set(axes) - set("lio") or axes.count("l") > 1):
            raise ValueError(
                f"`axes` must be a letter of 'i', 'o' and 'l' for each axis, with one "
                f"'l' at most; got {axes!r}. Use 'io' for a kernel (in, out)."
            )


def _cage(kind):
    for names in PARAMETERS.values():
        tensor = getattr(names, kind)
        axes = "io" if names.is_kernel else None
        if not names.in_layers:
            yield TensorName(names.path, tensor, axes)
            continue
        yield TensorName(names.path, tensor, "lio" if axes else "lo")
        one = names.path.replace("layers/", r"layers/(\d+)/")
        yield TensorName(one, tensor.replace("{}", r"\1"), axes)


def _tunix():
    layer, theirs = r"layers/(\d+)/", r"model.layers.\1."
    for name, axes in {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio"}.items():
        tensor = f"{theirs}self_attn.{name}_proj"
        yield TensorName(f"{layer}attn/{name}_proj/w", f"{tensor}.weight", axes)
        yield TensorName(f"{layer}attn/{name}_bias", f"{tensor}.bias")
    yield TensorName(rf"{layer}attn/([qk]_norm)/w", rf"{theirs}self_attn.\2.weight")
    mlp = r"mlp/(gate|up|down)_proj"
    yield TensorName(rf"{layer}{mlp}/kernel", rf"{theirs}mlp.\2_proj.weight", "io")
    experts = rf"{theirs}mlp.experts.{{}}.\2_proj.weight"
    yield TensorName(rf"{layer}{mlp}", experts, "lio")
    yield TensorName(f"{layer}mlp/router/kernel", f"{theirs}mlp.gate.weight", "io")
    yield TensorName(rf"{layer}(\w+_layernorm)/w", rf"{theirs}\2.weight")
    yield TensorName("embedder/input_embedding", "model.embed_tokens.weight")
    yield TensorName("final_norm/w", "model.norm.weight")
    yield TensorName("lm_head/w", "lm_head.weight", "io")


def _maxtext():
    of_one = {
        "pre_self_attention_layer_norm/scale": ("input_layernorm.weight", "o"),
        "post_self_attention_layer_norm/scale": (
            "post_attention_layernorm.weight",
            "o",
        ),
        "self_attention/out/kernel": ("self_attn.o_proj.weight", "iio"),
        "mlp/wi_0/kernel": ("mlp.gate_proj.weight", "io"),
        "mlp/wi_1/kernel": ("mlp.up_proj.weight", "io"),
        "mlp/wo/kernel": ("mlp.down_proj.weight", "io"),
        "moe_block/gate/kernel": ("mlp.gate.weight", "io"),
    }
    for name in ("query", "key", "value"):
        ours, theirs = f"self_attention/{name}", f"self_attn.{name[0]}"
        of_one[f"{ours}/kernel"] = f"{theirs}_proj.weight", "ioo"
        of_one[f"{ours}/bias"] = f"{theirs}_proj.bias", "oo"
        of_one[f"{ours}_norm/scale"] = f"{theirs}_norm.weight", "o"
    ours, theirs = r".*decoder/layers[_/](\d+)/", r"model.layers.\1."
    for path, (tensor, axes) in of_one.items():
        yield TensorName(ours + path, theirs + tensor, axes)
        # Layers that are scanned lie along axis 1.
        stack, axes = f"model.layers.{{}}.{tensor}", f"{axes[0]}l{axes[1:]}"
        yield TensorName(f".*decoder/layers/{path}", stack, axes)
    for path, tensor in ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"):
        experts = f"{theirs}mlp.experts.{{}}.{tensor}_proj.weight"
        yield TensorName(f"{ours}moe_block/{path}", experts, "lio")
    yield TensorName(".*token_embedder/embedding", "model.embed_tokens.weight")
    yield TensorName(".*decoder/decoder_norm/scale", "model.norm.weight")
    yield TensorName(".*decoder/logits_dense/kernel", "lm_head.weight", "io")


TABLES: Mapping[str, Sequence[TensorName]] = {
    # Our own Llama, with stacked layers or with separate ones.
    "cage": tuple(_cage("huggingface")),
    # The Flax models of transformers: its own names, with the names of Flax at the end.
    "flax": (
        TensorName(r"(.*)/kernel", r"\1.weight", "io"),
        TensorName(r"(.*)/(?:scale|embedding)", r"\1.weight"),
    ),
    # Llama 3, Qwen 2 and Qwen 3 of tunix.
    "tunix": tuple(_tunix()),
    # Qwen 2 and Qwen 3 of MaxText. Of Llama and Mistral it has other queries: divided
    # by the root of the size of a head, and their rows in another order.
    "maxtext_qwen": tuple(_maxtext()),
}
GGUF_TABLES: Mapping[str, Sequence[TensorName]] = {"cage": tuple(_cage("gguf"))}
OF_TRANSFORMERS = "transformers"
"""The table of a GGUF that is made for its architecture."""


class Source(NamedTuple):
    """A part of a tensor: a parameter, or one place and some outputs of it.

    Attributes:
      path: the parameter.
      axes: as in `TensorName`.
      place: the place in a stack, or None.
      outputs: the first output and the one after the last, or None for all.
    """

    path: str
    axes: str | None
    place: int | None = None
    outputs: tuple[int, int] | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the part, of a parameter of this shape."""
        if self.axes is not None:
            sizes: dict[str, list[int]] = {letter: [] for letter in self.axes}
            for letter, size in zip(self.axes, shape):
                sizes[letter].append(size)
            shape = tuple(
                math.prod(sizes[letter]) for letter in "oi" if letter in sizes
            )
        if self.outputs is None:
            return shape
        return (self.outputs[1] - self.outputs[0], *shape[1:])


def table_of(
    names: Any, tables: Mapping[str, Sequence[TensorName]] = TABLES
) -> Sequence[TensorName]:
    """Resolves a `names` argument: None, a name in `tables`, or a table.

    Raises:
      TypeError, ValueError: if it is anything else.
    """
    if names is None:
        return tables["cage"]
    remedy = f"Use one of {list(tables)}, or a list of TensorName(path, tensor, axes)."
    if isinstance(names, str):
        if names not in tables:
            raise ValueError(f"`names` must be a table; got {names!r}. {remedy}")
        return tables[names]
    if not isinstance(names, Sequence) or not all(
        isinstance(line, TensorName) for line in names
    ):
        raise TypeError(f"`names` must be a table; got {str(names)[:80]}. {remedy}")
    return names


def sources_of(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Like],
    table: Sequence[TensorName],
) -> dict[str, list[Source]]:
    """Finds the parts of each tensor of a template, see `matched`.

    Raises:
      ValueError: if a parameter is left over, if a tensor has none, or if shapes
        differ; it lists all of them.
    """
    found = matched(shapes, tensors, table)
    problems = [f"`{path}`: {text}" for path, text in found.left_over.items()]
    problems += found.misfits.values()
    problems += [
        f"`{name}` {list(tensors[name].shape)} of the template: no parameter is for it"
        for name in found.without
        if not problems
    ]
    if problems:
        raise ValueError(
            f"`codes` must have the parameters of the template, each once; got\n"
            f"{first_lines(problems, LISTED)}\n"
            f"Give `names` a line for each of them, and take what was not trained from "
            f"read_tensors."
        )
    return found.parts


class Matched(NamedTuple):
    """The match of parameters and the tensors of a template.

    Attributes:
      parts: the parts of each tensor that has some, in the order in which they are
        joined.
      left_over: why a parameter is in no tensor, by path.
      misfits: how the parts of a tensor do not have its shape, by name.
      without: the names of weights that have no parameter.
    """

    parts: dict[str, list[Source]]
    left_over: dict[str, str]
    misfits: dict[str, str]
    without: list[str]


def matched(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Like],
    table: Sequence[TensorName],
) -> Matched:
    """Finds the parts of each tensor of a template.

    A path that is a tensor's name, also with "/" for ".", is that tensor. The first
    line of the table that matches another path says what it is.

    Args:
      shapes: the shape of each parameter by path.
      tensors: the tensors of the template by name.
      table: the lines.
    """
    parts: list[tuple[int, str, Source]] = []
    left_over: dict[str, str] = {}
    for path, shape in shapes.items():
        name = path if path in tensors else path.replace("/", ".")
        if name in tensors:
            parts.append((-1, name, Source(path, None)))
            continue
        try:
            number, line = next(
                (number, line)
                for number, line in enumerate(table)
                if re.fullmatch(line.path, path)
            )
            found = _parts(path, shape, line, tensors)
        except StopIteration:
            left_over[path] = "no tensor of the template has this name"
        except ValueError as error:
            left_over[path] = str(error)
        else:
            parts += [(number, name, source) for name, source in found]
    found_parts: dict[str, list[Source]] = {}
    for _, name, source in sorted(parts, key=lambda part: part[0]):
        found_parts.setdefault(name, []).append(source)
    misfits = {
        name: text
        for name, sources in found_parts.items()
        if (text := _misfit(name, sources, shapes, tensors[name].shape))
    }
    without = [
        name
        for name, tensor in tensors.items()
        if name not in found_parts and is_weight(name, tensor)
    ]
    return Matched(found_parts, left_over, misfits, without)


def is_own_name(path: str, name: str) -> bool:
    """Tells whether a parameter has the name of a tensor, and its layout."""
    return path == name or path.replace("/", ".") == name


def is_weight(name: str, tensor: Like) -> bool:
    """Tells whether a tensor of a template is a parameter, and no constant."""
    return "float" in str(tensor.dtype) and not _CONSTANT.fullmatch(name)


def is_linear(name: str, tensor: Like) -> bool:
    """Tells whether a tensor looks like the weight of a linear layer."""
    return (
        len(tensor.shape) == 2
        and name.endswith(".weight")
        and is_weight(name, tensor)
        and not _EMBEDDING.fullmatch(module_of(name))
    )


def module_of(name: str) -> str:
    """Returns the name of the module of a weight."""
    return name.removesuffix(".weight")


def _parts(path, shape, line, tensors):
    """Returns the names of the tensors of one parameter, each with its part of it."""
    axes = line.axes
    if axes is not None and len(axes) != len(shape):
        raise ValueError(f"its axes are {axes!r} in `names`, but its shape is {shape}")
    several = [line.tensor] if isinstance(line.tensor, str) else line.tensor
    match = re.fullmatch(line.path, path)
    assert match is not None
    try:
        # A group may have "/" where names have ".".
        expanded = [match.expand(tensor).replace("/", ".") for tensor in several]
    except re.error as error:
        raise ValueError(f"{line.tensor!r} in `names`: {error}") from error
    stacked = axes is not None and "l" in axes
    found = []
    for place in range(shape[axes.index("l")]) if stacked else [None]:
        names = [name.replace("{}", str(place)) for name in expanded]
        unknown = [name for name in names if name not in tensors]
        if unknown:
            raise ValueError(f"the template has no tensor `{unknown[0]}`")
        begin = 0
        for name in names:
            end = begin + (tensors[name].shape or (1,))[0]
            outputs = (begin, end) if len(names) > 1 else None
            found.append((name, Source(path, axes, place, outputs)))
            begin = end
        whole = found[-1][1]._replace(outputs=None).shape(shape)[0]
        if len(names) > 1 and begin != whole:
            raise ValueError(f"its outputs are {whole}, but those of {names} {begin}")
    return found


def _misfit(name, sources, shapes, expected):
    """Says how parts do not make the whole tensor; empty if they do."""
    found = [source.shape(shapes[source.path]) for source in sources]
    if len(found) == 1:
        fits = found[0] == expected
    else:
        rest = {shape[1:] for shape in found} | {expected[1:]}
        outputs = [shape[0] if shape else 0 for shape in found]
        joined = len(rest) == 1 and sum(outputs) == expected[0]
        stacked = {(len(found), *shape) for shape in found} == {expected}
        fits = joined or stacked
    if fits:
        return ""
    given = [f"`{part.path}` {list(size)}" for part, size in zip(sources, found)]
    return f"{' and '.join(given)}: for `{name}` {list(expected)} of the template"
