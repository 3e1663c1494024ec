"""Sphinx configuration. Builds offline: ``sphinx-build -n -W docs docs/_build``."""

import prefixkit

project = "prefixkit"
author = "the prefixkit authors"
version = release = prefixkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
exclude_patterns = ["_build", "_static"]  # tables that pages include lie with the plots

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an ``Attributes:`` section is a list of fields, not one entry per attribute
autodoc_default_options = {"member-order": "bysource"}
python_use_unqualified_type_names = True  # ``Tensor``, not ``torch.Tensor``: signatures stay readable

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"prefixkit {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

nitpick_ignore_regex = [
    # The documentation builds offline, so what other projects document has no target here.
    (r"py:class", r"(torch|transformers|collections\.abc|os|pathlib)\..+"),
    # The same, spelt as in annotations that are not evaluated (imports under TYPE_CHECKING).
    (r"py:class", r"PreTrainedModel|PreTrainedTokenizerBase|Cache|Llama|Path|np\.ndarray|nn\.Module"),
    # Another name of a list of pairs; docstrings say of what.
    (r"py:class", r"Pairs"),
    # Type variables: "the class of the model you passed in", "the test you passed in". They are no documented objects.
    (r"py:class", r"prefixkit\.\w+\.Model"),
    (r"py:class", r"prefixkit\.testing\.traits\.Test"),
]
