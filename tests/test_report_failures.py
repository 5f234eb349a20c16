"""The report when something goes wrong: what is finished is kept, and the page says what is missing."""

# ruff: noqa: F811 - fixtures are imported, and then named as arguments
import pytest
import torch
from test_report import TINY, Page, _coarse_pictures, no_pictures, own, tiny_data, tiny_net, tiny_problem, trained  # noqa: F401 - fixtures act by their names
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError, NumericalWarning, UnsupportedModuleError
from fisherlens.report import report, run, stages
from fisherlens.report.subject import take_examples

# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_interrupt_keeps_finished_parts(tmp_path, monkeypatch, no_pictures):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "independence", stop)
    with pytest.raises(
        KeyboardInterrupt, match=r"what was finished is saved in .*report.nc and shown on .*report.html"
    ):
        report(tiny_net(), tmp_path, data=tiny_data(), likelihood="categorical", **TINY)
    tree = fl.load(tmp_path / "report.nc")
    assert tree.attrs["status"] == "interrupted"
    assert {"spectrum", "coupling", "units", "key_numbers"} <= set(tree.children)
    assert "independence" not in tree.children
    log = tree["log"].to_dataset()
    assert log.outcome.values[log.task.values == "independence"].tolist() == ["interrupted"]
    words = " ".join(Page(tmp_path / "report.html").words)
    assert "This report is incomplete." in words
    assert "Independence: interrupted" in words


def test_interrupt_while_training_keeps_the_curves(tmp_path, monkeypatch, no_pictures):
    from fisherlens.report import train

    ordinary = train.cwngd

    def stopping(model, problem, partition="cw-ngd"):
        optimizer = ordinary(model, problem, partition)
        step, left = optimizer.step, [3]

        def limited(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        optimizer.step = limited
        return optimizer

    monkeypatch.setattr(train, "cwngd", stopping)
    with pytest.raises(KeyboardInterrupt, match="what was finished is saved"):
        report(tiny_problem(), tmp_path, num_steps=6, num_seeds=1, **TINY)
    tree = fl.load(tmp_path / "report.nc")
    assert bool(tree["training"].interrupted.any())
    assert int(tree["training"].steps_taken.sel(optimizer="cw-ngd")[0]) == 3
    assert "fisher" not in tree.children
    assert "This report is incomplete." in (tmp_path / "report.html").read_text()


def test_interrupt_before_anything_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Fisher", stop)
    with pytest.raises(KeyboardInterrupt):
        report(tiny_net(), tmp_path / "new", data=tiny_data(), likelihood="categorical", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_failed_analysis_leaves_the_others(tmp_path, monkeypatch, no_pictures):
    def refuse(*args, **kwargs):
        raise MemoryBudgetError("The complete spectrum needs 5.0 TiB, over the budget.")

    monkeypatch.setattr(stages, "spectrum", refuse)
    tree = report(tiny_net(), tmp_path, data=tiny_data(), likelihood="categorical", **TINY)
    assert tree.attrs["status"] == "complete"
    assert "spectrum" not in tree.children
    assert {"coupling", "independence", "one_step"} <= set(tree.children)
    F = fl.Fisher(tiny_net(), take_examples(tiny_data(), 24, 0, torch.device("cpu"))[0], likelihood="categorical")
    exact = float(fl.spectrum(F).eigenvalue[0])
    assert float(tree["fisher"].top_eigenvalue[0]) == pytest.approx(exact, rel=1e-3)  # by power iteration instead
    page = Page(tmp_path / "report.html")
    assert "The complete spectrum needs 5.0 TiB, over the budget." in " ".join(page.words)
    assert "carry_90" not in {card["data-key"] for card in page.cards}


def test_unexpected_error_keeps_finished_parts_and_passes_through(tmp_path, monkeypatch, no_pictures):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stages, "coupling", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        report(tiny_net(), tmp_path, data=tiny_data(), likelihood="categorical", **TINY)
    assert fl.load(tmp_path / "report.nc").attrs["status"] == "failed"
    assert "ZeroDivisionError: a bug" in (tmp_path / "report.html").read_text()


def test_training_that_diverges_is_reported(tmp_path, no_pictures):
    class Wild(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.fill_(3e38)

    optimizers = {"wild": lambda model: Wild(model.parameters(), lr=1.0)}
    tree = report(tiny_problem(), tmp_path, num_steps=6, num_seeds=1, optimizers=optimizers, **TINY)
    assert tree["fisher"].stage.values.tolist() == ["start"]
    assert bool(tree["training"].diverged.all())
    words = " ".join(Page(tmp_path / "report.html").words)
    assert "1 diverged" in words
    assert "Training ended before this stage was reached." in words


def test_overflowing_stage_is_said_to_be_one(tmp_path, no_pictures):
    optimizers = {"wild": lambda model: torch.optim.SGD(model.parameters(), lr=1e30)}
    report(tiny_problem(), tmp_path, num_steps=6, num_seeds=1, optimizers=optimizers, **TINY)
    assert "F is not finite: the squares of its scores overflow" in (tmp_path / "report.html").read_text()


def test_stage_without_information_does_not_stop_the_others(tmp_path, no_pictures):
    class Certain(torch.optim.SGD):
        def step(self, closure=None):
            weight, bias = self.param_groups[0]["params"][-2:]
            weight.data.zero_()
            bias.data.copy_(torch.tensor([200.0, 0.0, 0.0]))

    optimizers = {"certain": lambda model: Certain(model.parameters(), lr=1.0)}
    with pytest.warns(NumericalWarning, match="come out as 0"):
        tree = report(tiny_problem(), tmp_path, num_steps=6, num_seeds=1, optimizers=optimizers, **TINY)
    assert tree["fisher"].stage.values.tolist() == ["start", "middle", "end"]
    assert tree["fisher"].trace.values[1:].tolist() == [0, 0]
    assert tree["units"].stage.values.tolist() == ["start"]
    assert "no output depends on any parameter here" in (tmp_path / "report.html").read_text()
    cards = {card["data-key"]: card["data-stage"] for card in Page(tmp_path / "report.html").cards}
    assert cards["trace"] == "end"
    assert cards["decrease_cwngd"] == "start"


def test_data_without_targets(tmp_path, no_pictures):
    tree = report(tiny_net(), tmp_path, data=(tiny_data()[0], None), likelihood="categorical", **TINY)
    assert "spectrum" in tree.children
    assert "one_step" not in tree.children
    assert "Give data=(inputs, targets) for this part." in (tmp_path / "report.html").read_text()


def test_zero_information(tmp_path):
    model = tiny_net()
    with torch.no_grad():
        model[5].weight.zero_()
        model[5].bias.copy_(torch.tensor([200.0, 0.0, 0.0]))  # certain for every example: the Fisher underflows to zero
    x = tiny_data()[0]
    data = x, torch.zeros(len(x), dtype=torch.int64)
    with pytest.warns(NumericalWarning, match="come out as 0"):
        tree = report(model, tmp_path, data=data, likelihood="categorical", **TINY)
    assert float(tree["fisher"].trace[0]) == 0
    assert "no output depends on any parameter here" in (tmp_path / "report.html").read_text()


def test_single_layer(tmp_path, no_pictures):
    tree = report(
        nn.Linear(16, 3), tmp_path, data=(tiny_data()[0].flatten(1), tiny_data()[1]), likelihood="categorical", **TINY
    )
    assert tree["coupling"].sizes["block_i"] == 1
    assert "The network has one layer, so there is no pair." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"subject": "digits-cn"}, InputError, r"Unknown problem 'digits-cn'. Did you mean 'digits-cnn'"),
        (
            {"subject": "digits-mlp", "data": 1},
            InputError,
            r"'digits-mlp' is a problem, which brings its own data.*got data as well",
        ),
        ({"data": None}, InputError, r"A report on your own network needs data=.*Missing: data."),
        ({"likelihood": None}, InputError, r"Missing: likelihood."),
        ({"likelihood": "categorial"}, InputError, r"Unknown likelihood 'categorial'. Did you mean 'categorical'"),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "use likelihood='categorical'"),
        ({"subject": 3}, TypeError, r"fl.report takes a network .* got int"),
        ({"kind": "exac"}, InputError, r"Unknown kind 'exac'. Did you mean 'exact'"),
        ({"damping": -1.0}, InputError, r"damping must be a finite number > 0; got -1.0"),
        ({"num_examples": 0}, InputError, r"num_examples must be at least 1; got 0"),
        ({"num_steps": 2.5}, TypeError, r"num_steps must be an int; got float 2.5"),
        ({"memory": "lots"}, InputError, r"memory must be a positive number of bytes"),
        ({"device": "gpu"}, InputError, r"Unknown device 'gpu'. Known: 'auto', 'cpu', 'cuda'"),
        ({"data": (tiny_data()[0][:0], tiny_data()[1][:0])}, InputError, r"The data set is empty"),
        ({"data": (tiny_data()[0], tiny_data()[1] + 7)}, InputError, r"."),
        ({"data": (tiny_data()[0] * float("nan"), tiny_data()[1])}, NonFiniteError, r"hold NaN or infinity"),
        ({"data": iter([tiny_data()])}, InputError, r"one-shot"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, change, error, match):
    options = {"subject": tiny_net(), "data": tiny_data(), "likelihood": "categorical", **TINY} | change
    if options["subject"] == "digits-cn":
        options |= {"data": None, "likelihood": None}
    if options["subject"] == "digits-mlp":
        options |= {"likelihood": None}
    with pytest.raises(error, match=match):
        report(options.pop("subject"), tmp_path / "new" / "folder", **options)
    assert list(tmp_path.iterdir()) == []


def test_unsupported_network_writes_nothing(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(4, 3)

        def forward(self, x):
            return self.inner(x)[0][:, -1]

    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    try:
        report(Net(), tmp_path / "new", data=(x, torch.zeros(6, dtype=torch.int64)), likelihood="categorical", **TINY)
    except UnsupportedModuleError:
        assert list(tmp_path.iterdir()) == []
    else:  # supported by a later version: then the report must be whole
        assert fl.load(tmp_path / "new" / "report.nc").attrs["status"] == "complete"


def test_unwritable_folder_shows_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Fisher", None)  # any work would fail on this
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file is a file, not a folder. Choose another name with out="):
        report(tiny_net(), tmp_path / "file", data=tiny_data(), likelihood="categorical", **TINY)
    (tmp_path / "taken" / "report.nc").mkdir(parents=True)
    with pytest.raises(InputError, match=r"report.nc is a folder"):
        report(tiny_net(), tmp_path / "taken", data=tiny_data(), likelihood="categorical", **TINY)
    with pytest.raises(InputError, match=r"out must name a folder"):
        report(tiny_net(), "", data=tiny_data(), likelihood="categorical", **TINY)
