import io
import re

import numpy as np
import pytest
import torch
from optim_samples import OPTIONS, count_hooks, data, flat, loss_of, network, seeded, step
from torch import nn
from torch.nn import functional

from fisherlens import Categorical
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.optim import CWNGD


def snapshot(opt, model):
    state = {"state": opt.state_dict(), "model": model.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_refused_and_changes_nothing(bad):
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS, momentum=0.5)
    step(opt, model, batch)
    before = snapshot(opt, model)
    loss = loss_of(model, batch)
    opt.zero_grad()
    loss.backward()
    model[3].weight.grad[1, 2] = bad
    with pytest.raises(NonFiniteError) as caught:
        opt.step()
    assert str(caught.value) == (
        "The gradient of parameter '3.weight' holds NaN or infinity, so the step was refused: parameters and state are as "
        "before. The loss has probably diverged or divided by zero; lower lr, raise damping, or skip this batch."
    )
    assert snapshot(opt, model) == before
    twin = network()
    other = CWNGD(twin, **OPTIONS, momentum=0.5)
    for _ in range(2):
        step(other, twin, batch)
    step(opt, model, batch)
    assert torch.equal(flat(model), flat(twin))


def test_scores_that_overflow_are_refused_and_change_nothing():
    model, batch = network(torch.float32), data(dtype=torch.float32)
    opt = CWNGD(model, **OPTIONS)
    step(opt, model, batch)
    before = snapshot(opt, model)
    opt.zero_grad()
    (1e25 * loss_of(model, batch)).backward()
    text = r"The scores of layer '0' hold NaN or infinity in their second moments although the gradient is finite, so the step was refused"
    with pytest.raises(NonFiniteError, match=text):
        opt.step()
    assert snapshot(opt, model) == before


def test_a_step_needs_a_backward_pass_before_it():
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS)
    text = re.escape(
        "step() found no statistics: no backward pass has reached the model's layers since the last step (or since zero_grad, "
        "which drops them). The loop is loss = loss_fn(model(x), y); opt.zero_grad(); loss.backward(); opt.step(). The model must "
        "be the one that the optimizer was built with, its hooks in place; a loss that was backpropagated by torch.autograd.grad "
        "leaves no .grad and does not count."
    )
    with pytest.raises(InputError, match=text):
        opt.step()
    step(opt, model, batch)
    with pytest.raises(InputError, match=text):
        opt.step()
    loss_of(model, batch).backward()
    opt.zero_grad()
    with pytest.raises(InputError, match=text):
        opt.step()


def test_examples_must_stay_on_the_first_axis():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x.reshape(-1, 4)).reshape(len(x), -1))

    model = seeded(Folded)
    opt = CWNGD(model, **OPTIONS)
    with pytest.raises(InputError, match=r"must see the same examples on their first axis; got .*20 at 'a'"):
        step(opt, model, (torch.ones(5, 4, 4, dtype=torch.float64)[:, :, :].reshape(5, 16), torch.arange(5) % 3))


@pytest.mark.parametrize(
    ("factory", "shape", "text"),
    [
        (
            lambda: nn.Linear(4, 3),
            (4,),
            r"Layer '\(root\)' \(Linear\) must read a batch, of at least 2 axes .* got an input of shape \(4,\)",
        ),
        (
            lambda: nn.Conv1d(1, 3, 2),
            (1, 2),
            r"Layer '\(root\)' \(Conv1d\) must read a batch, of 3 axes .* shape \(1, 2\)",
        ),
    ],
)
def test_a_single_example_needs_its_batch_axis(factory, shape, text):
    model = seeded(factory)
    opt = CWNGD(model, **OPTIONS)
    model(torch.ones(shape, dtype=torch.float64)).sum().backward()
    with pytest.raises(InputError, match=text):
        opt.step()


class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        x = x + 0
        y = self.a(x)
        x += 1
        return y


def test_an_input_that_is_written_over_is_noticed():
    model = seeded(Careless, torch.float32)
    opt = CWNGD(model, **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autograd keeps a converted copy, and sees nothing
        outputs = model(torch.ones(2, 4))
    with pytest.raises(
        InputError, match="The input of layer 'a' was changed in place after the layer had read it, so its scores"
    ):
        outputs.sum().backward()
    assert opt.diagnostics["steps"] == 0


def test_a_bias_alone_needs_no_input():
    model = seeded(Careless)
    model.a.weight.requires_grad_(False)
    opt = CWNGD(model, **OPTIONS)
    before = model.a.bias.detach().clone()
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    opt.step()
    assert (model.a.bias < before).all()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": 0.0}, InputError, "lr must be a finite number > 0; got 0.0."),
        ({"lr": float("nan")}, InputError, "lr must be a finite number > 0; got nan."),
        ({"damping": 0.0}, InputError, "damping must be a finite number > 0; got 0.0."),
        ({"damping": float("inf")}, InputError, "damping must be a finite number > 0; got inf."),
        ({"damping": "small"}, TypeError, "damping must be a number; got str 'small'."),
        ({"momentum": 1.0}, InputError, "momentum must be a finite number >= 0 and < 1; got 1.0."),
        ({"weight_decay": -1.0}, InputError, "weight_decay must be a finite number >= 0; got -1.0."),
        ({"kl_clip": 0.0}, InputError, "kl_clip must be a finite number > 0; got 0.0."),
        ({"refresh": 0}, InputError, "refresh must be a finite number >= 1; got 0."),
        ({"refresh": 2.0}, TypeError, "refresh must be an int; got float 2.0."),
        ({"seed": -1}, InputError, "seed must be a finite number >= 0; got -1."),
        (
            {"labels": "observed"},
            InputError,
            "Unknown labels 'observed'. Did you mean 'sampled'? Known: 'true', 'sampled'.",
        ),
        ({"reduction": "none"}, InputError, "Unknown reduction 'none'. Known: 'mean', 'sum'."),
        (
            {"likelihood": nn.CrossEntropyLoss()},
            TypeError,
            "likelihood must be a name or a fisherlens likelihood; got CrossEntropyLoss.",
        ),
        (
            {"likelihood": Categorical(weight=[1.0, 2.0, 3.0]), "labels": "sampled"},
            InputError,
            "labels='sampled' cannot use Categorical(weight=",
        ),
    ],
)
def test_wrong_options_are_refused_and_leave_no_hooks(options, error, text):
    model = network()
    with pytest.raises(error) as caught:
        CWNGD(model, **options)
    assert str(caught.value).startswith(text)
    assert count_hooks(model) == 0


def test_an_option_that_went_wrong_later_is_refused():
    model = network()
    opt = CWNGD(model, **OPTIONS)
    loss_of(model, data()).backward()
    opt.param_groups[0]["damping"] = -1.0
    with pytest.raises(InputError, match=r"damping must be a finite number > 0; got -1\.0\."):
        opt.step()
    opt.param_groups[0]["damping"] = np.float32(1e-3)
    opt.step()


def frozen():
    return network().requires_grad_(False)


def mixed():
    model = network()
    model[0].float()
    return model


@pytest.mark.parametrize(
    ("factory", "error", "text"),
    [
        (
            lambda: [torch.zeros(2)],
            TypeError,
            "CWNGD takes the model itself, a torch.nn.Module, to put hooks on; got list.",
        ),
        (frozen, InputError, "CWNGD needs a model with parameters that require grad; Sequential has none."),
        (
            lambda: nn.Embedding(3, 2),
            InputError,
            "CWNGD preconditions Linear and convolution layers (by exact type); Embedding has no",
        ),
        (
            mixed,
            InputError,
            "The trainable parameters must share one device and one dtype, float32 or float64; got ['torch.float32 on",
        ),
        (
            lambda: network().to(torch.bfloat16),
            InputError,
            "The trainable parameters must share one device and one dtype",
        ),
        (
            lambda: nn.LazyLinear(3),
            InputError,
            "Parameters ['weight', 'bias'] are not initialised yet. Run one forward pass before",
        ),
    ],
)
def test_models_without_anything_to_train_are_refused(factory, error, text):
    with pytest.raises(error) as caught:
        CWNGD(factory())
    assert str(caught.value).startswith(text)


def test_sampled_labels_need_the_whole_model_and_one_output_tensor():
    model, batch = network(), data()
    opt = CWNGD(model, **OPTIONS, labels="sampled")
    functional.cross_entropy(model[4:](model[:4](batch[0])), batch[1]).backward()
    with pytest.raises(InputError, match="without a call of that model since the last step"):
        opt.step()

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x), x

    model = seeded(Pair)
    CWNGD(model, **OPTIONS)  # fine
    opt = CWNGD(model, **OPTIONS, labels="sampled")
    with pytest.raises(
        InputError, match=r"which must be one tensor of logits or means; the model returned tuple\. Use labels='true'"
    ):
        model(torch.ones(2, 2, dtype=torch.float64))
    assert opt.diagnostics["steps"] == 0
