"""How Sphinx builds the documentation; `make docs` runs it. Nothing is fetched while it builds."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

project = "elastic-jax"
author = "the authors of elastic-jax"
project_copyright = author
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_reference",
    "docstrings",
    "repository_links",
]
exclude_patterns = ["_build", "search.md"]  # finding-plans.md includes the latter
html_theme = "furo"
html_title = f"elastic-jax {version}"
html_show_copyright = False
html_show_sphinx = False
# Furo's icons and fonts are its own; nothing of a page comes from elsewhere.
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
smartquotes = False  # options begin with two hyphens
myst_heading_anchors = 3  # the same anchors as on the web pages of repositories
# README's section of measurements, which a page includes, begins at the third level.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# References that pages write must be found. Those that Sphinx makes of annotations need not: inventories of other
# projects would have to be downloaded, and type aliases have no page of their own.
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc)", ".*")]
