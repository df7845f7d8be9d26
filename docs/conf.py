"""Configuration of Sphinx for `make docs`."""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cage_jax

project = "cage_jax"
release = cage_jax.__version__
html_title = f"cage_jax {release}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes, dtypes and units are in the descriptions
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# The last section of many docstrings.
napoleon_custom_sections = [("Source", "notes_style")]
# Links to files outside these pages, which work only in the repository.
_ELSEWHERE = re.compile(r"\[([^]]+)\]\(\.\./([^)#]+)[^)]*\)")
_CODE = re.compile(r"`([^`]+)`(\w*)")


def _as_markdown(app, what, name, obj, options, lines):
    """Converts Markdown code in docstrings, and escapes substitutions of Sphinx."""
    text = "\n".join(lines)
    words, example, rest = text.partition("\nExample:")
    words = re.sub(r"\|(\w+)\|", r"\|\1\|", words)
    lines[:] = (_CODE.sub(_code, words) + example + rest).split("\n")


def _code(found):
    ending = rf"\ {found[2]}" if found[2] else ""
    return f"``{' '.join(found[1].split())}``{ending}"


def _as_names(app, docname, source):
    source[0] = _ELSEWHERE.sub(r"\1 (`\2`)", source[0])


def setup(app):
    """Connects the conversions; Sphinx calls this."""
    app.connect("source-read", _as_names)
    app.connect("autodoc-process-docstring", _as_markdown, priority=0)
