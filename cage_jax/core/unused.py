"""Explanations of patterns that match no parameter."""

import difflib
import itertools
import re

# What `flatten_with_paths` leaves out of paths, in a pattern.
_LEFT_OUT = re.compile(r"^(\.\*/?)?params/|(/|\\?\.)value$")


def unused_text(pattern: str, paths: list[str]) -> str:
    """Explains why a pattern decides nothing, and names a path near it."""
    shadowed = [path for path in paths if re.fullmatch(pattern, path)]
    if shadowed:
        return (
            f"the rule {pattern!r} decides nothing: an earlier rule takes all that "
            f"it matches, such as {shadowed[0]!r}. Move it up or leave it out."
        )
    part = [path for path in paths if re.search(pattern, path)]
    if part:
        return (
            f"the rule {pattern!r} matches no parameter: a pattern must match the "
            f"whole path, such as {part[0]!r}. Use {f'.*({pattern}).*'!r}."
        )
    hint, wanted = "", pattern
    if not any(map(_LEFT_OUT.search, paths)):
        wanted = _LEFT_OUT.sub("", pattern)
    if paths:
        hint = _nearest_text(wanted, paths)
    if wanted != pattern:
        hint += " Paths have no params/ in front and no /value at the end."
    return f"the rule {pattern!r} matches no parameter.{hint}"


def _nearest_text(pattern, paths):
    """Tells the path whose keys are most like those of a pattern, the last first."""

    def keys(text):
        # Frameworks call one thing weight or kernel.
        parts = reversed(text.replace("weight", "kernel").split("/"))
        return [re.sub(r"\\\w|\W", "", part).lower() for part in parts]

    def likeness(path):
        pairs = itertools.zip_longest(keys(pattern), keys(path), fillvalue="")
        ratios = [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]
        return [ratio if ratio >= 0.6 else 0.0 for ratio in ratios]

    nearest = max(paths, key=likeness)
    what = "The nearest path is" if any(likeness(nearest)) else "A path is, for one,"
    return f" {what} {nearest!r}."
