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
from fisherlens.report import figures, findings, report
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
