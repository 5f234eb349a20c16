import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods import Categorical
from fisherlens.results import load, save
from fisherlens.training import Problem, compare_optimizers, problem, train
from fisherlens.training.loop import evaluate
from fisherlens.training.record import Setting

METRICS = ("train_loss", "test_loss", "test_accuracy", "seconds")


def sgd(lr=0.1, **settings):
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, **settings)


def blobs(n=30, factory=None, **settings):
    """Three Gaussian clouds in the plane, far enough apart to be learnt in a few steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    inputs = centres[labels] + 0.3 * torch.randn(n, 2, generator=generator)
    return Problem(
        "blobs",
        "Three clouds.",
        factory or (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))),
        (inputs, labels),
        (inputs[: n // 2], labels[: n // 2]),
        **settings,
    )


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_sgd_learns_the_digits():
    digits = problem("digits-cnn")
    record = train(digits.model(0), digits, sgd(0.05, momentum=0.9), num_steps=250, record_every=50)
    assert record.test_accuracy.isel(optimizer=0, seed=0)[-1] > 0.93


@pytest.mark.slow
def test_sgd_passes_95_percent_on_the_digits_in_ten_seconds():
    result = compare_optimizers("digits-cnn", {"sgd": sgd(0.05, momentum=0.9)}, num_steps=600, seeds=5)
    final = result.isel(optimizer=0, step=-1)
    assert (final.test_accuracy > 0.95).all()
    assert final.seconds.min() < 10  # the best of five: other work on the machine only adds


def test_training_is_the_loop_that_one_would_write():
    data = blobs()
    model, by_hand = data.model(1), data.model(1)
    record = train(model, data, sgd(0.2, momentum=0.9), num_steps=7, batch_size=8, seed=5, record_every=3)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.2, momentum=0.9)
    inputs, targets = data.train
    generator = torch.Generator().manual_seed(5)
    batches = itertools.chain(*(torch.randperm(30, generator=generator).split(8) for _ in range(2)))
    losses = []
    for step, index in enumerate(itertools.islice(batches, 8)):
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(by_hand(inputs), targets).item())
        if step == 7:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(inputs[index]), targets[index]).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(model), parameters(by_hand), rtol=1e-6, atol=1e-7)
    assert record.step.values.tolist() == [0, 3, 6, 7]
    np.testing.assert_allclose(record.train_loss[0, 0], np.array(losses)[[0, 3, 6, 7]], rtol=1e-5)
    with torch.no_grad():
        hits = by_hand(data.test[0]).argmax(1) == data.test[1]
    assert record.test_accuracy[0, 0, -1] == hits.double().mean()
    assert all(p.grad is None for p in model.parameters())


def test_the_record_is_labelled_and_survives_a_file(tmp_path):
    data = blobs()
    record = train(data.model(), data, sgd(), num_steps=4, record_every=2, name="plain", seed=3)
    assert {name: record[name].dims for name in METRICS} == dict.fromkeys(METRICS, ("optimizer", "seed", "step"))
    assert (record.optimizer.item(), record.seed.item()) == ("plain", 3)
    assert record.train_loss.units == record.test_loss.units == "nat"
    assert record.seconds.units == "s"
    assert record.seconds[0, 0].diff("step").min() > 0
    attrs = record.attrs
    expected = {
        "likelihood": "categorical",
        "n_data": 30,
        "n_params": 27,
        "dtype": "float32",
        "device": "cpu",
        "seed": 3,
    }
    assert {name: attrs[name] for name in expected} == expected
    settings = json.loads(attrs["settings"])
    made_by = settings.pop("optimizers")
    assert settings == {"batch_size": 64, "n_test": 15, "num_steps": 4, "record_every": 2}
    assert made_by["plain"]["class"] == "SGD"
    assert made_by["plain"]["lr"] == 0.1
    assert load(save(record, tmp_path / "run.nc")).identical(record)


def test_equal_seeds_are_equal_to_the_bit_and_the_random_state_is_left():
    data = blobs(factory=lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    finals = []
    for seed in (2, 2, 3):
        model = data.model(0)
        torch.rand(seed, generator=torch.default_generator)  # a different global state for each run
        before = torch.get_rng_state()
        train(model, data, sgd(), num_steps=6, batch_size=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        finals.append(parameters(model))
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def test_evaluation_is_in_eval_mode_and_every_module_gets_its_mode_back():
    data = blobs(factory=lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    model = data.model(0)
    model[2].eval()  # a user who froze the dropout keeps it frozen
    modes = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    twice = [evaluate(model, data.train, Categorical(), "training") for _ in range(2)]
    assert twice[0] == twice[1]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, statistics)
    train(model, data, sgd(), num_steps=2)
    assert [module.training for module in model.modules()] == modes
    assert not torch.equal(model[1].running_mean, statistics)  # training itself used train mode


def test_evaluation_in_pieces_is_the_mean_over_all(monkeypatch):
    data = blobs()
    model = data.model(0)
    weighted = Categorical(weight=[1.0, 5.0, 0.5], ignore_index=2)
    whole = evaluate(model, data.train, weighted, "training")
    monkeypatch.setattr("fisherlens.training.loop._EVALUATE_AT_ONCE", 7)
    np.testing.assert_allclose(evaluate(model, data.train, weighted, "training"), whole, rtol=1e-6)
    kept = data.train[1] != 2
    with torch.no_grad():
        outputs = model(data.train[0])
        expected = nn.functional.cross_entropy(outputs[kept], data.train[1][kept], weight=torch.tensor([1, 5, 0.5]))
    np.testing.assert_allclose(whole, (expected, (outputs.argmax(1) == data.train[1])[kept].double().mean()), rtol=1e-6)


def test_a_pass_takes_every_example_once():
    batches = Setting((torch.zeros(10, 1), torch.zeros(10)), None, Categorical(), 1, 4, 1).batches(seed=0)
    passes = [list(itertools.islice(batches, 3)) for _ in range(2)]
    assert [[len(batch) for batch in each] for each in passes] == [[4, 4, 2]] * 2
    assert [sorted(torch.cat(each).tolist()) for each in passes] == [list(range(10))] * 2
    assert torch.cat(passes[0]).tolist() != torch.cat(passes[1]).tolist()


def test_callbacks_see_the_start_and_every_step_off_the_clock(monkeypatch):
    data = blobs()
    model = data.model(0)
    seen = []

    def note(step, seen_model, optimizer):
        assert seen_model is model
        assert isinstance(optimizer, torch.optim.SGD)
        seen.append((step, parameters(model)))
        next(clock)

    clock = itertools.count()
    monkeypatch.setattr("fisherlens.training.loop._now", lambda device: next(clock))
    record = train(model, data, sgd(), num_steps=3, callbacks=[note])
    assert record.seconds[0, 0].values.tolist() == [0, 1, 2, 3]
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], parameters(data.model(0)))
    assert torch.equal(seen[-1][1], parameters(model))


def test_regression_has_a_loss_and_no_accuracy():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    model = nn.Linear(1, 1, dtype=torch.float64)
    record = train(model, (x, 2 * x), sgd(0.5), num_steps=60, likelihood="gaussian", test=(x, 2 * x))
    assert record.test_accuracy.isnull().all()
    assert record.attrs["dtype"] == "float64"
    # at a perfect fit, the negative log-likelihood of a unit-variance Gaussian is log(2 pi) / 2
    np.testing.assert_allclose(record.test_loss[0, 0, -1], np.log(2 * np.pi) / 2, rtol=1e-6)
    alone = train(model, (x, 2 * x), sgd(0.5), num_steps=2, likelihood="gaussian")
    assert alone.test_loss.isnull().all()
    assert alone.train_loss.notnull().all()


def test_divergence_ends_the_run_and_is_flagged():
    x = torch.linspace(-1, 1, 20)[:, None]
    model = nn.Linear(1, 1)
    record = train(model, (x, 2 * x), sgd(1e8), num_steps=50, likelihood="gaussian", record_every=1)
    assert record.diverged.item()
    assert not record.interrupted.item()
    taken = record.steps_taken.item()
    assert 0 < taken < 50
    assert re.search(rf"in step ({taken}|{taken + 1})", record.ended_by.item())
    finite = np.isfinite(record.train_loss[0, 0].values)
    assert finite[0]
    assert not finite[taken + 1 :].any()


def test_ctrl_c_keeps_what_was_recorded():
    data = blobs()

    def stop(step, model, optimizer):
        if step == 3:
            raise KeyboardInterrupt

    before = torch.get_rng_state()
    record = train(data.model(0), data, sgd(), num_steps=10, callbacks=[stop], record_every=1)
    assert record.interrupted.item()
    assert record.ended_by.item() == "interrupted after step 3"
    assert record.steps_taken.item() == 3
    assert np.isfinite(record.train_loss[0, 0]).values.tolist() == [True] * 4 + [False] * 7
    assert torch.equal(torch.get_rng_state(), before)


def test_comparison_pairs_starts_and_batches():
    data = blobs()
    entries = {"slow": sgd(0.01), "fast": sgd(0.3), "slow again": sgd(0.01)}
    result = compare_optimizers(data, entries, num_steps=12, seeds=[4, 9], batch_size=8, record_every=4)
    assert dict(result.train_loss.sizes) == {"optimizer": 3, "seed": 2, "step": 4}
    assert result.optimizer.values.tolist() == list(entries)
    assert result.seed.values.tolist() == [4, 9]
    assert result.attrs["problem"] == "blobs"
    assert result.attrs["seed"].tolist() == [4, 9]
    start = result.train_loss.sel(step=0)
    assert (start == start.isel(optimizer=0)).all()
    assert start[0, 0] != start[0, 1]
    for name in METRICS[:3]:
        assert (result[name].sel(optimizer="slow") == result[name].sel(optimizer="slow again")).all()
    assert (result.train_loss.sel(optimizer="fast", step=12) < result.train_loss.sel(optimizer="slow", step=12)).all()
    alone = train(data.model(9), data, entries["fast"], num_steps=12, batch_size=8, seed=9, record_every=4)
    assert (alone.train_loss[0, 0] == result.train_loss.sel(optimizer="fast", seed=9)).all()


def test_a_diverging_entry_does_not_stop_the_others(tmp_path):
    x = torch.linspace(-1, 1, 20)[:, None]
    line = Problem("line", "A line.", lambda: nn.Linear(1, 1), (x, 2 * x), (x, 2 * x), "gaussian")
    result = compare_optimizers(line, {"wild": sgd(1e8), "calm": sgd(0.1)}, num_steps=40, seeds=2, record_every=10)
    assert result.diverged.values.tolist() == [[True, True], [False, False]]
    assert result.train_loss.sel(optimizer="calm").notnull().all()
    assert load(save(result, tmp_path / "run.nc")).identical(result)


def test_ctrl_c_ends_a_comparison_and_keeps_it():
    class Stopped(torch.optim.SGD):
        steps_left = 2

        def step(self, closure=None):
            if self.steps_left == 0:
                raise KeyboardInterrupt
            self.steps_left -= 1
            return super().step(closure)

    entries = {"calm": sgd(), "stopped": lambda model: Stopped(model.parameters(), lr=0.1)}
    result = compare_optimizers(blobs(), entries, num_steps=5, seeds=2, record_every=1)
    assert result.interrupted.values.tolist() == [[False, True], [True, True]]
    assert result.steps_taken.values.tolist() == [[5, 0], [2, 0]]
    assert result.ended_by.values.tolist() == [["", "not started"], ["interrupted after step 2", "not started"]]
    assert result.train_loss.sel(optimizer="calm", seed=0).notnull().all()


def test_a_problem_may_be_named():
    result = compare_optimizers("digits-mlp", {"sgd": sgd()}, num_steps=2, seeds=1)
    assert result.attrs["problem"] == "digits-mlp"
    with pytest.raises(InputError, match=r"Unknown problem 'digit-mlp'\. Did you mean 'digits-mlp'"):
        compare_optimizers("digit-mlp", {"sgd": sgd()}, num_steps=2, seeds=1)


ELSEWHERE = nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("make_optimizer", "error", "text"),
    [
        (
            torch.optim.SGD(ELSEWHERE.parameters(), lr=0.1),
            TypeError,
            "Optimizer 'mine' must be a function model -> torch.optim.Optimizer, because every run trains a new model; got SGD. "
            "For example: lambda model: torch.optim.SGD(model.parameters(), lr=0.1).",
        ),
        (lambda model: None, TypeError, "Optimizer 'mine' must return a torch.optim.Optimizer; got NoneType."),
        (
            lambda model: torch.optim.SGD(ELSEWHERE.parameters(), lr=0.1),
            InputError,
            "Optimizer 'mine' holds no parameter of the model that it was given, so it would train nothing. "
            "Use the argument: lambda model: SGD(model.parameters(), ...), not a model from outside.",
        ),
    ],
    ids=["instance", "None", "elsewhere"],
)
def test_a_wrong_optimizer_shows_before_the_first_run(make_optimizer, error, text):
    data = blobs()
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        train(data.model(), data, make_optimizer, num_steps=1, name="mine")

    def reached(model):
        raise AssertionError("a run was started")

    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        compare_optimizers(data, {"mine": make_optimizer, "next": reached}, num_steps=1, seeds=1)


def test_bad_arguments_are_named():
    data = blobs()
    model = data.model()
    before = parameters(model)
    for name, value in itertools.product(("num_steps", "batch_size", "record_every"), (0, -1)):
        settings = {"num_steps": 3, name: value}
        with pytest.raises(InputError, match=f"^{name} must be at least 1; got {value}\\.$"):
            train(model, data, sgd(), **settings)
    with pytest.raises(TypeError, match=r"^num_steps must be an int; got float 2\.5\.$"):
        train(model, data, sgd(), num_steps=2.5)
    with pytest.raises(InputError, match=r"^likelihood is missing: a pair of tensors does not say"):
        train(model, data.train, sgd(), num_steps=1)
    with pytest.raises(TypeError, match=r"use likelihood='categorical'"):
        train(model, data.train, sgd(), num_steps=1, likelihood=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module; got type\. Pass problem\.model\(seed\)\.$"):
        train(nn.Linear, data, sgd(), num_steps=1)
    with pytest.raises(InputError, match="at least one optimizer and at least one seed, each once; got \\[\\]"):
        compare_optimizers(data, {}, num_steps=1, seeds=1)
    entries = {"a": sgd()}
    for seeds, text in (
        ("ab", "got str 'ab'"),
        (None, "got NoneType"),
        (True, "got bool"),
        ([0.5], r"Every seed must be an int; got float 0\.5"),
    ):
        with pytest.raises(TypeError, match=text):
            compare_optimizers(data, entries, num_steps=1, seeds=seeds)
    with pytest.raises(InputError, match=r"Every seed must lie below 2\*\*48, .* got 9223372036854775808"):
        compare_optimizers(data, entries, num_steps=1, seeds=[2**63])
    with pytest.raises(
        TypeError, match=r"'a' is the class SGD of torch, .* Write a function: lambda model: torch\.optim\.SGD\("
    ):
        compare_optimizers(data, {"a": torch.optim.SGD}, num_steps=1, seeds=1)
    with pytest.raises(InputError, match=r"got \['a'\] and seeds \[1, 1\]"):
        compare_optimizers(data, {"a": sgd()}, num_steps=1, seeds=[1, 1])
    with pytest.raises(TypeError, match=r"^optimizers must be a dict label -> \(model -> Optimizer\); got function\.$"):
        compare_optimizers(data, sgd(), num_steps=1, seeds=1)
    with pytest.raises(TypeError, match=r"^problem must be a fl\.Problem or the name of one; got Linear\.$"):
        compare_optimizers(nn.Linear(2, 2), {"a": sgd()}, num_steps=1, seeds=1)
    assert torch.equal(parameters(model), before)


def test_a_problem_that_is_broken_from_the_start_raises():
    data = blobs()
    with pytest.raises(InputError, match=r"Label 2 in the training data, examples 0\.\.29 is outside 0..1"):
        train(nn.Linear(2, 2), data, sgd(), num_steps=1)
    model = data.model()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"output is NaN or infinite in the training data, examples 0\.\.29"):
        train(model, data, sgd(), num_steps=1)
    ignored = Categorical(weight=[0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"^Every label of the training data is ignored or has class weight 0"):
        train(data.model(), data, sgd(), num_steps=1, likelihood=ignored)
    huge = torch.full((2, 1), 1e30)
    with pytest.raises(
        NonFiniteError, match=r"^The mean loss over the training data is inf, though every output is finite"
    ):
        train(nn.Linear(1, 1), (huge, -huge), sgd(), num_steps=1, likelihood="gaussian")


def test_a_batch_without_kept_labels_changes_nothing():
    data = blobs()
    model = data.model()
    labels = data.train[1].clone()
    labels[:] = -100
    labels[0] = 1
    record = train(model, (data.train[0], labels), sgd(), num_steps=30, batch_size=1, likelihood="categorical")
    assert record.train_loss.notnull().all()
    assert not record.diverged.item()
