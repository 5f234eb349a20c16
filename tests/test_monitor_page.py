"""The how-to for one's own training run, whose code runs, and the picture of a Monitor."""

import re
import warnings

import numpy as np
import pytest
import torch
from monitor_samples import (
    HOWTO,
)

import fisherlens as fl
from fisherlens.errors import InputError

# --- the picture and the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    """The names that the how-to's code defines, and what it printed."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = re.findall(r"```\{code-cell\} python3\n(.*?)```", HOWTO.read_text(encoding="utf-8"), flags=re.DOTALL)
    printed = []
    names = {"__name__": "page", "print": lambda *words: printed.append(" ".join(map(str, words)))}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for cell in cells:
            exec(compile(cell, str(HOWTO), "exec"), names)  # noqa: S102 - the page's own code is what is tested
    yield names | {"printed": printed}
    matplotlib.pyplot.close("all")


def test_the_page_runs_and_shows_what_its_text_says(page):
    run = page["run"]
    assert run["step"].values.tolist() == list(range(0, 184, 20))
    assert run["loss"][-1] < run["loss"][0] / 2
    assert page["printed"][0].startswith("Monitor(every=20, N=64, P=2410, ")
    assert list(page["panels"]) == [
        "loss",
        "trace",
        "eigenvalue",
        "effective_dimension",
        "alignment",
        "drift",
        "coupling",
        "share_of_time",
    ]
    assert (run["stability_limit"] == 10).all()
    assert (run["alignment"] > 10 * run["chance"]).any()
    assert page["printed"][-1] == f"{page['monitor'].steps} {run.sizes['step']}"


def test_the_picture(page):
    run, panels = page["run"], page["panels"]
    lines = {name: [line.get_label() for line in ax.get_lines()] for name, ax in panels.items()}
    assert lines["trace"][-1] == "whole network"
    assert panels["eigenvalue"].get_yscale() == "log"
    assert lines["eigenvalue"] == [
        "largest",
        *lines["eigenvalue"][1:4],
        "5th largest",
        "stability limit",
    ]
    assert lines["alignment"] == ["gradient", "random, row space", "random"]
    np.testing.assert_allclose(panels["alignment"].get_lines()[0].get_ydata(), run["alignment"])
    np.testing.assert_allclose(panels["eigenvalue"].get_lines()[-1].get_ydata(), run["stability_limit"])
    assert {ax.get_xlabel() for ax in panels.values()} == {"optimizer steps"}
    assert panels["loss"].get_ylabel().replace("\n", " ") == "mean loss on the monitored examples [nat]"


def test_options_of_the_picture(page):
    import matplotlib.pyplot as plt

    run = page["run"].copy(deep=True)
    run["measured"][3] = False
    for name in ("loss", "trace"):
        run[name][3] = np.nan
    before = run.copy(deep=True)
    left, right = plt.subplots(1, 2)[1]
    drawn = fl.plot.monitor(
        run,
        {"loss": left, "trace": right},
        panels=["trace", "loss"],
        layers="all",
        x="seconds",
        scale="linear",
        legend=False,
    )
    assert list(drawn) == ["trace", "loss"]
    assert drawn["trace"] is right
    assert len(right.get_lines()) == 2  # the curve, and the step that was not measured
    assert right.get_yscale() == "linear"
    assert left.get_xlabel() == "wall time since the start [s]"
    assert right.get_legend() is None
    assert run.identical(before)
    bare = fl.plot.monitor(run, panels=["alignment", "eigenvalue"], show_chance=False, show_limit=False)
    assert [len(ax.get_lines()) for ax in bare.values()] == [2, 6]
    plt.close("all")


def test_the_picture_refuses_what_it_cannot_draw(page):
    run = page["run"]
    with pytest.raises(
        TypeError, match=r"^plot\.monitor draws the Dataset of fl\.Monitor, monitor\.result; got Monitor\.$"
    ):
        fl.plot.monitor(page["monitor"])
    with pytest.raises(InputError, match=r"^Unknown panel 'eigenvalues'\. Did you mean 'eigenvalue'"):
        fl.plot.monitor(run, panels=["eigenvalues"])
    with pytest.raises(InputError, match=r"^The panel 'drift' was not measured; this result holds loss, trace"):
        fl.plot.monitor(run.drop_vars("overlap_previous"), panels="drift")
    with pytest.raises(InputError, match=r"^Unknown layer 'conv'\."):
        fl.plot.monitor(run, panels="trace", layers="conv")
    with pytest.raises(InputError, match=r"'loss' is missing\. Give it, or name other panels\.$"):
        fl.plot.monitor(run, {}, panels="loss")
    with pytest.raises(
        InputError, match=r"^plot\.monitor draws the result of fl\.Monitor; this Dataset has none of its variables"
    ):
        fl.plot.monitor(run[["lr"]])
    nothing = run.assign(measured=run["measured"] & False)
    with pytest.raises(InputError, match=r"^plot\.monitor found no step that was measured\."):
        fl.plot.monitor(nothing)
