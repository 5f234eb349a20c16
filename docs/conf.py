"""Sphinx configuration: ``sphinx-build -W -n --keep-going -b html -d <doctrees> docs <html>``, both folders outside ``docs``.

Notebooks and the pages with code cells are executed afresh in every build, in a kernel of the Python that runs Sphinx, on the code
beside this folder. Nothing is taken from the network, neither here nor by the pages: formulae are MathML.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

sys.path[:0] = [str(ROOT), str(HERE / "_ext")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for the kernels
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are small: more threads only wait for each other
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a kernel's debugger would warn about frozen modules

# What a build derives from elsewhere starts from nothing, so that a page whose source is gone goes too.
for derived in ("notebooks", "_generated"):
    shutil.rmtree(HERE / derived, ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks", HERE / "notebooks", ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")]
)

import matplotlib as mpl  # noqa: E402

import fisherlens  # noqa: E402

mpl.use("Agg")

sys.modules["fisherlens.plot"] = fisherlens.plot  # under the name by which users reach it
sys.modules["fisherlens.adapters"] = fisherlens.adapters

# Names that modules import for type checkers only, so that annotations can be resolved.
for name, module in list(sys.modules.items()):
    if name.startswith("fisherlens."):
        vars(module).setdefault("xr", import_module("xarray"))
        vars(module).setdefault("pd", import_module("pandas"))
        vars(module).setdefault("Axes", import_module("matplotlib.axes").Axes)

# --- project ---------------------------------------------------------------------------------------------------------

project = "fisherlens"
author = "the fisherlens developers"
project_copyright = f"2026, {author}"
version = release = fisherlens.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
    "house_docstrings",
    "house_mathml",
]
exclude_patterns = [
    "_build",
    "_templates",
    "jupyter_execute",
    ".jupyter_cache",
    "**.ipynb_checkpoints",
    "findings/*.py",
    "findings/data",
]
templates_path = ["_templates"]
root_doc = "index"

# --- reference -------------------------------------------------------------------------------------------------------

autosummary_generate = True
# Files that differ in nothing but capitals are one file on some systems.
autosummary_filename_map = {
    "fisherlens.Partition": "fisherlens.Partition-class",
    "fisherlens.Problem": "fisherlens.Problem-class",
}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False
numpydoc_validation_checks: set[str] = set()  # tests/test_docs.py compares docstrings with signatures
# Other projects' inventories would have to be fetched; their names stay plain text.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|xarray|xr|pandas|pd|matplotlib|scipy|nn|collections|pathlib|typing|os|tqdm)\..*"),
    # said from inside, shown from outside
    ("py:(attr|class|meth)", r"plan|LayerPlan|Fisher\.(solve|dense)|.*\.Listing"),
    ("py:class", r".*\.(record\.Run|shelf\.Shelf|blocks\.Blocks)"),  # handed from one part of the package to another
    ("py:.*", r"(Axes|Tensor|optional|.*\.(Tensor|Axes|Dataset|DataArray|DataTree))"),
]

# --- pages and notebooks ---------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
# where something else runs the notebooks, only the pages with code cells are left to run here
nb_execution_excludepatterns = ["notebooks/*"] if os.environ.get("FISHERLENS_DOCS_NOTEBOOKS") == "as-stored" else []
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 600  # of one cell; generous, as a busy machine can be ten times slower than an idle one
nb_merge_streams = True

html_theme = "pydata_sphinx_theme"
html_title = f"fisherlens {release}"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "fisherlens"},
    "show_prev_next": False,
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
# Only the reference has pages below it to list at the side.
PAGES = [path.stem for path in [*HERE.glob("*.md"), *HERE.glob("*.rst")] if path.stem != "reference"]
html_sidebars = {page: [] for page in [*PAGES, "notebooks/*", "howto/*", "findings/*"]}
