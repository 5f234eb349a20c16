"""The report: whole on disk, honest about what is missing, and every number on it from its own results."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import fisherlens as fl
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError, UnsupportedModuleError
from fisherlens.report import figures, findings, report, run, stages
from fisherlens.report.blocks import as_blocks, segmentations
from fisherlens.report.elements import table, text
from fisherlens.report.relations import RELATIONS, relations, silent
from fisherlens.report.steps import FULL, GRADIENT, one_step
from fisherlens.report.subject import take_examples
from fisherlens.report.words import change, count, listing, num, p_value, plain, plural, seconds, share

TINY = {"num_examples": 24, "num_null": 20, "progress": False}


def tiny_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))


def tiny_data(n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 4, 4, generator=generator)
    return x, (x.flatten(1)[:, :3]).argmax(1)


def tiny_problem() -> fl.Problem:
    x, y = tiny_data()
    return fl.Problem("tiny", "A tiny problem.", tiny_net, (x[:48], y[:48]), (x[48:], y[48:]))


@pytest.fixture(scope="module", autouse=True)
def _coarse_pictures():
    """Fewer pixels, which nobody here looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A report on a network of one's own."""
    folder = tmp_path_factory.mktemp("own")
    model = tiny_net()
    tree = report(model, folder, data=tiny_data(), likelihood="categorical", **TINY)
    return folder, tree, model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A report on a problem that is trained."""
    folder = tmp_path_factory.mktemp("trained") / "made" / "here"
    return folder, report(tiny_problem(), folder, num_steps=6, num_seeds=2, batch_size=16, **TINY)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the drawing, which takes most of the time; tests of the files draw."""
    monkeypatch.setattr(figures, "draw_all", lambda tree: {})


class Page(HTMLParser):
    """Cards, references and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.cards, self.references, self.ids, self.words = [], [], [], []
        self._inside = None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.references += [attrs[name] for name in ("src", "href", "data", "action") if name in attrs]
        if attrs.get("class") == "card":
            self.cards.append({**attrs, "shown": ""})
        self._inside = attrs.get("class")

    def handle_data(self, data):
        self.words.append(data)
        if self._inside == "value":
            self.cards[-1]["shown"] += data

    def handle_endtag(self, tag):
        self._inside = None


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "trained"])
def test_files_are_whole(kind, request):
    folder, tree = request.getfixturevalue(kind)[:2]
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "report.html", "report.nc"]
    back = fl.load(folder / "report.nc")
    xr.testing.assert_identical(back, tree)
    assert back.attrs["status"] == "complete"
    pictures = sorted((folder / "figures").glob("*.png"))
    assert len(pictures) == (13 if kind == "trained" else 10)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


@pytest.mark.parametrize("kind", ["own", "trained"])
def test_page_loads_nothing_and_its_links_lead_somewhere(kind, request):
    folder = request.getfixturevalue(kind)[0]
    source = (folder / "report.html").read_text()
    page = Page(folder / "report.html")
    outside = [ref for ref in page.references if not ref.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert re.search(r"https?:|@import|url\(|<script|<link", source) is None
    assert {ref[1:] for ref in page.references if ref.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in re.findall(r"[a-z]+", " ".join(page.words).lower())


@pytest.mark.parametrize("kind", ["own", "trained"])
def test_cards_quote_the_data_file(kind, request):
    folder = request.getfixturevalue(kind)[0]
    tree = fl.load(folder / "report.nc")
    page = Page(folder / "report.html")
    assert len(page.cards) == (8 if kind == "trained" else 7)
    for card in page.cards:
        found = tree["key_numbers"][card["data-key"]]
        value = float(found.sel(stage=card["data-stage"]) if "data-stage" in card else found)
        assert float(card["data-value"]) == value
        digits = re.search(r"-?[\d.,]+(?: × 10.+)?", card["shown"].replace("−", "-"))[0].replace(",", "")
        scale = 100 if "%" in card["shown"] else 1
        assert float(digits.split(" ×")[0]) == pytest.approx(scale * value, rel=0.06, abs=0.06)


def test_key_numbers_follow_from_the_analyses(trained):
    tree = trained[1]
    key, last = tree["key_numbers"].to_dataset(), "end"
    whole = tree["spectrum"].to_dataset().sel(layer="all", stage=last)
    values = np.clip(whole.eigenvalue.values, 0, None)
    assert float(key.trace.sel(stage=last)) == pytest.approx(
        float(tree["information"].information.sel(stage=last).sum()), rel=1e-5
    )
    assert float(key.top_eigenvalue.sel(stage=last)) == values[0]
    carry = int(key.carry_90.sel(stage=last))
    assert values[:carry].sum() >= 0.9 * values.sum() * (1 - 1e-12) > values[: carry - 1].sum()
    damping = float(tree["fisher"].damping.sel(stage=last))
    assert damping == pytest.approx(1e-3 * values[0])
    assert float(key.effective_dimension.sel(stage=last)) == pytest.approx((values / (values + damping)).sum())
    kept = tree["independence"].decrease_ratio.sel(layer="all", stage=last)
    assert float(key.decrease_cwngd.sel(stage=last)) == float(kept.sel(partition="cw-ngd"))
    pairs = tree["coupling"].to_dataset().sel(stage=last)
    upper = np.triu_indices(3, 1)
    assert float(key.strongest_coupling.sel(stage=last)) == pairs.coupling.values[upper].max()
    assert (
        float(key.pairs_above_floor.sel(stage=last)) == (pairs.coupling.values > pairs.noise_floor.values)[upper].sum()
    )


def test_stages_are_those_of_the_first_run(trained):
    tree = trained[1]
    assert tree["fisher"].stage.values.tolist() == ["start", "middle", "end"]
    assert tree["fisher"].step.values.tolist() == [0, 3, 6]
    assert tree.attrs["analysed_run"] == "cw-ngd, seed 0"
    problem = tiny_problem()
    inputs = take_examples(problem.train, 24, 0, torch.device("cpu"))[0]
    F = fl.Fisher(problem.model(0), inputs, likelihood="categorical")
    assert float(tree["fisher"].trace.sel(stage="start")) == pytest.approx(F.trace(), rel=1e-5)
    assert tree["training"].optimizer.values.tolist() == ["cw-ngd", "sgd"]
    assert tree["training"].seed.values.tolist() == [0, 1]
    assert set(tree["segment_training"].optimizer.values) == set(tree["independence"].partition.values)


def test_figures_of_an_earlier_report_do_not_stay(tmp_path, no_pictures):
    (tmp_path / "figures").mkdir()
    for name in ("11-training.png", "holiday.png", "07-holiday.png"):
        (tmp_path / "figures" / name).write_bytes(b"old")
    report(tiny_net(), tmp_path, data=tiny_data(), likelihood="categorical", **TINY)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["07-holiday.png", "holiday.png"]


def test_own_network_is_not_trained(own):
    tree = own[1]
    assert "training" not in tree.children
    assert tree["fisher"].stage.values.tolist() == ["as given"]
    assert tree.attrs["subject"] == "Sequential"
    words = " ".join(Page(own[0] / "report.html").words)
    assert "One step" in words
    assert "Did training behave" not in words


# --- no traces ------------------------------------------------------------------------------------------------------------


def test_nothing_of_the_user_changes(tmp_path, no_pictures):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 6, generator=generator), torch.arange(30) % 3
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002
    report(model, tmp_path, data=(x, y), likelihood="categorical", name="mine", **TINY)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.get_num_threads() == states[2]
    assert "<h1>mine</h1>" in (tmp_path / "report.html").read_text()


def test_same_seed_same_numbers(own, tmp_path, no_pictures):
    again = report(tiny_net(), tmp_path, data=tiny_data(), likelihood="categorical", **TINY)
    xr.testing.assert_equal(again["key_numbers"].to_dataset(), own[1]["key_numbers"].to_dataset())


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
    tree = report(model, tmp_path, data=(x, torch.zeros(len(x), dtype=torch.int64)), likelihood="categorical", **TINY)
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


# --- pieces ---------------------------------------------------------------------------------------------------------------


def test_controls_have_the_sizes_of_the_segments_in_each_layer():
    F = fl.Fisher(tiny_net(), tiny_data(), likelihood="categorical")
    found = {partition.scheme: partition for partition in segmentations(F, seed=3)}
    assert list(found) == ["layer", "unit", "cw-ngd", "mbf", "shifted", "shuffled", "diagonal"]
    own = found["cw-ngd"]
    for name in ("shifted", "shuffled"):
        control = found[name]
        assert control.sizes.tolist() == own.sizes.tolist()
        assert control.layers == own.layers
        assert sorted(control.flat.tolist()) == list(range(F.n_params))
        assert any(a.tolist() != b.tolist() for a, b in zip(control.blocks, own.blocks, strict=True))
        assert fl.partition(F, as_blocks(control)).sizes.tolist() == own.sizes.tolist()
    moved = found["shifted"]
    assert (np.diff(moved.blocks[0].numpy()) == 1).all()  # neighbours stay together
    again = {partition.scheme: partition for partition in segmentations(F, seed=3)}
    assert torch.equal(again["shuffled"].flat, found["shuffled"].flat)


def test_one_step_of_a_quadratic_loss_is_exact():
    """For a linear Gaussian model the loss is its quadratic model, so promise and measurement are equal as λ → 0."""
    torch_generator = torch.Generator().manual_seed(2)
    model = nn.Linear(3, 1).double()
    x = torch.randn(40, 3, generator=torch_generator, dtype=torch.float64)
    y = torch.randn(40, 1, generator=torch_generator, dtype=torch.float64)
    F = fl.Fisher(model, (x, y), likelihood="gaussian")
    found = one_step(F, model, (x, y), [fl.partition(F, "diagonal")], dampings={1: 1e-12})
    assert found.direction.values.tolist() == [FULL, "diagonal", GRADIENT]
    assert found.best_length.values == pytest.approx(1.0)
    assert found.measured_decrease.values == pytest.approx(found.predicted_decrease.values, rel=1e-9)
    judged = fl.independence(F, ["diagonal"], damping=1e-12)
    assert float(found.predicted_ratio[0, 1]) == pytest.approx(
        float(judged.decrease_ratio.sel(layer="all")[0]), rel=1e-8
    )
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1), y).solution
    residual = y - torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1) @ best
    least = (residual.square().mean() / 2).item() + 0.5 * np.log(2 * np.pi)
    assert float(found.loss) - float(found.measured_decrease[0, 0]) == pytest.approx(least, rel=1e-10)


def test_relations_sort_pairs_by_what_they_share():
    labels = ["c kernel 0,0", "c kernel 0,1", "c kernel 1,0", "c kernel 1,1", "c.bias"]
    rho = np.eye(5)
    for i, j, value in ((0, 1, 0.9), (2, 3, 0.7), (0, 2, 0.5), (1, 3, 0.3), (0, 3, 0.1), (1, 2, 0.2), (0, 4, 0.6)):
        rho[i, j] = rho[j, i] = value
    norms = np.array([1.0, 2.0, 1.0, 1.0, 1e-12])
    ds = xr.Dataset(
        {
            "coupling": (("block_i", "block_j"), rho),
            "noise_floor": (("block_i", "block_j"), np.full((5, 5), 0.25)),
            "p_adjusted": (("block_i", "block_j"), np.where(rho > 0.6, 0.01, 0.5)),
            "block_norm": ("block_i", norms),
        },
        {"block_i": labels, "block_j": labels},
    )
    assert silent(ds).tolist() == [False, False, False, False, True]
    found = relations({"c": ds}, None).sel(layer="c")
    assert found.relation.values.tolist() == list(RELATIONS)
    assert found.pairs.values.tolist() == [6, 2, 2, 2, 0]
    assert found.coupling.values[:4] == pytest.approx([0.4, 0.8, 0.4, 0.15])
    assert np.isnan(found.coupling.values[4])
    assert found.above_floor.values[:4] == pytest.approx([4 / 6, 1, 1, 0])
    assert found.significant.values[:4] == pytest.approx([2 / 6, 1, 0, 0])
    assert found.strongest_pair.item() == "c kernel 0,0 – c kernel 0,1"
    assert int(found.num_silent) == 1


def test_rank_correlation_has_mean_ranks_for_ties():
    scipy_stats = pytest.importorskip("scipy.stats")
    a, b = [1.0, 2.0, 2.0, 5.0, 4.0], [3.0, 1.0, 2.0, 9.0, 9.0]
    assert findings.rank_correlation(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert np.isnan(findings.rank_correlation([1, 2], [1, 2]))
    assert np.isnan(findings.rank_correlation([1, 1, 1], [1, 2, 3]))
    assert [findings.verdict(rho) for rho in (0.8, 0.5, 0.1, -1.0, float("nan"))] == [
        "held",
        "held in part",
        "did not hold",
        "did not hold",
        "not known",
    ]


def test_carrying_counts_the_largest():
    assert findings.carrying(np.array([5.0, 3.0, 1.0, 1.0, np.nan]), 0.9) == 3
    assert findings.carrying(np.array([5.0, 3.0, 1.0, 1.0]), 0.5) == 1
    assert findings.carrying(np.array([0.0, -1e-9]), 0.5) == 0


def test_examples_are_drawn_from_tensors_and_taken_in_order_from_batches():
    x, y = torch.arange(100.0)[:, None], torch.arange(100)
    cpu = torch.device("cpu")
    (inputs, targets), total = take_examples((x, y), 10, 0, cpu)
    assert total == 100
    assert inputs[:, 0].tolist() == targets.tolist() != list(range(10))
    (inputs, targets), total = take_examples([(x[:7], y[:7]), (x[7:], y[7:])], 10, 0, cpu)
    assert targets.tolist() == inputs[:, 0].tolist() == list(range(10))
    pairs = [((x[:5], 2 * x[:5]), y[:5]), ((x[5:], 2 * x[5:]), y[5:])]
    (inputs, _), _ = take_examples(pairs, 8, 0, cpu)
    assert inputs[1][:, 0].tolist() == [2.0 * n for n in range(8)]
    (inputs, _), _ = take_examples(({"a": x}, y), 10, 0, cpu)
    assert len(inputs["a"]) == 10
    (inputs, targets), _ = take_examples((x, None), 1000, 0, cpu)
    assert targets is None
    assert inputs is x


def test_words():
    assert [num(v) for v in (0, 1234.5, 0.0123, 2.4e-7, -3.0, float("inf"))] == [
        "0",
        "1,230",
        "0.0123",
        "2.40 × 10⁻⁷",
        "−3.00",
        "∞",
    ]
    assert [share(v) for v in (0.5, 0.99, 0.0312, 1.0, 1e-6, float("nan"))] == [
        "50 %",
        "99 %",
        "3.1 %",
        "100 %",
        "< 0.1 %",
        "–",
    ]
    assert (count(12345.2), p_value(0.005, 199), p_value(0.25, 199), seconds(125.0), plain(1e-4)) == (
        "12,345",
        "≤ 0.005",
        "0.250",
        "2 min 05 s",
        "1e-4",
    )
    assert (change(1, 40), change(2, 1), change(0, 1)) == (
        "grew 40 times",
        "fell to 50 % of that",
        "went from 0 to 1.00",
    )
    assert (listing(["a", "b", "c"]), listing([]), plural(0, "pair"), plural(3, "pair")) == (
        "a, b and c",
        "–",
        "no pair",
        "3 pairs",
    )


def test_what_comes_from_data_is_escaped():
    assert text("<b> & **`x<y`**") == "&lt;b&gt; &amp; <strong><code>x&lt;y</code></strong>"
    assert "<script>" not in table(["a"], [["<script>"]], "<script>")
