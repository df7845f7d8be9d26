"""The tensors of a file, each beside what was trained for it."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.audit_report import Finding
from cage_jax.export.compressed_tensors import TARGET as TRANSFORMERS
from cage_jax.export.compressed_tensors_arrays import kernel_of
from cage_jax.export.compressed_tensors_schemes import (
    SUFFIXES,
    Scheme,
    check_read,
    declared_schemes,
)
from cage_jax.export.files import MalformedFileError, inside, malformed, read_json
from cage_jax.export.gguf import TARGET as GGUF
from cage_jax.export.gguf_blocks import DTYPES, array_of
from cage_jax.export.gguf_templates import change_of, read_template, table_for
from cage_jax.export.loading import located
from cage_jax.export.safetensors_files import Like, read_shards
from cage_jax.export.template_names import (
    Source,
    TensorName,
    is_linear,
    matched,
    module_of,
    table_of,
)
from cage_jax.export.template_parts import along_inputs, joined, part_of
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.folding import folded

_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CLASS = "Linear"  # the name by which config.json means all linear layers


class Pair(NamedTuple):
    """A tensor of a file and what was trained for it, in one layout.

    Attributes:
      path: the name of the tensor.
      trained: floats or codes.
      shipped: floats or codes of the file.
      kind: how the file stores floats; None for their dtype.
    """

    path: str
    trained: Any
    shipped: Any
    kind: str | None = None


def pairs(
    file: Any, trained: Mapping[str, Any], names: str | Sequence[TensorName] | None
) -> Iterator[Pair | Finding]:
    """Yields each tensor of a file with its parameter, and what fits nothing.

    Args:
      file: anything that `cage_jax.load` reads, or the folder of a transformers model.
      trained: floats and codes by path.
      names: what parameters are called in a transformers model or a GGUF.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `cage_jax.load` does.
      TypeError, ValueError: if `names` is no table.
    """
    location, target = located(file)
    if target is GGUF:
        return _of_gguf(location, trained, names)
    table = table_of(names)
    if target is TRANSFORMERS:
        return _of_transformers(location, trained, table)
    return _of_tree(target.read(location).params, trained)


def _of_tree(tree, trained):
    paths, leaves, _ = flatten_with_paths(tree, QuantizedArray)
    shipped = dict(zip(paths, leaves))
    for path in [path for path in shipped if path not in trained]:
        yield _extra(path, shipped[path])
    for path, array in trained.items():
        if path in shipped:
            yield Pair(path, array, shipped[path])
        else:
            yield Finding(path, "missing", "a parameter that the file does not have")


def _extra(path, array):
    is_codes = isinstance(array, QuantizedArray)
    what = str(array.quantizer) if is_codes else array.dtype.name
    text = f"{what} {list(array.shape)} in the file, but no parameter is for it"
    return Finding(path, "extra", text)


# --- GGUF -----------------------------------------------------------------------------


def _of_gguf(path, trained, names):
    template = read_template(path)
    stored = template.content.tensors
    trained = _folded(trained, lambda: GGUF.read(path).config)
    codes = Like(np.dtype(np.float32), ())
    like = {
        name: each if stored[name].kind in DTYPES else codes._replace(shape=each.shape)
        for name, each in template.tensors.items()
    }

    def pair(name, parts):
        whole = _whole(parts, trained, like[name].shape)
        order, plus = change_of(name, parts, template)
        if plus and not isinstance(whole, QuantizedArray):
            whole = whole.astype(np.float32) + np.float32(plus)
        if order is not None:
            whole = jax.tree.map(lambda part: part[order], whole)
        kind = stored[name].kind
        shipped = array_of(stored[name], -1)
        return Pair(name, whole, shipped, _KINDS.get(kind, kind))

    shapes = {path: tuple(leaf.shape) for path, leaf in trained.items()}
    found = matched(shapes, like, table_for(names, shapes, template))
    yield from _unmatched(found)
    for name in found.without:
        yield _extra(name, array_of(stored[name], -1))
    yield from _matched(found, like, pair)


# --- folders of transformers ----------------------------------------------------------


def _of_transformers(folder, trained, table):
    content = read_json(inside(folder, "config.json"))
    quantization = content.get("quantization_config")
    schemes = declared_schemes(quantization)
    arrays = read_shards(folder)
    check_read(arrays)
    file = _Tensors(_taken_codes(arrays), arrays, schemes)
    trained = _folded(trained, lambda: LlamaConfig.from_huggingface(content))

    def pair(name, parts):
        return Pair(
            name, _whole(parts, trained, file.like[name].shape), file.array(name)
        )

    shapes = {path: tuple(leaf.shape) for path, leaf in trained.items()}
    found = matched(shapes, file.like, table)
    yield from _unmatched(found)
    for name in found.without:
        if name != "lm_head.weight" or not content.get("tie_word_embeddings"):
            yield _extra(name, file.array(name))
    yield from _matched(found, file.like, pair)
    if quantization is not None:
        yield from _wrong_config(quantization, file)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of a folder, (out, in).

    Attributes:
      coded: what is stored for codes, by suffix, by the name of their weight.
      floats: the other tensors by name.
      schemes: the schemes that codes may have.
    """

    coded: dict[str, dict[str, np.ndarray]]
    floats: dict[str, np.ndarray]
    schemes: Sequence[Scheme]

    @functools.cached_property
    def like(self) -> dict[str, Like]:
        """The shape of each tensor, and its dtype if it holds no codes."""
        stored = {name: _shape(name, parts) for name, parts in self.coded.items()}
        like = {
            name: Like(each.dtype, each.shape) for name, each in self.floats.items()
        }
        return like | {
            name: Like(np.dtype(np.float32), shape) for name, shape in stored.items()
        }

    def array(self, name):
        """Returns the floats or codes of a tensor."""
        if name in self.floats:
            return self.floats[name]
        module, shape = module_of(name), self.like[name].shape[::-1]
        codes: Any = kernel_of(module, self.coded[name], shape, self.schemes)
        quantizer = dataclasses.replace(codes.quantizer, axis=-1)
        codes = jax.tree.map(lambda part: np.asarray(part).T, codes)
        return dataclasses.replace(codes, quantizer=quantizer)


def _taken_codes(arrays):
    """Takes the tensors of codes out of `arrays`, and returns them by weight."""
    ends = {name: name.rpartition(".")[::2] for name in arrays}
    modules = [module for module, suffix in ends.values() if suffix in SUFFIXES[1:]]
    return {
        f"{module}.weight": {
            suffix: arrays.pop(f"{module}.{suffix}")
            for suffix in SUFFIXES
            if f"{module}.{suffix}" in arrays
        }
        for module in dict.fromkeys(modules)
    }


def _shape(name, stored):
    """Returns the shape (out, in) of codes; `kernel_of` checks what it says."""
    if "weight_shape" in stored:
        said = stored["weight_shape"]
        shape = tuple(said.tolist()) if said.shape == (2,) else ()
    elif "weight" in stored:
        shape = stored["weight"].shape
    else:
        packed = stored.get("weight_packed", np.zeros(0)).shape
        shape = *packed[:-1], 2 * sum(packed[-1:])
    if len(shape) != 2 or not min(shape) >= 1:
        rule = f"`{module_of(name)}`: the file must have a matrix for its scales"
        raise malformed(rule, f"the shape {shape}")
    return shape


# --- both -----------------------------------------------------------------------------


def _folded(trained, config):
    """Folds rotations as the writer of a Llama does; `config` returns its config."""
    if not any(
        isinstance(leaf, QuantizedArray) and leaf.quantizer.hadamard is not None
        for leaf in trained.values()
    ):
        return trained
    try:
        return folded(trained, config())
    except (TypeError, ValueError):
        return trained


def _unmatched(found):
    for path, text in found.left_over.items():
        yield Finding(path, "missing", text.replace("the template", "the file"))
    for name, text in found.misfits.items():
        yield Finding(name, "shape", text.replace("the template", "the file"))


def _matched(found, like, pair):
    """Yields the pairs in the order of the file; codes that it cannot hold are none."""
    for name in like:
        if name in found.misfits or name not in found.parts:
            continue
        try:
            yield pair(name, found.parts[name])
        except MalformedFileError:
            raise
        except ValueError as error:
            yield Finding(name, "layout", f"codes that no such file holds: {error}")


def _whole(
    sources: Sequence[Source], trained: Mapping[str, Any], shape: tuple[int, ...]
) -> Any:
    """Makes a tensor of its parts; raises ValueError for codes that have no scheme."""
    leaves = [trained[source.path] for source in sources]
    parts = [part_of(leaf, source) for leaf, source in zip(leaves, sources)]
    are_codes = {isinstance(leaf, QuantizedArray) for leaf in leaves}
    if are_codes == {False}:
        return np.concatenate(parts).reshape(shape) if len(parts) > 1 else parts[0]
    if len(are_codes) > 1:
        raise ValueError("floats and codes in one. Quantize all of it or nothing.")
    if len(sources) == 1 and sources[0].axes is None:
        return parts[0]
    quantizers = {along_inputs(leaf, part) for leaf, part in zip(leaves, sources)}
    if len(quantizers) > 1:
        raise ValueError("several quantizers in one. Give all parts the same one.")
    whole = joined(parts, quantizers.pop())
    if len(shape) == 2:
        return whole
    # A stack; the last axis of scales is shorter.
    return jax.tree.map(lambda part: part.reshape(*shape[:-1], part.shape[-1]), whole)


# --- what config.json says ------------------------------------------------------------


def _wrong_config(quantization, file):
    """Yields what the targets and `ignore` say of layers that are not so.

    Regular expressions are not used, because a malicious one could take hours. Where
    there is one, or the name of another class, less is known.
    """
    like, ignore = file.like, _names(quantization.get("ignore"))
    targets = {
        name
        for group in quantization["config_groups"].values()
        for name in _names(group.get("targets"))
    }
    linear = {module_of(name) for name, each in like.items() if is_linear(name, each)}
    modules = {name.rpartition(".")[0] for name in like}
    if "lm_head.weight" not in like:  # it is the embedding
        modules.add("lm_head")
    codes = {module_of(name) for name in file.coded}
    say = "config.json lists it in `ignore`, but"
    for name in ignore:
        if name in codes:
            yield Finding(name, "config", f"{say} it has codes in the file")
        elif name not in modules and not name.startswith("re:"):
            yield Finding(name, "config", f"{say} the file has no such layer")
    if _CLASS in targets and not any(name.startswith("re:") for name in ignore):
        for name in sorted(linear - codes - set(ignore)):
            text = "floats in the file, but config.json says that all layers have codes"
            yield Finding(name, "config", f"{text} that are not in `ignore`")
    if targets <= modules:
        for name in sorted(codes - targets):
            text = "codes in the file, but no group of config.json has it as a target"
            yield Finding(name, "config", text)
        for name in sorted(targets - codes):
            text = "floats in the file, but a group of config.json has it as a target"
            yield Finding(name, "config", text)


def _names(value):
    """Returns the texts in a list of config.json."""
    listed = value if isinstance(value, list) else []
    return [name for name in listed if isinstance(name, str)]
