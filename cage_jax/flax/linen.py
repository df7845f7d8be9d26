"""Linen modules that quantize the inputs of their weights."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from flax import linen

from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules
from cage_jax.program.activations import quantize_activations


class QuantizedLinen:
    """A Linen module whose `apply` quantizes the inputs of weights, or both.

    Attributes:
      module: the module.
      rules: the rules for weights and inputs.
      strict: as in `quantize_activations`.
      rounds: whether `apply` rounds the weights too.
    """

    def __init__(
        self, module: linen.Module, rules: Rules, *, strict: bool, rounds: bool
    ):
        self.module = module
        self.rules = rules
        self.strict = strict
        self.rounds = rounds

    def __repr__(self) -> str:
        return f"QuantizedLinen({type(self.module).__name__}, {self.rules!r})"

    def init(self, *args, **kwargs) -> Any:
        """Returns the variables of the module's own `init`."""
        return self.module.init(*args, **kwargs)

    def apply(
        self,
        variables: Mapping[str, Any],
        *args,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs,
    ) -> Any:
        """Calls the module's `apply` with quantized inputs."""
        options = {
            "method": method,
            "mutable": mutable,
            "capture_intermediates": capture_intermediates,
        }
        state, grids = split(variables)
        function = functools.partial(apply_module, self.module, options)
        quantized = quantize_activations(function, self.rules, strict=self.strict)
        if self.rounds:
            beside = {"params": state.get("params", {}), "grids": grids}
            state = {**state, "params": fake_quant(beside, self.rules)["params"]}
        params = {"params": state, "grids": grids}
        return quantized(params, *args, _rngs=rngs, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `TypeError`: a quantized module has no bound variables."""
        raise TypeError(
            "a quantized Linen module cannot be called or be a part of another module. "
            "Use its apply(variables, ...), or quantize the whole model."
        )

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if inspect.ismethod(value):
            raise AttributeError(
                f"a quantized Linen module has `init` and `apply`; got {name!r}. Use "
                f"apply(variables, ..., method={name!r}), or `.module.{name}` for the "
                f"module without quantized inputs."
            )
        return value


def split(variables):
    """Takes the grids of inputs out of a module's variables; returns both."""
    state = {name: v for name, v in variables.items() if name != "grids"}
    return state, dict(variables.get("grids", {}))


def apply_module(module, options, variables, *args, _rngs=None, **kwargs):
    """Calls a module's `apply`, as a function of its variables."""
    return module.apply(variables, *args, rngs=_rngs, **options, **kwargs)
