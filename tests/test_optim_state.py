import copy
import io
import re

import pytest
import torch
from optim_samples import OPTIONS, data, flat, network, seeded, step
from torch import nn

from fisherlens.errors import InputError
from fisherlens.optim import CWNGD


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
