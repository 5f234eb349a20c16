import copy
import io
import re

import pytest
import torch
from optim_samples import OPTIONS, data, flat, network, seeded, step
from torch import nn

from fisherlens.errors import InputError
from fisherlens.optim import CWNGD, EKFAC, FNGD, KFAC, MBF, NGD, TNT, QuasiDiagonal, Shampoo, UnitWise
from fisherlens.partitions import partition


@pytest.fixture
def untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("options", [{}, {"labels": "sampled", "momentum": 0.5, "refresh": 3, "weight_decay": 0.1}])
def test_a_resumed_run_is_bitwise_equal(options, after, untouched):
    def normed():
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))

    model = seeded(normed, torch.float32)
    batch = data(dtype=torch.float32)
    opt = CWNGD(model, **OPTIONS, **options)
    for _ in range(after):
        step(opt, model, batch)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, stored)
    whole = [step(opt, model, batch) for _ in range(5)]
    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    resumed = seeded(normed, torch.float32)
    resumed.load_state_dict(saved["model"])
    other = CWNGD(
        resumed, lr=0.9, damping=0.9, **{"labels": "true"} | {k: v for k, v in options.items() if k != "momentum"}
    )
    other.load_state_dict(saved["opt"])
    assert [step(other, resumed, batch) for _ in range(5)] == whole
    assert torch.equal(flat(model), flat(resumed))
    assert other.diagnostics == opt.diagnostics
    assert other.partition.sizes.tolist() == opt.partition.sizes.tolist()


def test_a_loaded_state_is_a_copy():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    step(opt, model, data())
    twin = copy.deepcopy(model)
    other = CWNGD(twin, **OPTIONS)
    other.load_state_dict(opt.state_dict())
    step(other, twin, data())
    assert [b.H_steps for b in opt._blocks] == [1] * len(opt._blocks)
    step(opt, model, data())
    assert torch.equal(flat(model), flat(twin))


def test_the_state_of_another_method_or_model_is_refused():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(InputError) as caught:
        opt.load_state_dict(adam.state_dict())
    assert str(caught.value) == (
        "This state dict is of an optimizer of another library; CWNGD loads only its own. Build the same optimizer as when it "
        "was saved, or start without it."
    )
    step(opt, model, data())
    state = opt.state_dict()
    with pytest.raises(InputError, match="This state dict is of 'MBF'; CWNGD loads only its own"):
        opt.load_state_dict(state | {"fisherlens": state["fisherlens"] | {"method": "MBF"}})
    other = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match=re.escape("parameters differ, such as ('0.bias', [2]). Build the optimizer")):
        CWNGD(other, **OPTIONS).load_state_dict(state)
    fresh = CWNGD(network(), **OPTIONS, partition="layer")
    with pytest.raises(InputError, match=r"its averages have shapes .* where those of partition 'layer' have"):
        fresh.load_state_dict(state)


def test_it_cannot_be_copied_itself():
    opt = CWNGD(network(), **OPTIONS)
    with pytest.raises(TypeError, match=r"CWNGD cannot be copied or pickled, .* Save opt.state_dict\(\)"):
        copy.deepcopy(opt)
    with pytest.raises(InputError, match="CWNGD takes its parameter groups when it is built, as statistics"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_model_may_move_before_the_first_step_only():
    model = network(torch.float32)
    opt = CWNGD(model, **OPTIONS)
    model.double()
    step(opt, model, data())
    model.float()
    text = r"The optimizer's state is torch.float64 on cpu, but the model's parameters are torch.float32 on cpu: the model was"
    with pytest.raises(InputError, match=text):
        step(opt, model, data(dtype=torch.float32))


def without(state, *path):
    """A copy of a state dict that lacks one entry."""
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return state


OLDER = [
    (KFAC, ("averages", 0, "weight"), "an average has no entry 'weight'"),
    (CWNGD, ("averages", 0, "H_weight"), "an average has no entry 'H_weight'"),
    (QuasiDiagonal, ("averages", "0", "weight"), "an average has no entry 'weight'"),
    (lambda m: UnitWise(m, ema=0.5), ("averages", "3", "weight"), "an average has no entry 'weight'"),
    (lambda m: NGD(m, refresh=2), ("kept", "all", "damping"), "what is kept of a batch has no entry 'damping'"),
    (FNGD, ("coefficients", "5", "steps"), "a layer's coefficients has no entry 'steps'"),
    (FNGD, ("epoch_steps",), "the state has no entry 'epoch_steps'"),
    (Shampoo, ("averages", 1, "weight"), "an average has no entry 'weight'"),
    (MBF, ("maps",), "the state has no entry 'maps'"),
]


@pytest.mark.parametrize(("build", "path", "text"), OLDER)
def test_a_state_of_an_older_layout_is_refused_and_changes_nothing(build, path, text):
    model = network()
    opt = build(model)
    step(opt, model, data())
    twin = copy.deepcopy(model)
    fresh = build(twin)
    fresh.load_state_dict(opt.state_dict())
    with pytest.raises(InputError) as caught:
        fresh.load_state_dict(without(opt.state_dict(), "fisherlens", *path))
    assert str(caught.value) == (
        f"This state of {type(opt).__name__} has another layout: {text}. It was probably saved by another version of fisherlens, or edited. Resume with "
        "the version that saved it, or load the model alone and begin with a new optimizer: its averages are made anew within some steps."
    )
    for o, m in ((opt, model), (fresh, twin)):
        step(o, m, data(seed=1))
    assert torch.equal(flat(model), flat(twin))


def test_a_group_without_an_option_is_refused():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    state = without(opt.state_dict(), "param_groups", 0, "momentum_ema")
    with pytest.raises(InputError, match="has another layout: parameter group 0 has no entry 'momentum_ema'"):
        opt.load_state_dict(state)
    with pytest.raises(InputError, match=re.escape("the state dict has no entry 'state' (nor ['param_groups'])")):
        opt.load_state_dict({"fisherlens": opt.state_dict()["fisherlens"]})


MEANINGS = [
    (KFAC, {"damping_form": "factored"}, "damping_form is 'exact' there and 'factored' here"),
    (KFAC, {"form": "reduce"}, "form is 'expand' there and 'reduce' here"),
    (EKFAC, {"moments": "mean"}, "moments is 'examples' there and 'mean' here"),
    (MBF, {"variant": "released_view"}, "variant is 'B' there and 'released_view' here"),
    (TNT, {"damping_form": "shared"}, "damping_form is 'each' there and 'shared' here"),
]


@pytest.mark.parametrize(("build", "options", "text"), MEANINGS)
def test_a_state_whose_tensors_mean_something_else_is_refused(build, options, text):
    model = network()
    opt = build(model)
    step(opt, model, data())
    with pytest.raises(InputError, match=f"belongs to another model or setting: {text}"):
        build(network(), **options).load_state_dict(opt.state_dict())


def test_a_state_of_other_blocks_or_another_order_is_refused():
    model = network()
    rest = list(range(10, 123))
    halves = ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    kept, other = (partition(model, {"one": one, "two": two, "rest": rest}) for one, two in halves)
    opt = CWNGD(model, **OPTIONS, partition=kept)
    step(opt, model, data())
    with pytest.raises(
        InputError,
        match=r"saved with other blocks of the same sizes than those of partition .* here, as with another seed",
    ):
        CWNGD(network(), **OPTIONS, partition=other).load_state_dict(opt.state_dict())
    CWNGD(network(), **OPTIONS, partition=kept).load_state_dict(opt.state_dict())
    state = opt.state_dict()
    shapes = dict(reversed(state["fisherlens"]["parameters"].items()))
    with pytest.raises(InputError, match="belongs to another model or setting: its parameters stand in another order"):
        opt.load_state_dict(state | {"fisherlens": state["fisherlens"] | {"parameters": shapes}})
