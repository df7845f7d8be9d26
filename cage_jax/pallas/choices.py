"""The form of a computation that runs if no one asks for one: a kernel or XLA's.

What `cage.tune` measured on this kind of device decides. Without that, the bytes that
both forms were counted to move decide, see `Untuned`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import jax

from cage_jax._project import REPOSITORY, VERSION
from cage_jax.arrays.checks import warn
from cage_jax.arrays.dispatch import Request, by_default
from cage_jax.pallas import tuned
from cage_jax.pallas.agreement import disagreement
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scales import AbsMean, Gaussian

# What runs where nothing was measured: the kernel, XLA's form, or the kernel once both
# have agreed on a small array, since it has run on few devices of its platform.
Untuned = Literal["kernel", "xla", "compare"]
# More columns than a block of a kernel for GPU has.
_SMALL = 512


class Choice(NamedTuple):
    """Tells whether a kernel may run, as the `when` of a `Variant`.

    Attributes:
      operation: what the kernel computes.
      quantizer, shape, dtype: of the array.
      kernel: maps the shape of an array to the kernel, which takes the arguments of the
        `jax.numpy` form.
      arguments: maps a shape to such arguments, of random numbers.
      replaced: which of these the first results replace, in place if they are donated.
      untuned: what runs where nothing was measured.
    """

    operation: str
    quantizer: Quantizer
    shape: tuple[int, ...]
    dtype: str
    kernel: Callable[[tuple[int, ...]], Callable]
    arguments: Callable[[tuple[int, ...]], tuple]
    replaced: tuple[int, ...]
    untuned: Untuned

    def __call__(self, request: Request) -> bool:
        """Tells whether the kernel may run."""
        if request.implementation is not None or request.devices != 1:
            return by_default(request)
        if (measured := tuned.entry(request.kind, self.name)) is not None:
            return measured.kernel
        if self.untuned == "compare":
            return self._agrees(request)
        return self.untuned == "kernel"

    @property
    def name(self) -> str:
        """The name that a measurement is kept under."""
        return f"{self.operation} {self.shape} {self.dtype} {self.quantizer!r}"

    @property
    def is_exact(self) -> bool:
        """Whether the kernel promises the bits of the `jax.numpy` form.

        The sums of a rotation and of a mean are in another order, and a step contracts
        other products and sums.
        """
        sums = self.quantizer.hadamard is not None
        sums |= isinstance(self.quantizer.scale, Gaussian | AbsMean)
        return not sums and len(self.replaced) == 0

    def _agrees(self, request):
        """Tells whether both forms agree on a device here, once in a process."""
        devices = [d for d in jax.local_devices() if d.device_kind == request.kind]
        if not devices or request.default is None:
            return False
        groups = self.quantizer.blocks(self.shape).by_axis
        shape = tuple(
            length if axis in groups else math.gcd(length, _SMALL)
            for axis, length in enumerate(self.shape)
        )
        small = self._replace(shape=shape)
        key = request.kind, small.name
        if key not in _AGREED:
            # A thread of its own has no trace, mesh or setting of the program that is
            # being compiled.
            with ThreadPoolExecutor(1) as thread:
                run = partial(fault, small, request.default, devices[0])
                why = thread.submit(run).result()
            if why:
                warn(small.report(why, request.kind))
            _AGREED[key] = not why
        return _AGREED[key]

    def report(self, why: str, kind: str) -> str:
        """Returns what to tell about a kernel that is wrong or does not run."""
        return (
            f"the kernel of {self.operation} with {self.quantizer} does not run on "
            f"{kind}, because {why}. XLA's form runs instead. Please send this to "
            f"{REPOSITORY}/issues: {self.name}; {kind}; cage_jax "
            f"{VERSION}, {tuned.versions()}."
        )


_AGREED: dict[tuple[str, str], bool] = {}


def fault(choice: Choice, default: Callable, device: jax.Device) -> str:
    """Runs both forms on a device; returns what is wrong with the kernel, or ""."""
    with jax.default_device(device), jax.debug_nans(False):
        try:
            arguments = choice.arguments(choice.shape)
            theirs = jax.tree.leaves(jax.jit(default)(*arguments))
            ours = jax.tree.leaves(jax.jit(choice.kernel(choice.shape))(*arguments))
            return disagreement(ours, theirs, exact=choice.is_exact)
        except Exception as error:  # whatever a compiler or a full memory raises
            return f"it fails: {type(error).__name__}: {str(error)[:300]}"
