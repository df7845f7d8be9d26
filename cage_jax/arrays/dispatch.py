"""One computation in several variants; each program gets the one that suits it.

The variant cannot be chosen while a function is traced. The platform may differ from
that of this process (compiling ahead of time, exporting), and automatic partitioning
decides later which part of an array a device holds. So a primitive stands for all
variants, and lowering the program replaces it by one of them.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.interpreters import ad, batching, mlir

from cage_jax.arrays.checks import check_choice

Implementation = Literal["xla", "pallas"]
Platform = Literal["tpu", "cuda", "cpu"]
# Its name in a program; the variants are in its parameters.
PRIMITIVE = "cage_dispatch"
WITH_KERNELS: tuple[Platform, ...] = ("tpu", "cuda")
# What programs are lowered for, by what devices call it.
PLATFORM_OF = {"gpu": "cuda"}


class Request(NamedTuple):
    """What a program asks for, and what it is compiled for.

    Attributes:
      implementation: as in `dispatch`.
      devices: number of devices that the compiler partitions the program over.
      kind: kind of these devices, such as "NVIDIA H200"; "" if it is not known.
      default: the `jax.numpy` function, which takes arrays of other shapes too; None
        before the program is lowered.
    """

    implementation: Implementation | None = None
    devices: int = 1
    kind: str = ""
    default: Callable | None = None


class Variant(NamedTuple):
    """Another form of a `jax.numpy` function, for one platform.

    Attributes:
      platform: the platform that a program is compiled for.
      function: takes the same arguments and returns the same results.
      when: tells whether it may run: `by_default`, `on_request`, `if_divided(pieces)`
        or a `Choice` of `pallas/choices.py`.
    """

    platform: Platform
    function: Callable
    when: Callable[[Request], bool]


class Variants(NamedTuple):
    """The variants of one computation.

    Attributes:
      found: the variants; the first one that may run does.
      missing: platforms without a kernel, each with the reason.
    """

    found: tuple[Variant, ...] = ()
    missing: tuple[tuple[Platform, str], ...] = ()


def no_kernel(reason: str) -> Variants:
    """Returns no variants, with the reason why no platform has a kernel."""
    return Variants(missing=tuple((platform, reason) for platform in WITH_KERNELS))


def by_default(request: Request) -> bool:
    """Lets a kernel run if it may, because it is known to be faster.

    It was measured on its platform to take at most 1 / 1.15 of the time of the best
    `jax.numpy` form.
    """
    return request.devices == 1 and request.implementation != "xla"


def on_request(request: Request) -> bool:
    """Lets a kernel run only if "pallas" is asked for."""
    return request.devices == 1 and request.implementation == "pallas"


def if_divided(pieces: int) -> Callable[[Request], bool]:
    """Lets a `jax.numpy` form run on numbers of devices that divide `pieces`.

    A compiler may partition it over these; 0 is for any number at all.
    """

    def when(request):
        return request.implementation != "pallas" and pieces % request.devices == 0

    return when


def dispatch(
    default: Callable,
    variants: Variants,
    *args: Any,
    implementation: Implementation | None = None,
    path: str = "",
) -> Any:
    """Returns `default(*args)`, computed by a variant where one may run.

    A kernel runs if the program is compiled for its platform and runs on one device, or
    is inside a `shard_map` over all axes of the mesh. Derivatives are those of
    `default`.

    Args:
      default: a `jax.numpy` function; a compiler may partition it.
      variants: the other forms; a form is traced only once it is chosen.
      *args: trees of arrays.
      implementation: "xla" for a `jax.numpy` form; "pallas" for the kernel, or an error
        if it cannot run; None for the kernel if it can run and is known to be faster.
      path: path of the parameter, for errors about it.

    Raises:
      ValueError: for "pallas" without a kernel. Also when the program is lowered, if
        the platform has no kernel or the program is partitioned automatically.
    """
    if implementation is not None:
        check_implementation(implementation)
        request = Request(implementation)
        found = [each for each in variants.found if each.when(request)]
        variants = variants._replace(found=tuple(found))
    if not variants.found:
        if implementation == "pallas":
            raise error_without_kernel(variants, path)
        return default(*args)
    leaves, structure = jax.tree.flatten(args)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return default(*args)
        run = partial(dispatch, default, variants)
        return _compiled(partial(run, implementation=implementation, path=path))(*args)

    def flat(function):
        return lambda *leaves: jax.tree.leaves(
            function(*jax.tree.unflatten(structure, leaves))
        )

    jaxpr, out = jax.make_jaxpr(default, return_shape=True)(*args)
    results = _primitive().bind(
        *leaves,
        default=jaxpr,
        function=default,
        variants=_change(variants, flat),
        implementation=implementation,
        path=path,
    )
    return jax.tree.unflatten(jax.tree.structure(out), results)


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def kernel_required(kernels: Variants, x: jax.Array, path: str) -> jax.Array:
    """Returns `x`, or raises an error with the path if no kernel can run.

    This check takes the path, so `dispatch` can go without one and is traced once for
    all arrays of a shape.
    """

    def itself(x):
        return x

    kernels = _change(kernels, lambda _: itself)
    return dispatch(itself, kernels, x, implementation="pallas", path=path)


@kernel_required.defjvp
def _differentiate_required(kernels, path, primals, tangents):
    (x,), (tangent,) = primals, tangents
    return kernel_required(kernels, x, path), tangent


def _change(variants, change):
    """Applies `change` to the function of each variant."""
    found = [each._replace(function=change(each.function)) for each in variants.found]
    return variants._replace(found=tuple(found))


def check_implementation(implementation: Implementation | None) -> None:
    """Raises ValueError for an unknown name."""
    check_choice("implementation", implementation, (None, *get_args(Implementation)))


def error_without_kernel(variants: Variants, path: str = "") -> ValueError:
    """Returns the error of `implementation="pallas"` where no platform has a kernel."""
    why = "there is none for this quantizer and shape" + _reasons(variants.missing)
    return _impossible(path, why)


def _impossible(path, why):
    parameter = f"`{path}`: " if path else ""
    return ValueError(
        f"{parameter}`implementation` must be None or 'xla' where no kernel can run; "
        f"got 'pallas', and {why}. Use None, for the kernel wherever it can run."
    )


def _reasons(missing):
    """Lists why kernels are missing, each reason once, for the end of a sentence."""
    platforms: dict[str, list[str]] = {}
    for platform, reason in missing:
        platforms.setdefault(reason, []).append(platform)
    each = [f"{reason} ({', '.join(names)})" for reason, names in platforms.items()]
    return f": {'; '.join(each)}" if each else ""


def _compiled(function):
    """Compiles calls outside of `jax.jit`, once for equal functions.

    Callers make new closures at each call, so closures are compared by their code and
    the values they close over. Closures that cannot be compared are compiled at each
    call.
    """
    try:
        return _compiled_once(_Comparable(function))
    except TypeError:  # something in a closure has no hash
        return jax.jit(function)


@lru_cache(maxsize=1024)
def _compiled_once(function):
    return jax.jit(lambda *args: function(*args))


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


@cache
def _primitive():
    """Makes the primitive; importing `jax.extend` takes as long as this package."""
    from jax.extend.core import Primitive

    primitive = Primitive(PRIMITIVE)
    primitive.multiple_results = True
    primitive.def_impl(
        lambda *args, **params: jax.jit(partial(primitive.bind, **params))(*args)
    )
    primitive.def_abstract_eval(lambda *args, default, **_: default.out_avals)
    mlir.register_lowering(primitive, partial(_lower, platform=None))
    for name in get_args(Platform):
        mlir.register_lowering(primitive, partial(_lower, platform=name), platform=name)
    batching.primitive_batchers[primitive] = _batch
    ad.primitive_jvps[primitive] = _differentiate
    return primitive


def _as_function(jaxpr):
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(jaxpr)


def _lower(context, *args, default, function, variants, implementation, path, platform):
    here = [each for each in variants.found if each.platform == platform]
    if here:
        devices = _devices(context.module_context.axis_context)
        kind = _kind(context.module_context.backend, platform)
        request = Request(implementation, devices, kind, function)
    for each in here:
        if each.when(request):
            with warnings.catch_warnings():
                # Not all supported versions have what replaces Triton's lowering.
                warnings.filterwarnings(
                    "ignore", "The Pallas Triton backend is deprecated"
                )
                return mlir.lower_fun(each.function)(context, *args)
    if implementation != "pallas":
        return mlir.lower_fun(_as_function(default))(context, *args)
    if here:
        why = "the compiler partitions this program: wrap the call in a shard_map"
    else:
        missing = [each for each in variants.missing if each[0] == platform]
        why = f"there is none for {platform or 'this platform'}{_reasons(missing)}"
    raise _impossible(path, why)


def _devices(context):
    """Returns the number of devices that the compiler partitions the program over."""
    if isinstance(context, mlir.SPMDAxisContext):
        manual = context.manual_axes == frozenset(context.mesh.axis_names)
        return 1 if manual else context.mesh.size
    return getattr(context, "num_devices", 1)


def _kind(backend, platform):
    """Returns the kind of device that a program is compiled for, or ""."""
    # Programs for devices that are not here may name one in the mesh.
    named = jax.sharding.get_abstract_mesh().abstract_device
    devices = [named] if named else backend.devices() if backend else []
    first = next(iter(devices), None)
    if first is None or PLATFORM_OF.get(first.platform, first.platform) != platform:
        return ""
    return first.device_kind


def _batch(args, dimensions, *, default, variants, **others):
    def mapped(function):
        return jax.vmap(function, in_axes=tuple(dimensions), out_axes=0)

    found = _primitive().bind(
        *args,
        default=jax.make_jaxpr(mapped(_as_function(default)))(*args),
        variants=_change(variants, mapped),
        **others,
    )
    return found, [0] * len(found)


def _differentiate(primals, tangents, *, default, **_):
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(_as_function(default), primals, tuple(tangents))
