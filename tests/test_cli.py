"""The command line: exit codes, one line for bad input, and what it leaves behind."""

import subprocess
import sys

import pytest
import torch

import fisherlens as fl
from fisherlens import cli
from fisherlens.report import figures, stages

NETS = """
import torch
from torch import nn

number = 3

def make():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model

def load():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()

def batches():
    x, y = load()
    return [(x[:20], y[:20]), (x[20:], y[20:])]

def wrong():
    return "no network"

def broken():
    raise RuntimeError("the user's own bug")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a module of the user's, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    (tmp_path / "my_nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("my_nets", None)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the drawing, which takes most of the time and has its own tests."""
    monkeypatch.setattr(figures, "draw_all", lambda tree: {})


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return end.value.code


OWN = ("report", "--model", "my_nets:make", "--data", "my_nets:load", "--likelihood", "categorical")


def test_report_on_own_network(here, capsys, no_pictures):
    assert call(*OWN, "--num-examples", "20") == 0
    out, err = capsys.readouterr()
    assert "report.html" in out
    assert "fisherlens.load('report/report.nc')" in out
    assert "Not available" not in err
    tree = fl.load(here / "report" / "report.nc")
    assert tree.attrs["status"] == "complete"
    assert tree.attrs["subject"] == "my_nets:make"
    assert tree.attrs["n_data"] == 20


def test_report_on_batches(here, no_pictures):
    assert call(*OWN[:3], "--data", "my_nets:batches", *OWN[5:], "--num-examples", "25", "--out", "deep/er") == 0
    assert fl.load(here / "deep" / "er" / "report.nc").attrs["n_total"] == 30


def test_report_on_a_problem(here, monkeypatch):
    seen = {}

    def fake(name, folder, **options):
        seen.update(name=name, folder=folder, **options)
        raise KeyboardInterrupt("interrupted; told")

    monkeypatch.setattr(sys.modules["fisherlens.report"], "report", fake)
    assert call("report", "--problem", "digits-mlp", "--steps", "7", "--seed", "3") == 130
    assert (seen["name"], seen["num_steps"], seen["seed"], seen["folder"], seen["device"]) == (
        "digits-mlp",
        7,
        3,
        "report",
        "auto",
    )


def test_ctrl_c_keeps_what_is_finished(here, monkeypatch, capsys, no_pictures):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "independence", stop)
    assert call(*OWN) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "fisherlens: interrupted; what was finished is saved in report/report.nc and shown on report/report.html"
    )
    assert fl.load(here / "report" / "report.nc").attrs["status"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("repot",), "Unknown command 'repot'. Did you mean 'report'?"),
        (("report", "--bogus"), "No such option '--bogus'."),
        (("report", "--steps", "0"), "Invalid value for '--steps': 0 is not in the range x>=1."),
        (("report", "--problem", "digits-cn"), "Unknown problem 'digits-cn'. Did you mean 'digits-cnn'?"),
        (
            ("report", "--model", "my_nets:make"),
            "Your own network needs --model, --data and --likelihood together; missing: --data and --likelihood.",
        ),
        ((*OWN[:6], "categorial"), "Unknown likelihood 'categorial'. Did you mean 'categorical'?"),
        ((*OWN, "--steps", "5"), "--steps belongs to a ready problem, which is trained"),
        ((*OWN, "--kind", "exac"), "Unknown kind 'exac'. Did you mean 'exact'?"),
        ((*OWN, "--damping", "0"), "damping must be a finite number > 0; got 0.0."),
        ((*OWN, "--device", "gpu"), "Unknown device 'gpu'."),
        ((*OWN, "--out", "my_nets.py"), "my_nets.py is a file, not a folder."),
        (("report", "--model", "my_nets", *OWN[3:]), "--model takes package.module:factory"),
        (("report", "--model", "my_netz:make", *OWN[3:]), "there is no module 'my_netz' (did you mean 'my_nets'?)."),
        (("report", "--model", "my_nets:mak", *OWN[3:]), "module 'my_nets' has no 'mak'. Did you mean 'make'?"),
        (("report", "--model", "my_nets:number", *OWN[3:]), "'number' is of type int, not a function."),
        (
            ("report", "--model", "my_nets:wrong", *OWN[3:]),
            "the function must return a torch.nn.Module; it returned str.",
        ),
        (
            (*OWN[:4], "my_nets:wrong", *OWN[5:]),
            "(inputs, None)",
        ),
        (("compare", "-o", "adma"), "Unknown optimizer 'adma'. Did you mean 'adam'?"),
        (("compare", "-o", "sgd=fast"), "The learning rate of 'sgd' must be a number above 0; got 'fast'."),
        (("compare", "--problem", "digits"), "Unknown problem 'digits'."),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(here, capsys, arguments, message):
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("fisherlens: ")
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["my_nets.py"]


def test_unwritable_folder_shows_before_the_users_code(here, capsys):
    assert call("report", "--model", "my_nets:broken", *OWN[3:], "--out", "my_nets.py") == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(here):
    with pytest.raises(RuntimeError, match="the user's own bug"):
        cli.main(["report", "--model", "my_nets:broken", *OWN[3:]])
    assert not (here / "report").exists()


def test_a_bug_is_exit_code_1_in_a_process(here):
    command = [sys.executable, "-m", "fisherlens", "report", "--model", "my_nets:broken", *OWN[3:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: the user's own bug" in done.stderr


def test_compare(here, capsys):
    assert (
        call("compare", "--problem", "digits-mlp", "-o", "sgd=0.05", "-o", "adam", "--steps", "4", "--seeds", "1") == 0
    )
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["optimizer", "sgd=0.05", "adam"]
    found = fl.load(here / "compare" / "compare.nc")
    assert found.optimizer.values.tolist() == ["sgd=0.05", "adam"]
    assert f"{float(found.train_loss.sel(optimizer='adam')[0, -1]):.2f}" in out
    assert (here / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_keeps_what_was_recorded_before_ctrl_c(here, monkeypatch, capsys):
    ordinary = torch.optim.SGD.step
    calls = []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return ordinary(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert call("compare", "--problem", "digits-mlp", "-o", "sgd", "--steps", "5", "--seeds", "1") == 130
    assert "interrupted; what was recorded is saved" in capsys.readouterr().err
    assert int(fl.load(here / "compare" / "compare.nc").steps_taken[0, 0]) == 2


def test_problems_and_help(capsys):
    assert call("problems") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(fl.problems())
    for arguments in ((), ("--help",), ("report", "--help"), ("compare", "--help")):
        assert call(*arguments) == 0
        assert "fisherlens" in capsys.readouterr().out
    assert call("--version") == 0
    assert fl.__version__ in capsys.readouterr().out


def test_importing_the_command_line_stays_light():
    code = "import sys, fisherlens.cli; print([m for m in ('matplotlib', 'xarray', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


def test_a_full_disk_comes_after_the_numbers(here, monkeypatch, capsys):
    from fisherlens.results import files

    def full(path, container):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "seal", full)
    assert call("compare", "--problem", "digits-mlp", "-o", "sgd", "--steps", "1", "--seeds", "1") == 2
    printed = capsys.readouterr()
    assert "After 1 steps" in printed.out
    assert "No space left on device" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (here / "compare").exists()


def test_ctrl_c_while_files_are_written(here, monkeypatch, capsys):
    from fisherlens.report.folder import OutputFolder

    def stop(self, name, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "write", stop)
    assert call("compare", "--problem", "digits-mlp", "-o", "sgd", "--steps", "1", "--seeds", "1") == 130
    assert "interrupted; files in compare are whole or were not written" in capsys.readouterr().err
    assert fl.load(here / "compare" / "compare.nc").sizes["step"] == 2
