"""Export of a function and its codes as a program that needs only jax.

    import jax
    from safetensors.numpy import load_file

    with open("folder/program.bin", "rb") as file:
        program = jax.export.deserialize(file.read())
    y = program.call(load_file("folder/weights.safetensors"), x)

The program unpacks and dequantizes the codes. It runs wherever jax runs, and in later
versions of jax within the compatibility guarantees of `jax.export`.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from reprlib import repr as short
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.packing import unpack_bits
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.quantized_array import QuantizedArray, decoded, packed
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    inside,
    new_folder,
    read_json,
)
from cage_jax.export.safetensors_files import read, write
from cage_jax.export.trees import Tree, described, malformed

Weights = Literal["arguments", "constants"]
PROGRAM, WEIGHTS, DESCRIPTION = "program.bin", "weights.safetensors", "program.json"

FORMAT, VERSION = "cage_jax program", "1"
_PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
_MOST_CONSTANTS = 2**31 - 2**24  # what the format of the program has room for


def stablehlo(
    function: Callable,
    codes: Any,
    path: Path,
    *,
    arguments: Sequence[Any],
    shapes: Any = None,
    weights: Weights = "arguments",
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    overwrite: bool = False,
) -> None:
    """Exports `function(params, *arguments)` with the codes of its parameters.

    The folder has `program.bin`, for `jax.export.deserialize`; `program.json`, which
    describes the inputs and outputs; and the codes, packed with `bits` bits for each
    parameter. The codes are either in `weights.safetensors`, as an argument of the
    program, or constants in it. `function` gets the values of `dequantize`, in the
    same tree as `codes`.

    Args:
      function: a function of parameters and arguments that `jax.jit` can compile.
      codes: the parameters, any tree of `QuantizedArray`s and arrays.
      path: path of the folder.
      arguments: the arguments of `function` after the parameters, as trees of arrays
        or `jax.ShapeDtypeStruct`s; only their shapes and dtypes are used.
      shapes: None for the shapes of `arguments`; otherwise a text or a prefix tree of
        texts, as in `jax.export.symbolic_args_specs`. Letters stand for any length:
        with "b, ..." the program takes batches of all sizes.
      weights: "arguments" makes them the program's first argument, a dict of the arrays
        in the file; "constants" puts them into the program.
      platforms: platforms that can run the program; this machine need not have them.
      overwrite: whether to replace an existing folder.

    Raises:
      ImportError: if flatbuffers is missing, which `jax.export` needs.
      TypeError: if a leaf or an argument is not an array.
      ValueError: if `weights` has another value, if constants need almost 2 GiB or
        more, or if two arrays have one path.
      FileExistsError: if the path exists, unless `overwrite`.

    Example:
      >>> import cage_jax as cage
      >>> import jax, pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from cage_jax.export.stablehlo import stablehlo
      >>> from safetensors.numpy import load_file
      >>> codes = {"kernel": cage.quantize(jnp.eye(32, 4), cage.int4())}
      >>> def model(params, x):
      ...     return x @ params["kernel"]
      >>> inputs = [jax.ShapeDtypeStruct((1, 32), jnp.float32)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "model"
      ...     stablehlo(model, codes, path, arguments=inputs, shapes="b, ...")
      ...     program = jax.export.deserialize((path / "program.bin").read_bytes())
      ...     loaded = load_file(path / "weights.safetensors")
      >>> loaded["kernel/codes"].nbytes, program.call(loaded, jnp.ones((7, 32))).shape
      (64, (7, 4))
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "a program cannot be written without the package flatbuffers, which is not "
            'installed. Run pip install "cage_jax[export]", or in a clone '
            "pip install -e '.[export]'."
        )
    if weights not in get_args(Weights):
        raise ValueError(
            f"`weights` must be one of {get_args(Weights)}; got {weights!r}. Use "
            f"'arguments' for large models."
        )
    if isinstance(platforms, str):
        raise TypeError(
            f"`platforms` must be a sequence; got {platforms!r}. Use [{platforms!r}]."
        )
    strange = [name for name in platforms if name not in _PLATFORMS]
    if strange or not platforms:
        raise ValueError(
            f"`platforms` must be some of {_PLATFORMS}; got {tuple(platforms)!r}. Use "
            f"'cuda' for GPUs of NVIDIA, 'rocm' for those of AMD."
        )
    if not isinstance(arguments, list | tuple):
        raise TypeError(
            f"`arguments` must be a list or a tuple, of all that `function` takes "
            f"behind the parameters; got {type(arguments).__name__}. Use [one]."
        )
    _check_arguments(arguments)
    paths, leaves, structure = flatten_with_paths(codes, _is_codes)
    words = _words(paths, leaves)
    is_constant = weights == "constants"
    size = sum(array.nbytes for array in words.values())
    if is_constant and size > _MOST_CONSTANTS:
        raise ValueError(
            f"`weights` must be 'arguments' for more than {_MOST_CONSTANTS} bytes; got "
            f"{size}. A program has no room for them."
        )

    def of_words(words, *arguments):
        values = [_value(words, path, leaf) for path, leaf in zip(paths, leaves)]
        return function(structure.unflatten(values), *arguments)

    def of_constants(*arguments):
        # Keeps the compiler from folding these into the larger dequantized constants.
        kept = lax.optimization_barrier(jax.tree.map(jnp.asarray, words))
        return of_words(kept, *arguments)

    specs = _specs(tuple(arguments), shapes)
    export = jax.export.export(
        jax.jit(of_constants if is_constant else of_words), platforms=tuple(platforms)
    )
    given = () if is_constant else (jax.tree.map(_abstract, words),)
    exported = export(*given, *specs)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": _described(specs),
        "outputs": _described(
            jax.tree.unflatten(exported.out_tree, exported.out_avals)
        ),
        "weights": None if is_constant else WEIGHTS,
        "parameters": described(codes)[0],
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / PROGRAM).write_bytes(exported.serialize())
        text = json.dumps(description, indent=2)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        if not is_constant:
            write(folder / WEIGHTS, words)


def is_folder(path: pathlib.Path) -> bool:
    """Returns whether a folder has the files that `stablehlo` writes."""
    return (path / PROGRAM).is_file() and (path / DESCRIPTION).is_file()


def read_codes(path: Path) -> Any:
    """Reads the codes of an exported program as their original tree.

    Args:
      path: path of the folder.

    Raises:
      MalformedFileError: if the folder is damaged.
      ValueError: if the codes are constants in the program.
    """
    folder = pathlib.Path(path)
    description = read_json(folder / DESCRIPTION)
    said = description.get("format"), description.get("version")
    if said != (FORMAT, VERSION):
        raise MalformedFileError(
            f"{DESCRIPTION} must be of a program of version {VERSION}; got "
            f"{short(said)}. Get the folder again, or upgrade cage_jax."
        )
    if description.get("weights") is None:
        raise ValueError(
            f"the codes must be beside the program to be read; got {folder}, with its "
            f"codes as constants. Export it with weights='arguments'."
        )
    words, _ = read(inside(folder, WEIGHTS))
    tree = Tree(description.get("parameters"))
    return tree.of(
        {path: _array(words, path, like) for path, like in tree.like.items()}
    )


def _array(words, path, like):
    if not _is_codes(like):
        return jnp.asarray(_stored_as(words, path, like))
    format, found = like.quantizer.format, {}
    for name in (*_PACKED, *_PLAIN):
        part, name_there = getattr(like, name), _name(path, name)
        if part is None:
            continue
        if name in _PLAIN:
            found[name] = jnp.asarray(_stored_as(words, name_there, part))
            continue
        count = math.prod(part.shape)
        data = np.uint8, (-(-count * format.bits // 8),)
        bits = unpack_bits(_of(words, name_there, *data), format.bits, count)
        found[name] = format.from_index(bits.reshape(part.shape))
    return dataclasses.replace(like, **found)


def _stored_as(words, name, like):
    """Reads an array whose dtype the file may store as raw bits."""
    dtype = np.dtype(like.dtype)
    stored = dtype if dtype.isbuiltin == 1 else np.dtype(f"uint{_bits(dtype)}")
    return _of(words, name, stored, like.shape).view(dtype)


def _of(words, name, dtype, shape):
    found = words.get(name)
    if found is None or (found.dtype, found.shape) != (np.dtype(dtype), shape):
        got = None if found is None else (str(found.dtype), found.shape)
        raise malformed(name, f"it must be {np.dtype(dtype)} of shape {shape}", got)
    return found


def _check_arguments(arguments):
    for path, leaf in zip(*flatten_with_paths(tuple(arguments))[:2]):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"`{path}`: `arguments` must be trees of arrays or ShapeDtypeStructs; "
                f"got {type(leaf).__name__}. Use jnp.asarray."
            )


def _specs(arguments, shapes):
    """Returns the specs of the program's arguments, with symbolic lengths."""
    reason = "another number of axes"
    try:
        specs = jax.export.symbolic_args_specs(arguments, _as_tuple(shapes))
        pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(arguments))
        if all(len(spec.shape) == len(leaf.shape) for spec, leaf in pairs):
            return specs
    except (AttributeError, TypeError, ValueError) as error:
        reason = str(error)
    found = [leaf.shape for leaf in jax.tree.leaves(arguments)]
    raise ValueError(
        f"`shapes` must fit the shapes of `arguments`, {found}; got {shapes!r} "
        f"({reason}). Use 'b, ...' for a first axis of any length."
    )


def _as_tuple(shapes):
    return tuple(shapes) if isinstance(shapes, list) else shapes


def _is_codes(leaf):
    return isinstance(leaf, QuantizedArray)


def _abstract(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _described(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return [
        {
            "path": path,
            "shape": [n if isinstance(n, int) else str(n) for n in leaf.shape],
            "dtype": str(leaf.dtype),
        }
        for path, leaf in zip(paths, leaves)
    ]


# --- what is stored -------------------------------------------------------------------

_PACKED = ("codes", "zero_point")
_PLAIN = ("scale", "offset", "tensor_divisor")


def _words(paths, leaves):
    """Returns the arrays to store by name, in dtypes that NumPy has."""
    words: dict[str, np.ndarray] = {}
    for path, leaf in zip(paths, leaves):
        found = {path: leaf}
        if _is_codes(leaf):
            parts = {name: getattr(leaf, name) for name in (*_PACKED, *_PLAIN)}
            found = {
                _name(path, name): packed(np.asarray(part), leaf.quantizer.format)
                if name in _PACKED
                else part
                for name, part in parts.items()
                if part is not None
            }
        for name, part in found.items():
            if name in words:
                raise ValueError(
                    f"`{name}`: `codes` must have one array for each path; got two. "
                    f"Use other keys."
                )
            words[name] = _as_stored(name, part)
    return words


def _name(path, part):
    return f"{path}/{part}" if path else part


def _as_stored(name, array):
    dtype = getattr(array, "dtype", type(array).__name__)
    if isinstance(dtype, np.dtype) and dtype.isbuiltin == 1 and dtype.kind in "fiub":
        return np.asarray(array)
    # NumPy lacks bfloat16 and 8-bit floats, so they are stored as raw bits.
    if not isinstance(dtype, np.dtype) or _bits(dtype) not in (8, 16):
        raise TypeError(
            f"`{name}`: `codes` must be QuantizedArrays and arrays of floats, whole "
            f"numbers and bools; got {dtype}. Leave it out, or convert it."
        )
    return np.asarray(array).view(f"uint{_bits(dtype)}")


def _bits(dtype):
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


def _value(words, path, leaf):
    """Computes a parameter from its stored arrays, within the program."""
    if not _is_codes(leaf):
        return _from_stored(words[path], leaf.dtype)
    format = leaf.quantizer.format

    def part(name):
        like = getattr(leaf, name)
        if like is None:
            return None
        stored = words[_name(path, name)]
        if name in _PLAIN:
            return _from_stored(stored, like.dtype)
        numbers = unpack_bits(stored, format.bits, like.size)
        return format.from_index(numbers).reshape(like.shape)

    found = {name: part(name) for name in (*_PACKED, *_PLAIN)}
    return decoded(dataclasses.replace(leaf, **found))


def _from_stored(stored, dtype):
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)
