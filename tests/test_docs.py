"""The reference names every public name, docstrings name every parameter, and the pages cover what is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import fisherlens as fl

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.rst").read_text(encoding="utf-8")
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("*.rst"), *DOCS.glob("howto/*.md"), *DOCS.glob("findings/*.md")])

_DIRECTIVE = re.compile(r"^\.\. auto(?:exception|data|module):: (?:fisherlens\.)?(\S+)$", re.MULTILINE)
_SUMMARY = re.compile(r"^\.\. autosummary::\n(?:   :.*\n)+\n((?:   \S+\n)+)", re.MULTILINE)


def public_names() -> dict[str, object]:
    """All names that users may rely on, modules with an ``__all__`` of their own included, as ``optim.CWNGD``."""
    found: dict[str, object] = {}
    for name in fl.__all__:
        value = getattr(fl, name)
        found[name] = value
        if isinstance(value, ModuleType):
            found |= {f"{name}.{inner}": getattr(value, inner) for inner in getattr(value, "__all__", ())}
    return found


def listed_names() -> list[str]:
    entries = [entry for block in _SUMMARY.findall(REFERENCE) for entry in block.split()]
    return entries + _DIRECTIVE.findall(REFERENCE)


PUBLIC = public_names()
CALLABLES = {name: value for name, value in PUBLIC.items() if callable(value)}


def methods() -> dict[str, object]:
    """Public methods of public classes that fisherlens itself defines."""
    found = {}
    for name, value in CALLABLES.items():
        if inspect.isclass(value):
            for key, member in inspect.getmembers(value, callable):
                if not key.startswith("_") and getattr(member, "__module__", "").startswith("fisherlens"):
                    found[f"{name}.{key}"] = member
    return found


def documented_parameters(doc: str) -> list[str] | None:
    """The names in a numpydoc section "Parameters", without stars; None where there is no such section."""
    lines = doc.splitlines()
    starts = [
        i for i in range(len(lines) - 1) if lines[i].strip() == "Parameters" and set(lines[i + 1].strip()) == {"-"}
    ]
    if not starts:
        return None
    names: list[str] = []
    for i in range(starts[0] + 2, len(lines)):
        if i + 1 < len(lines) and lines[i + 1].strip() and set(lines[i + 1].strip()) == {"-"}:
            break
        if lines[i] and not lines[i].startswith(" "):
            names += [name.strip().lstrip("*") for name in lines[i].partition(" : ")[0].split(",")]
    return names


def parameters(value: object) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]


def test_reading_parameters_off_a_docstring():
    doc = "First line.\n\nParameters\n----------\nx, y\n    Two.\n**more : dict\n    Text, with: a colon.\n\nReturns\n-------\nNothing"
    assert documented_parameters(doc) == ["x", "y", "more"]
    assert documented_parameters("No sections.\n\nNotes\n-----\nText") is None


def test_the_reference_lists_exactly_the_public_names():
    listed = listed_names()
    assert len(listed) == len(set(listed)), "a name stands twice"
    assert len(listed) > 30, "the page is no longer read as it is written"
    missing = sorted(set(PUBLIC) - set(listed))
    assert not missing, f"not in docs/reference.rst: {missing}"
    for name in set(listed) - set(PUBLIC):  # what objects are made of: no public name, but it must exist
        module, _, attribute = name.rpartition(".")
        assert module, f"docs/reference.rst lists {name}, which is not in fisherlens.__all__"
        assert hasattr(__import__(f"fisherlens.{module}", fromlist=[attribute]), attribute)


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_docstring_names_the_parameters_of_the_signature(name):
    value = CALLABLES[name]
    doc = inspect.getdoc(value) or ""
    assert doc.strip().splitlines()[0].rstrip().endswith("."), "the first line is a sentence"
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    documented = documented_parameters(doc)
    if documented is None:
        elsewhere = re.search(r"as :func:`|as made by :func:`", doc) is not None
        taken = [] if inspect.isabstract(value) else parameters(value)
        assert elsewhere or not taken, f"{name} documents none of {taken}"
    else:
        assert sorted(documented) == sorted(parameters(value))


@pytest.mark.parametrize("name", sorted(methods()))
def test_docstring_of_a_method_names_its_parameters(name):
    value = methods()[name]
    documented = documented_parameters(inspect.getdoc(value) or "")
    assert documented is None or sorted(documented) == sorted(parameters(value))


def test_every_page_is_in_the_table_of_contents():
    toctree = re.search(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    linked = set(re.findall(r"<(\S+)>$", toctree, re.MULTILINE))
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES}
    assert linked == (pages - {"index"}) | notebooks


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_hold_no_placeholders(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|lorem ipsum|coming soon|to be written)\b", text, re.IGNORECASE)


def test_architecture_names_every_module():
    package = Path(fl.__file__).parent
    modules = {path.stem if path.suffix == ".py" else path.name for path in package.iterdir()}
    modules = {name for name in modules if not name.startswith("__") and not name.startswith(".")} - {"py.typed", "py"}
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    missing = sorted(name for name in modules if f"`{name}`" not in text)
    assert not missing, f"not in docs/architecture.md: {missing}"


def test_errors_page_names_every_class():
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    classes = [name for name, value in CALLABLES.items() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(classes) >= 8
    assert [name for name in classes if f"`{name}`" not in text and f"`fl.{name}`" not in text] == []
