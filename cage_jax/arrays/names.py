"""Names that are given and unknown: which names are near, and which there are."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns a sentence with the nearest names, after a space; "" if none is near.

    Small and capital letters count as the same, where `names` are in small ones.
    """
    names, name = list(names), name.lower()
    initials = [each for each in names if name == "".join(_initials(each))]
    longer = [each for each in names if len(name) > 2 and name in each]
    close = difflib.get_close_matches(name, names)
    shorter = [each for each in names if len(each) > 2 and each in name]
    near = initials or longer or close or shorter
    return f" Did you mean {' or '.join(f'`{each}`' for each in near)}?" if near else ""


def _initials(name):
    return [word[:1] for word in name.split("_")]


def names_checked(function: F) -> F:
    """Makes a function answer an unknown argument with the nearest of its own.

    Signature, annotations and documentation stay those of the function.
    """
    parameters = inspect.signature(function).parameters
    by_position = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    known = f"Its arguments are {', '.join(parameters)}."

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name in kwargs:
            if name not in parameters:
                raise TypeError(
                    f"`{function.__name__}` has no argument `{name}`."
                    f"{did_you_mean(name, parameters)} {known}"
                )
        if len(args) > len(by_position):
            taken = ", ".join(by_position) or "no argument"
            raise TypeError(
                f"`{function.__name__}` takes {taken} by position; got {len(args)} "
                f"values. Give all others by name. {known}"
            )
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
