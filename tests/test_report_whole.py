"""The report and its command from outside: what is written, that it is the run's own numbers, and every bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

import fisherlens as fl


def small_network() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(24, 5, generator=generator)
    return model, (x, torch.randint(0, 3, (24,), generator=generator))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model, data = small_network()
    tree = fl.report(model, folder / "out", data=data, likelihood="categorical", num_null=19, progress=False)
    return folder / "out", tree


def test_writes_a_page_a_file_and_figures(written):
    folder, tree = written
    assert (folder / "report.html").stat().st_size > 10_000
    assert len(list((folder / "figures").glob("*.png"))) >= 4
    assert not list(folder.glob("*.tmp*"))
    loaded = fl.load(folder / "report.nc")
    assert isinstance(loaded, xr.DataTree)
    for node in tree.subtree:
        xr.testing.assert_identical(node.to_dataset(), loaded[node.path].to_dataset())


def test_page_stands_alone(written):
    page = (written[0] / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert "<script" not in page
    assert page.count("data:image/") >= 4


def test_numbers_are_those_of_the_network(written):
    model, (x, y) = small_network()
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    traces = [
        float(node.to_dataset()["trace"].values.reshape(-1)[-1])
        for node in written[1].subtree
        if "trace" in node.to_dataset().data_vars
    ]
    assert any(abs(trace - F.trace()) <= 1e-5 * F.trace() for trace in traces)


def test_model_is_left_alone(tmp_path, unchanged):
    model, data = small_network()
    model.train()
    with unchanged(model):
        fl.report(model, tmp_path / "out", data=data, likelihood="categorical", num_null=0, progress=False)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "fisherlens", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


NETS = """
import torch
def make():
    return torch.nn.Linear(3, 2)
def load():
    return torch.eye(3), torch.tensor([0, 1, 0])
def wrong():
    return torch.eye(3), torch.tensor([0, 5, 0])
"""

OWN = ("report", "--model", "nets:make", "--data", "nets:load", "--likelihood", "categorical")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "--problem", "digits-cn"), "digits-cnn"),
        (("repot",), "report"),
        (("report", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("report", "--model", "nets:make"), "--data"),
        ((*OWN[:2], "nets:nothing", *OWN[3:]), "nothing"),
        ((*OWN[:4], "nets:wrong", *OWN[5:]), "5"),
        ((*OWN[:-1], "categorial"), "categorical"),
        (("report", "--damping", "-1"), "damping"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "nets.py").write_text(NETS)
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report" / "report.html").exists()


def test_own_network_on_the_command_line(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    done = run(*OWN, "--out", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "report.html").exists()
    assert fl.load(tmp_path / "mine" / "report.nc") is not None


def test_help_and_problems(tmp_path):
    assert "--model" in run("report", "--help", cwd=tmp_path).stdout
    listed = run("problems", cwd=tmp_path)
    assert listed.returncode == 0
    assert "digits-cnn" in listed.stdout
    assert "digits-mlp" in listed.stdout


def test_interrupt_keeps_what_is_finished(tmp_path, monkeypatch):
    from fisherlens.report import stages

    model, data = small_network()
    names = [name for name in ("coupling", "independence") if hasattr(stages, name)]
    assert names, "the report calls these analyses from its stages module"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, names[-1], interrupt)
    with pytest.raises(KeyboardInterrupt):
        fl.report(model, tmp_path / "out", data=data, likelihood="categorical", num_null=0, progress=False)
    assert "incomplete" in (tmp_path / "out" / "report.html").read_text()
    kept = fl.load(tmp_path / "out" / "report.nc")
    assert any("eigenvalue" in node.to_dataset().data_vars for node in kept.subtree)
