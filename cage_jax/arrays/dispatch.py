"""One computation in several forms; each program gets the form that suits it.

The form cannot be chosen while a function is traced. The platform may differ from that
of this process (compiling ahead of time, exporting), and automatic partitioning decides
later which part of an array a device holds. So a primitive stands for all forms, and
lowering the program replaces it by one of them.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

Implementation = Literal["xla", "pallas"]
_PLATFORMS = ("tpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Other forms of a `jax.numpy` function, for single devices and platforms.

    An instance is true if it has a kernel.

    Attributes:
      tpu: TPU kernel with the same arguments and results, or None if there is none.
      cuda: GPU kernel with the same arguments and results, or None.
      by_name: platforms whose kernel runs only if "pallas" is asked for. A kernel is
        chosen automatically only once it was measured on its platform and took at most
        1 / 1.15 of the time of the best `jax.numpy` form.
      xla_tpu: another `jax.numpy` form, faster on a TPU, or None.
      xla_cuda: another `jax.numpy` form, faster on a GPU, or None.
      pieces: a compiler may partition `xla_tpu` and `xla_cuda` over any number of
        devices that divides this; 0 for any number at all.
    """

    tpu: Callable | None = None
    cuda: Callable | None = None
    by_name: frozenset[str] = frozenset()
    xla_tpu: Callable | None = None
    xla_cuda: Callable | None = None
    pieces: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _PLATFORMS)

    @property
    def forms(self) -> dict[str, Callable | None]:
        """All forms by name, None where there is none."""
        names = (*_PLATFORMS, *(f"xla_{name}" for name in _PLATFORMS))
        return {name: getattr(self, name) for name in names}


def either(
    default: Callable,
    kernels: Kernels,
    *args: Any,
    implementation: Implementation | None = None,
    path: str = "",
) -> Any:
    """Computes `default(*args)`, by a kernel where one can run.

    A kernel runs if the program is compiled for its platform and runs on one device, or
    is inside a `shard_map` over all axes of the mesh. Elsewhere, and for platforms in
    `kernels.by_name`, the `jax.numpy` form that suits the platform runs instead.
    Derivatives are those of `default`.

    Args:
      default: a `jax.numpy` function; a compiler may partition it.
      kernels: the other forms; a form is traced only once it is chosen.
      *args: trees of arrays.
      implementation: "xla" for a `jax.numpy` form; "pallas" for the kernel, or an error
        if it cannot run; None for the kernel if it can run and is known to be faster.
      path: path of the parameter, for errors about it.

    Returns:
      The result of `default`.

    Raises:
      ValueError: for "pallas" without a kernel. Also when the program is lowered, if
        the platform has no kernel or the program is partitioned automatically.
    """
    check_implementation(implementation)
    if implementation == "pallas" and not kernels:
        raise _impossible(path, "there is none for this quantizer and shape")
    if implementation == "xla":
        kernels = dataclasses.replace(kernels, tpu=None, cuda=None)
    if not any(kernels.forms.values()):
        return default(*args)
    leaves, structure = jax.tree.flatten(args)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return default(*args)
        return _compiled(default, kernels, implementation, path)(*args)

    def flat(function):
        return lambda *leaves: jax.tree.leaves(
            function(*jax.tree.unflatten(structure, leaves))
        )

    jaxpr, out = jax.make_jaxpr(default, return_shape=True)(*args)
    found = _either_p.bind(
        *leaves,
        default=jaxpr,
        required=implementation == "pallas",
        by_name=kernels.by_name,
        pieces=kernels.pieces,
        path=path,
        **{name: form and flat(form) for name, form in kernels.forms.items()},
    )
    return jax.tree.unflatten(jax.tree.structure(out), found)


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def kernel_required(kernels: Kernels, x: jax.Array, path: str) -> jax.Array:
    """Returns `x`, or raises an error with the path if no kernel can run.

    This check takes the path, so `either` itself can go without one and is traced once
    for all arrays of a shape.
    """
    itself = Kernels(tpu=kernels.tpu and _itself, cuda=kernels.cuda and _itself)
    return either(_itself, itself, x, implementation="pallas", path=path)


@kernel_required.defjvp
def _differentiate_required(kernels, path, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return kernel_required(kernels, x, path), tangent


def _itself(x):
    return x


def check_implementation(implementation: Implementation | None) -> None:
    """Raises ValueError for an unknown name."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"`implementation` must be one of {get_args(Implementation)}, or None for "
            f"the faster one; got {implementation!r}. Use None."
        )


def _impossible(path, why):
    parameter = f"`{path}`: " if path else ""
    return ValueError(
        f"{parameter}`implementation` must be None or 'xla' where no kernel can run; "
        f"got 'pallas', and {why}. Use None, for the kernel wherever it can run."
    )


def _compiled(default, kernels, implementation, path):
    """Compiles `either` for calls outside of `jax.jit`, once for equal functions.

    Callers make new closures at each call, so closures are compared by their code and
    the values they close over. Closures that cannot be compared are compiled at each
    call.
    """
    forms = {name: _Comparable(form) for name, form in kernels.forms.items() if form}
    kernels = dataclasses.replace(kernels, **forms)
    arguments = _Comparable(default), kernels, implementation, path
    try:
        return _compiled_once(*arguments)
    except TypeError:  # something in a closure has no hash
        return _compiled_once.__wrapped__(*arguments)


@lru_cache(maxsize=1024)
def _compiled_once(default, kernels, implementation, path):
    def run(*args):
        return either(default, kernels, *args, implementation=implementation, path=path)

    return jax.jit(run)


class _Comparable:
    """A function that equals any other with the same code and closed-over values."""

    def __init__(self, function):
        self._function, self._parts = function, _parts(function)

    def __call__(self, *args):
        return self._function(*args)

    def __eq__(self, other):
        return isinstance(other, _Comparable) and self._parts == other._parts

    def __hash__(self):
        return hash(self._parts)


def _parts(value):
    """Returns everything besides the arguments that decides a function's result."""
    if isinstance(value, partial):
        return _parts(value.func), _parts(value.args), _parts(value.keywords)
    if isinstance(value, tuple):
        return type(value), *map(_parts, value)
    if isinstance(value, dict):
        return dict, *((key, _parts(part)) for key, part in sorted(value.items()))
    if inspect.isfunction(value):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        defaults = value.__defaults__, value.__kwdefaults__
        return value.__code__, _parts(cells), _parts(defaults)
    return type(value), value  # 1, 1.0 and True are equal, their programs are not


_either_p = Primitive("cage_either")
_either_p.multiple_results = True


@_either_p.def_impl
def _run(*args, **params):
    return jax.jit(partial(_either_p.bind, **params))(*args)


@_either_p.def_abstract_eval
def _shapes(*args, default, **_):
    return default.out_avals


def _lower(context, *args, default, required, by_name, pieces, path, platform, **forms):
    kernel = forms.get(platform)
    devices = _devices(context.module_context.axis_context)
    if kernel is not None and devices == 1 and (required or platform not in by_name):
        with warnings.catch_warnings():
            # The replacement of Triton's lowering is not in all supported versions yet.
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
            return mlir.lower_fun(kernel)(context, *args)
    if required:
        raise _impossible(
            path,
            f"there is none for {platform}"
            if kernel is None
            else "the compiler partitions this program: wrap the call in a shard_map",
        )
    form = forms.get(f"xla_{platform}")
    if form is None or pieces % devices:
        form = jaxpr_as_fun(default)
    return mlir.lower_fun(form)(context, *args)


def _devices(context):
    """Returns the number of devices that the compiler partitions the program over."""
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes == frozenset(context.mesh.axis_names)
        return 1 if manual else context.mesh.size
    return getattr(context, "num_devices", 1)


mlir.register_lowering(_either_p, partial(_lower, platform="this platform"))
for _name in _PLATFORMS:
    mlir.register_lowering(_either_p, partial(_lower, platform=_name), platform=_name)


def _batch(args, dimensions, *, default, required, by_name, pieces, path, **forms):
    def mapped(function):
        return jax.vmap(function, in_axes=tuple(dimensions), out_axes=0)

    found = _either_p.bind(
        *args,
        default=jax.make_jaxpr(mapped(jaxpr_as_fun(default)))(*args),
        required=required,
        by_name=by_name,
        pieces=pieces,
        path=path,
        **{name: form and mapped(form) for name, form in forms.items()},
    )
    return found, [0] * len(found)


batching.primitive_batchers[_either_p] = _batch


def _differentiate(primals, tangents, *, default, **_):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(jaxpr_as_fun(default), primals, tuple(tangents))


ad.primitive_jvps[_either_p] = _differentiate
