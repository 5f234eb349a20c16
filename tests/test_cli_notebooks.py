"""``fisherlens notebooks``: found in a checkout and beside an installed package, copied, kept where they were changed, and run."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

import pytest

from fisherlens import cli
from fisherlens.cli import stories
from fisherlens.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["notebooks", *arguments])
    return end.value.code


def notebook(*sources):
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# A tiny story\n", "\n", "Of one cell."]}]
    cells += [
        {"cell_type": "code", "id": f"c{k}", "metadata": {}, "source": text, "outputs": [], "execution_count": None}
        for k, text in enumerate(sources)
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A package with two notebooks of one cell each, the second of which fails."""
    home = tmp_path / "package" / "notebooks"
    home.mkdir(parents=True)
    (home / "01_tiny.ipynb").write_text(notebook("import fisherlens", "print(6 * 7)"), encoding="utf-8")
    (home / "02_wrong.ipynb").write_text(notebook("1 / 0"), encoding="utf-8")
    monkeypatch.setattr(stories, "home", lambda: home)
    return home


def test_all_are_listed_with_their_titles(here, capsys):
    assert call("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[0].split(maxsplit=1)[1] == "A first look through the lens"
    assert not list(here.iterdir())


def test_copies_are_those_of_the_package_and_changed_ones_are_kept(here, capsys):
    assert call() == 0
    printed = capsys.readouterr()
    assert printed.out.count("(written)") == len(NAMES)
    assert printed.err == ""
    for name in NAMES:
        path = here / "notebooks" / f"{name}.ipynb"
        assert path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes()
    mine = here / "notebooks" / f"{NAMES[0]}.ipynb"
    mine.write_text(notebook("my own"), encoding="utf-8")
    assert call() == 0
    printed = capsys.readouterr()
    assert printed.out.count("(there already)") == len(NAMES) - 1
    assert "(kept, it differs)" in printed.out
    assert "--overwrite replaces them" in printed.err
    assert "my own" in mine.read_text(encoding="utf-8")
    assert call("--overwrite", NAMES[0]) == 0
    assert "my own" not in mine.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["3", "03", "reading_a_spectrum", "03_reading_a_spectrum", "03_reading_a_spectrum.ipynb"]
)
def test_one_by_its_number_or_name(here, name):
    assert call(name, "--out", "one") == 0
    assert [path.name for path in (here / "one").iterdir()] == ["03_reading_a_spectrum.ipynb"]


def test_unknown_names_and_folders_that_are_none(here, capsys):
    assert call("03_reading_the_spectrum") == 2
    assert (
        "Unknown notebook '03_reading_the_spectrum'. Did you mean '03_reading_a_spectrum'?" in capsys.readouterr().err
    )
    (here / "file").touch()
    assert call("--out", "file") == 2
    assert "file is a file, not a folder" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["file"]


def test_they_run_where_jupyter_is(here, tiny, capsys, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    assert call("--run", "--out", "mine") == 1
    printed = capsys.readouterr()
    assert "02_wrong.ipynb failed: ZeroDivisionError: division by zero" in printed.err
    done = json.loads((here / "mine" / "01_tiny.ipynb").read_text(encoding="utf-8"))
    assert done["cells"][-1]["outputs"][0]["text"] in ("42\n", ["42\n"])
    assert call("1", "--out", "mine") == 0  # outputs make no notebook another one
    assert "(there already)" in capsys.readouterr().out
    assert call("--run", "--out", str(tiny)) == 2
    assert "is where fisherlens keeps its own notebooks" in capsys.readouterr().err


def test_without_jupyter_nothing_is_written_and_the_remedy_is_told(here, tiny, capsys, monkeypatch):
    monkeypatch.setattr(stories.importlib.util, "find_spec", lambda name: None)
    for option, package in (("--run", "nbclient ipykernel"), ("--open", "jupyterlab ipykernel")):
        assert call(option, "--out", "mine") == 2
        assert f"{option} needs" in (told := capsys.readouterr().err)
        assert f"pip install {package}" in told
    assert not (here / "mine").exists()


def test_they_are_opened_in_jupyterlab(here, tiny, monkeypatch):
    seen = []

    class Done:
        returncode = 0

    def run(command, **options):
        seen.append((command, options["env"]["PYTHONPATH"].split(os.pathsep)[0]))
        return Done()

    monkeypatch.setattr(stories.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(stories.subprocess, "run", run)
    assert call("--open", "--out", "mine") == 0
    assert call("1", "--open", "--out", "mine") == 0
    assert seen[0] == ([sys.executable, "-m", "jupyterlab", "mine"], str(ROOT))
    assert seen[1][0][-1] == str(Path("mine") / "01_tiny.ipynb")
    Done.returncode = 7
    assert call("--open", "--out", "mine") == 1


def test_they_are_found_in_a_checkout_and_in_an_installation(tmp_path, monkeypatch):
    assert stories.home() == ROOT / "notebooks"
    module = tmp_path / "site" / "fisherlens" / "cli" / "stories.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(stories, "__file__", str(module))
    (tmp_path / "site" / "notebooks").mkdir()
    (tmp_path / "site" / "notebooks" / "01_of_somebody_else.ipynb").touch()
    with pytest.raises(
        InputError, match=r"^The notebooks of fisherlens are not beside its modules in .*install fisherlens again\.$"
    ):
        stories.home()
    own = tmp_path / "site" / "fisherlens" / "notebooks"
    own.mkdir()
    (own / "01_tiny.ipynb").touch()
    assert stories.home() == own


def test_the_wheel_takes_them_along():
    """What a build does with these lines was tried by hand; here they cannot go without notice."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert wheel["only-include"] == ["fisherlens", "notebooks"]
    assert wheel["sources"] == {"notebooks": "fisherlens/notebooks"}
    assert wheel["exclude"] == ["/notebooks/*.py"]
