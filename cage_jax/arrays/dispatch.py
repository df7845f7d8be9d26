"""One computation in several forms, of which each program gets the one that suits it.

Which form that is cannot be told while a function is traced: the platform may be
another than that of this process (compiling ahead of time, exporting), and automatic
partitioning decides later which part of an array a device has. So a primitive stands
for all forms, and it is replaced by one of them when the program is lowered.
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
    """What computes the same as a function of `jax.numpy`, on one device.

    True where there is a kernel.

    Attributes:
      tpu: a function of the same arguments and results, or None where there is none.
      cuda: likewise.
      by_name: platforms whose kernel is run only where "pallas" is asked for. A kernel
        is taken by itself only once it was measured on its platform and took at most
        1 / 1.15 of the time of the best form of `jax.numpy`.
      xla_tpu: a function of `jax.numpy`, too, which a TPU does better; or None.
      xla_cuda: likewise.
      pieces: the numbers of devices over which a compiler may partition these are the
        divisors of it; 0 for all.
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
        """All of these functions."""
        names = (*_PLATFORMS, *(f"xla_{name}" for name in _PLATFORMS))
        return {name: getattr(self, name) for name in names}


def either(
    default: Callable,
    kernels: Kernels,
    *args: Any,
    implementation: Implementation | None = None,
    path: str = "",
) -> Any:
    """`default(*args)`, or what a kernel makes of them.

    A kernel is taken where its platform is the one that is compiled for, and where the
    program runs on one device, or inside of a `shard_map` over all axes of the mesh;
    elsewhere, and where `kernels` has it run `by_name` alone, the form of `jax.numpy`
    that suits the platform. Derivatives are those of `default`.

    Args:
      default: of `jax.numpy`; a compiler may partition it.
      kernels: traced where one of them is taken, not before.
      *args: trees of arrays.
      implementation: "xla" for a form of `jax.numpy`; "pallas" for the kernel, or an
        error where it cannot be taken; None for the kernel where it can and is known to
        be faster.
      path: of the parameter, for errors about it.

    Returns:
      What `default` returns.

    Raises:
      ValueError: for "pallas" without a kernel; when the program is lowered, where the
        platform has none or the program is partitioned automatically.
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
    """`x`, in programs that can take one of `kernels`; the error has the path.

    So that `either` itself, without a path, is traced once for all arrays of a shape.
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
    """Raises ValueError for a name that is none."""
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
    the values they close over. Those that cannot be compared are compiled at each call.
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
    """A function that equals another of the same code and closed-over values."""

    def __init__(self, function):
        self._function, self._parts = function, _parts(function)

    def __call__(self, *args):
        return self._function(*args)

    def __eq__(self, other):
        return isinstance(other, _Comparable) and self._parts == other._parts

    def __hash__(self):
        return hash(self._parts)


def _parts(value):
    """What decides the result of a function besides its arguments."""
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
    return value


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
            # Until Triton's lowering is gone, what replaces it is not in all versions.
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
    """Over how many the compiler partitions what is lowered."""
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
