"""Tables of rules as JSON, to be kept beside a checkpoint."""

import json
from typing import Any

from cage_jax.core.rules import Rules
from cage_jax.export.descriptions import describe, quantizer_of
from cage_jax.export.files import MalformedFileError, malformed

_REMEDY = "Use what rules_to_json returned."


def rules_to_json(rules: Rules) -> str:
    """Converts rules to JSON, with the axes that `resolve` found.

    Args:
      rules: rules whose quantizers are of this library.

    Returns:
      A text that `rules_from_json` converts back to equal rules.

    Raises:
      TypeError: for quantizers with formats or scales that are defined elsewhere.

    Example:
      >>> import cage_jax as cage
      >>> rules = cage.Rules([(r".*kernel", "int4", "int8"), (r".*", None)])
      >>> cage.export.rules_from_json(cage.export.rules_to_json(rules)) == rules
      True
    """
    lines = [
        [rule.pattern, *(q and describe(q) for q in (rule.weights, rule.inputs))]
        for rule in rules
    ]
    resolved = {path: describe(each) for path, each in rules.resolved.items()}
    return json.dumps({"rules": lines, "resolved": resolved}, indent=1)


def rules_from_json(text: str) -> Rules:
    """Builds rules from JSON; the inverse of `rules_to_json`.

    Args:
      text: a text, which need not be trusted.

    Raises:
      MalformedFileError: for anything that `rules_to_json` does not return.

    Example:
      >>> import cage_jax as cage
      >>> text = cage.export.rules_to_json(cage.Rules([(r".*", "int4")]))
      >>> cage.export.rules_from_json(text).match("kernel").bits
      4
    """
    try:
        found = json.loads(text)
        lines, resolved = found["rules"], found["resolved"]
        rules = [(pattern, *map(_quantizer, parts)) for pattern, *parts in lines]
        return Rules(
            rules, resolved={path: quantizer_of(q) for path, q in resolved.items()}
        )
    except MalformedFileError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise malformed("`text` must be rules in JSON", what, _REMEDY) from error


def _quantizer(description: Any):
    return None if description is None else quantizer_of(description)
