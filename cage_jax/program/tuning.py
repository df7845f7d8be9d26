"""Times kernels beside XLA's forms on a device, and keeps which of them to run."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr

from cage_jax.arrays.checks import warn
from cage_jax.arrays.dispatch import PLATFORM_OF, PRIMITIVE, WITH_KERNELS
from cage_jax.arrays.jaxprs import subjaxprs
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules, check_rules
from cage_jax.core.tables import Cells, Shown
from cage_jax.pallas import tuned
from cage_jax.pallas.candidates import fake_quant_kernels
from cage_jax.pallas.choices import Choice, fault
from cage_jax.pallas.tuned import Measured
from cage_jax.quantizers.quantizer import Quantizer

_ROUNDS = 20
_HEADER: tuple[str, ...] = (
    "operation",
    "shape",
    "quantizer",
    "parameters",
    "on",
    "runs",
    "why",
)
_HEADER += ("XLA, ms", "kernel, ms")
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class Form(NamedTuple):
    """The form of one computation that runs, a row of a `Tuning`.

    Attributes:
      operation: what is computed, such as "fake_quant with a mask", which training runs
        in the forward pass.
      shape, dtype: of an array, or of the part of it on one device.
      quantizer: its quantizer.
      paths: the parameters that it is computed for; empty for a step.
      platform: "tpu" or "cuda".
      is_kernel: whether the kernel runs; otherwise XLA's form.
      why: why.
      xla_ms, kernel_ms: medians of calls in milliseconds; None if not measured.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    quantizer: Quantizer
    paths: tuple[str, ...]
    platform: str
    is_kernel: bool
    why: str
    xla_ms: float | None = None
    kernel_ms: float | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning(Shown):
    """What runs for each computation, shown as a table.

    Attributes:
      kind: kind of the device here.
      forms: one `Form` for each computation, and for each platform if the device here
        has no kernels.
      faults: for each kernel that is wrong, a text to send to the authors.
    """

    kind: str
    forms: tuple[Form, ...]
    faults: tuple[str, ...]

    def shown(self) -> tuple[Cells, int, Sequence[str]]:
        """Returns the table, and lines to write below it."""
        cells: list[tuple[str, ...]] = [_HEADER]
        for form in self.forms:
            first, *more = form.paths or ("",)
            times = (
                "" if each is None else f"{each:.3f}"
                for each in (form.xla_ms, form.kernel_ms)
            )
            array = f"{form.dtype}{[*form.shape]}", str(form.quantizer)
            parameters = f"{first} and {len(more)} more" if more else first
            runs = "kernel" if form.is_kernel else "XLA"
            where = parameters, form.platform, runs, form.why
            cells.append((form.operation, *array, *where, *times))
        return cells, 7, [f"device: {self.kind}; choices: {tuned.path()}", *self.faults]


class _Case(NamedTuple):
    """A computation that has a kernel for a platform.

    Attributes:
      choice: which of both forms runs.
      default: XLA's form.
      platform: the platform of the kernel.
      paths: the parameters that it is computed for.
    """

    choice: Choice
    default: Callable
    platform: str
    paths: tuple[str, ...]

    def form(self, *rest: Any) -> Form:
        """Returns the row of the table, with what follows the platform in `rest`."""
        choice = self.choice
        array = choice.shape, choice.dtype, choice.quantizer, self.paths
        return Form(choice.operation, *array, self.platform, *rest)


@names_checked
def tune(
    params: Any, rules: Rules, *, optimizer: Any = None, report: bool = False
) -> Tuning:
    """Measures on the device here where kernels are faster, and keeps that.

    For each shape, dtype and quantizer, `fake_quant`, its forward and backward pass in
    training and, with an optimizer, its fused step are computed on random numbers by
    XLA and by the kernel. If the results agree and the kernel is faster, it runs from
    then on where `implementation` is None. The choices are kept in one small file in
    the user's cache folder (`~/.cache/cage_jax/kernels.json`), by the kind of device
    and the versions of jax, jaxlib and the kernels. Programs that are compiled ahead of
    time for this kind use them as well. A program that is compiled already keeps its
    form, so tune before the first step. Takes seconds for each row of the table, and
    memory for about ten copies of the largest array.

    Without it, kernels run on a TPU where they were counted to move fewer bytes. On a
    GPU they run where they move at most half of XLA's bytes, after both forms have
    agreed on a small array, once in a process.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`; only shapes, dtypes and
        shardings are read. A kernel runs on the part of an array on one device.
      rules: which parameters are quantized, and how.
      optimizer: what `cage_adamw` returned, if its `fused_step` is used; or None.
      report: whether to show only what runs and why, without measuring.

    Returns:
      A `Tuning`; print it, or read its `forms`.

    Raises:
      TypeError, ValueError: for parameters that `rules` cannot quantize, for an
        `optimizer` without `fused_step`, and without a TPU or GPU unless `report`.

    Warns:
      Of a kernel whose results differ, which never runs, with what to send to the
      authors; and of a file that cannot be read or written.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> rules = cage.Rules([(r".*kernel", cage.quest(4))])
      >>> params = {"kernel": jax.ShapeDtypeStruct((1024, 4096), "float32")}
      >>> forms = cage.tune(params, rules, report=True).forms
      >>> [form.operation for form in forms if form.platform == "cuda"]
      ['fake_quant', 'fake_quant with a mask', 'masked_gradient']
    """
    check_rules(rules)
    if optimizer is not None and not hasattr(optimizer, "fused_step"):
        raise ValueError(
            f"`optimizer` must have a fused step; got a {type(optimizer).__name__} "
            f"without one. Use what cage.cage_adamw returns, or leave it out."
        )
    device = jax.local_devices()[0]
    here, kind = PLATFORM_OF.get(device.platform, device.platform), device.device_kind
    platforms = (here,) if here in WITH_KERNELS else WITH_KERNELS
    if not report and here not in WITH_KERNELS:
        raise ValueError(
            f"`tune` must run where there is a TPU or a GPU; got {kind}, which has no "
            f"kernels. Use report=True to see what would run elsewhere."
        )
    cases, without = _cases(_parts(params, rules), rules, optimizer)
    cases = [case for case in cases if case.platform in platforms]
    faults: list[str] = []
    if not report:
        found = [(case.choice, _measured(case, device)) for case in cases]
        measured = {choice: each for choice, each in found if each is not None}
        tuned.keep(kind, {choice.name: each for choice, each in measured.items()})
        faults = [
            choice.report(each.fault, kind)
            for choice, each in measured.items()
            if each.fault
        ]
        for text in faults:
            warn(text)
    forms = [_form(case, kind if case.platform == here else "") for case in cases]
    forms += [form for form in without if form.platform in platforms]
    return Tuning(kind, tuple(forms), tuple(faults))


def _parts(params, rules):
    """Replaces each quantized parameter by the form of its part on a device."""

    def part(_, quantizer, x):
        shape, sharding = x.shape, getattr(x, "sharding", None)
        if sharding is not None:
            shape = sharding.shard_shape(shape)
        try:
            quantizer.blocks(shape)
        except ValueError:  # devices exchange parts of groups: no kernel does
            shape = x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return rules.map(part, params)


def _cases(params, rules, optimizer) -> tuple[list[_Case], list[Form]]:
    """Returns the computations with kernels, and the rows of those without."""
    arrays: dict[tuple, list[str]] = {}
    for path, (quantizer, x) in rules.quantized(params).items():
        arrays.setdefault((quantizer, x.shape, x.dtype), []).append(path)
    cases: list[_Case] = []
    without: list[Form] = []
    for (quantizer, shape, dtype), paths in arrays.items():
        x = jax.ShapeDtypeStruct(shape, dtype)
        kernels = fake_quant_kernels(quantizer, x, None, None, masked=False)
        row = "fake_quant", shape, dtype.name, quantizer, tuple(paths)
        without += [
            Form(*row, platform, False, f"no kernel: {why}")
            for platform, why in kernels.missing
        ]
        if kernels.found:
            program = jax.make_jaxpr(partial(_in_training, quantizer=quantizer))(x)
            cases += _cases_in(program.jaxpr, tuple(paths))
    if optimizer is not None:
        state = jax.eval_shape(optimizer.init, params)
        step = jax.make_jaxpr(optimizer.fused_step)(params, state, params)
        cases += _cases_in(step.jaxpr, ())
    once = {(case.platform, case.choice.name): case for case in reversed(cases)}
    return [*reversed(once.values())], without


def _in_training(x, quantizer):
    """Quantizes as evaluation and as training do."""
    value = fake_quant(x, quantizer)
    return jax.vjp(partial(fake_quant, quantizer=quantizer), x)[1](value)


def _cases_in(jaxpr: Jaxpr, paths: tuple[str, ...]) -> Iterator[_Case]:
    """Finds the computations with kernels in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != PRIMITIVE:
            for inner in subjaxprs(eqn.params):
                yield from _cases_in(inner, paths)
            continue
        for variant in eqn.params["variants"].found:
            if isinstance(variant.when, Choice):
                default = eqn.params["function"]
                yield _Case(variant.when, default, variant.platform, paths)


def _form(case: _Case, kind: str) -> Form:
    """Returns what runs for a computation, and why."""
    choice = case.choice
    if (measured := tuned.entry(kind, choice.name)) is not None:
        why = f"the kernel is wrong: {measured.fault}" if measured.fault else "measured"
        return case.form(measured.kernel, why, measured.xla_ms, measured.kernel_ms)
    why = {
        "kernel": "moves fewer bytes, as counted",
        "xla": "the kernel saves too few bytes, as counted",
        "compare": "moves at most half of the bytes, as counted; if both forms agree",
    }[choice.untuned]
    return case.form(choice.untuned != "xla", why)


def _measured(case: _Case, device: jax.Device) -> Measured | None:
    """Compares both forms and times them; None if they do not fit in memory."""
    choice = case.choice
    try:
        why = fault(choice, case.default, device)
        if why and _OUT_OF_MEMORY not in why:
            return Measured(kernel=False, fault=why)
        xla, kernel = _milliseconds(choice, case.default, device)
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        warn(f"{choice.name} was not measured: the device has too little memory free.")
        return None
    return Measured(kernel < xla, "", xla, kernel)


def _milliseconds(choice: Choice, default: Callable, device) -> tuple[float, float]:
    """Returns the medians of calls of both forms, which take turns."""
    forms = default, choice.kernel(choice.shape)
    runs = [jax.jit(form, donate_argnums=choice.replaced) for form in forms]
    times: list[list[float]] = [[], []]
    with jax.default_device(device):
        states = [[*choice.arguments(choice.shape)] for _ in runs]
        for number in range(_ROUNDS + 1):
            for run, state, found in zip(runs, states, times):
                jax.block_until_ready(state)
                start = time.perf_counter()
                results = jax.block_until_ready(run(*state))
                if number:  # the first call compiles
                    found.append(1e3 * (time.perf_counter() - start))
                for place, new in zip(choice.replaced, results):
                    state[place] = new
    xla, kernel = map(statistics.median, times)
    return xla, kernel
