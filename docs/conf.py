"""Configuration of Sphinx for `make docs`."""

import os
import pathlib
import re
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cage_jax
from cage_jax._project import REPOSITORY

HERE = pathlib.Path(__file__).parent

project = "cage_jax"
release = cage_jax.__version__
html_title = f"cage_jax {release}"
html_show_copyright = False
html_theme = "furo"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs
copybutton_exclude = ".linenos, .gp, .go"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes, dtypes and units are in the descriptions
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# The last section of many docstrings.
napoleon_custom_sections = [("Source", "notes_style")]
# Links to files outside these pages.
_ELSEWHERE = re.compile(r"\]\(\.\./([^)\s]+)\)")
# Links of notebooks, which Colab too follows, to what is a page here.
_PAGE = rf"\]\({REPOSITORY}/blob/main/(docs|notebooks)/"
_BESIDE = {"docs": "../", "notebooks": ""}
_CODE = re.compile(r"`([^`]+)`(\w*)")

# Notebooks live beside docs/, and Sphinx reads pages only below it.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks")


def _as_markdown(app, what, name, obj, options, lines):
    """Converts Markdown code in docstrings, and escapes substitutions of Sphinx."""
    text = "\n".join(lines)
    words, example, rest = text.partition("\nExample:")
    words = re.sub(r"\|(\w+)\|", r"\|\1\|", words)
    lines[:] = (_CODE.sub(_code, words) + example + rest).split("\n")


def _code(found):
    ending = rf"\ {found[2]}" if found[2] else ""
    return f"``{' '.join(found[1].split())}``{ending}"


def _outside(found):
    path = pathlib.Path(found[1])
    if path.suffix == ".ipynb":
        return f"]({path})"  # a page of its own
    return f"]({REPOSITORY}/{'blob' if path.suffix else 'tree'}/main/{path})"


def _addresses(app, docname, source):
    """Turns links to files of the repository into addresses of GitHub, or pages."""
    if docname.startswith("notebooks/"):  # read in Colab too, hence with addresses
        here = f"]({REPOSITORY}/blob/main/"
        inside = source[0].replace(f"{here}docs/", "](../")
        source[0] = inside.replace(f"{here}notebooks/", "](")
    else:
        source[0] = _ELSEWHERE.sub(_outside, source[0])


def _source_of_notebooks(app, pagename, templatename, context, doctree):
    """Lets the buttons "view" and "edit" of a notebook find it beside docs/."""
    if pagename.startswith("notebooks/"):
        context["theme_source_directory"] = ""


def setup(app):
    """Connects the conversions; Sphinx calls this."""
    app.connect("html-page-context", _source_of_notebooks)
    app.connect("source-read", _addresses)
    app.connect("autodoc-process-docstring", _as_markdown, priority=0)
