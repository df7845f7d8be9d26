"""Export of a function and its codes as a program that runs without this library.

    import jax
    from safetensors.numpy import load_file

    with open("folder/program.bin", "rb") as file:
        program = jax.export.deserialize(file.read())
    y = program.call(load_file("folder/weights.safetensors"), x)

The program unpacks and dequantizes the codes. It runs wherever jax runs, and in later
versions of jax within the compatibility guarantees of `jax.export`, which needs the
package flatbuffers to read it.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from reprlib import repr as short
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_choice
from cage_jax.arrays.packing import unpack_bits
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray, decoded, packed
from cage_jax.export.files import (
    Path,
    as_path,
    check_installed,
    has,
    inside,
    malformed,
    read_json,
    write_json,
)
from cage_jax.export.safetensors_files import read, write
from cage_jax.export.target import Target
from cage_jax.export.tree_entries import Tree, check_array, entries_of, parts_of
from cage_jax.export.writing import new_folder
from cage_jax.llama.loaded import Model

Weights = Literal["arguments", "constants"]
PROGRAM, WEIGHTS, DESCRIPTION = "program.bin", "weights.safetensors", "program.json"

FORMAT, VERSION = "cage_jax program", "1"
_PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
_PACKED = ("codes", "zero_point")  # parts that are packed; others keep their dtypes
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
    same tree as `codes`. The program names no source file of this machine.

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
      overwrite: whether to replace a folder that an export wrote, with nothing else
        in it.

    Raises:
      ImportError: if flatbuffers is missing, which `jax.export` needs to write the
        program, and to read it.
      TypeError: if a leaf or an argument is not an array.
      ValueError: if `weights` has another value, if constants need almost 2 GiB or
        more, if two arrays have one path, or if one has NaN or infinities.
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if it
        holds anything that no export wrote.

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
    check_installed("flatbuffers", "writing a program")
    check_choice("weights", weights, get_args(Weights))
    if isinstance(platforms, str):
        raise TypeError(
            f"`platforms` must be a sequence; got {platforms!r}. Use [{platforms!r}]."
        )
    if not platforms or any(name not in _PLATFORMS for name in platforms):
        raise ValueError(
            f"`platforms` must be some of {_PLATFORMS}; got {tuple(platforms)!r}. Use "
            f"'cuda' for NVIDIA GPUs, 'rocm' for AMD GPUs."
        )
    if not isinstance(arguments, list | tuple):
        raise TypeError(
            f"`arguments` must be a list or a tuple of the arguments of `function` "
            f"after the parameters; got {type(arguments).__name__}. Use [x]."
        )
    for name, leaf in zip(*flatten_with_paths(tuple(arguments))[:2]):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"`{name}`: `arguments` must be trees of arrays or ShapeDtypeStructs; "
                f"got {type(leaf).__name__}. Use jnp.asarray."
            )
    entries, _ = entries_of(codes)  # which checks the leaves
    paths, leaves, structure = flatten_with_paths(codes, QuantizedArray)
    check_finite(dict(zip(paths, leaves)))
    words = _packed(paths, leaves)
    is_constant = weights == "constants"
    size = sum(array.nbytes for array in words.values())
    if is_constant and size > _MOST_CONSTANTS:
        raise ValueError(
            f"`weights` must be 'arguments' for more than {_MOST_CONSTANTS} bytes; got "
            f"{size}. A program cannot be larger."
        )

    def of_words(words, *arguments):
        params = [_unpacked(words, path, leaf) for path, leaf in zip(paths, leaves)]
        values = [
            decoded(param) if isinstance(param, QuantizedArray) else param
            for param in params
        ]
        return function(structure.unflatten(values), *arguments)

    def of_constants(*arguments):
        # Keeps the compiler from folding these into the larger dequantized constants.
        constants = lax.optimization_barrier(jax.tree.map(jnp.asarray, words))
        return of_words(constants, *arguments)

    specs = _specs(tuple(arguments), shapes)
    export = jax.export.export(
        jax.jit(of_constants if is_constant else of_words), platforms=tuple(platforms)
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), words)
    given = () if is_constant else (abstract,)
    with _no_source_locations():
        exported = export(*given, *specs)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": _described(specs),
        "outputs": _described(
            jax.tree.unflatten(exported.out_tree, exported.out_avals)
        ),
        "weights": None if is_constant else WEIGHTS,
        "parameters": entries,
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / PROGRAM).write_bytes(exported.serialize())
        write_json(folder / DESCRIPTION, description)
        if not is_constant:
            write(folder / WEIGHTS, words)


@contextlib.contextmanager
def _no_source_locations() -> Iterator[None]:
    """Keeps the paths of this machine's source files out of a program."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def is_folder(path: pathlib.Path) -> bool:
    """Tells whether a folder has the files that `stablehlo` writes."""
    return has(path, PROGRAM, DESCRIPTION)


def read_codes(path: Path) -> Any:
    """Reads the codes in the folder of a program as their original tree.

    Raises:
      MalformedFileError: if the folder is damaged.
      ValueError: if the codes are constants in the program; for arrays of 64 bits
        without `jax_enable_x64`.
    """
    folder = as_path(path)
    description = read_json(inside(folder, DESCRIPTION))
    said = description.get("format"), description.get("version")
    if said != (FORMAT, VERSION):
        rule = f"{DESCRIPTION} must describe a program of version {VERSION}"
        raise malformed(rule, short(said), "Get the file again, or upgrade cage_jax.")
    if description.get("weights") is None:
        raise ValueError(
            f"`path` must be a folder with the codes in {WEIGHTS}; got {folder}, whose "
            f"codes are constants in the program. Export it with weights='arguments'."
        )
    words, _ = read(inside(folder, WEIGHTS))
    tree = Tree(description.get("parameters"))
    leaves = {}
    for path, like in tree.like.items():
        for name, (part, format) in _parts(path, like).items():
            dtype, shape = _stored_dtype(part.dtype), part.shape
            if format is not None:
                dtype, shape = np.uint8, (-(-math.prod(shape) * format.bits // 8),)
            check_array(name, words.get(name), dtype, shape)
        leaves[path] = jax.tree.map(jnp.asarray, _unpacked(words, path, like))
    return tree.build(leaves)


def _specs(arguments, shapes):
    """Returns the specs of the program's arguments, with symbolic lengths."""
    reason = "another number of axes"
    try:
        shapes_or_text = tuple(shapes) if isinstance(shapes, list) else shapes
        specs = jax.export.symbolic_args_specs(arguments, shapes_or_text)
        pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(arguments))
        if all(len(spec.shape) == len(leaf.shape) for spec, leaf in pairs):
            return specs
    except (AttributeError, TypeError, ValueError) as error:
        reason = str(error)
    actual = [leaf.shape for leaf in jax.tree.leaves(arguments)]
    raise ValueError(
        f"`shapes` must fit the shapes of `arguments`, {actual}; got {shapes!r} "
        f"({reason}). Use 'b, ...' for a first axis of any length."
    )


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


def _parts(path, leaf):
    """Returns the arrays of a parameter by name, each with its format if packed."""
    if not isinstance(leaf, QuantizedArray):
        return {path: (leaf, None)}
    begin = f"{path}/" if path else ""
    return {
        f"{begin}{name}": (part, leaf.quantizer.format if name in _PACKED else None)
        for name, part in parts_of(leaf).items()
    }


def _packed(paths, leaves):
    """Returns the arrays to store by name, in dtypes that NumPy has."""
    words: dict[str, np.ndarray] = {}
    for path, leaf in zip(paths, leaves):
        for name, (part, format) in _parts(path, leaf).items():
            if name in words:
                raise ValueError(
                    f"`{name}`: `codes` must have one array for each path; got two. "
                    f"Use other keys."
                )
            part = np.asarray(part)
            part = part if format is None else packed(part, format)
            words[name] = part.view(_stored_dtype(part.dtype))
    return words


def _stored_dtype(dtype):
    # NumPy lacks bfloat16 and 8-bit floats, so they are stored as raw bits.
    dtype = np.dtype(dtype)
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"uint{8 * dtype.itemsize}")


def _unpacked(words, path, like):
    """Restores a parameter from its stored arrays, in a program or outside of one."""
    parts = []
    for name, (part, format) in _parts(path, like).items():
        stored = words[name]
        if format is not None:
            numbers = unpack_bits(stored, format.bits, math.prod(part.shape))
            stored = format.from_index(numbers).reshape(part.shape)
        parts.append(stored if stored.dtype == part.dtype else stored.view(part.dtype))
    if not isinstance(like, QuantizedArray):
        return parts[0]
    return dataclasses.replace(like, **dict(zip(parts_of(like), parts)))


TARGET = Target(
    written_by="export.stablehlo(function, codes, ...)",
    read_by="any process with jax, flatbuffers and safetensors, on CPU, TPU or GPU, "
    "without this library",
    holds="every quantizer, any model",
    recognises=is_folder,
    read=lambda path: Model(read_codes(path), None, {}),
)
