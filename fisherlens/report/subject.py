"""What a report is about: a problem or a user's own network, on which device, and on which examples."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.fisher import Fisher
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.scores.source import Source
from fisherlens.training import Problem, problem

MOST_EXAMPLES = 128
_MOST_ROWS = 2500  # order of the Gram matrix up to which the complete spectra take seconds

_NEEDS = (
    'A report on your own network needs data=(inputs, targets) and likelihood="categorical", "bernoulli" or "gaussian"; '
    'Missing: {missing}. For one of the ready problems pass its name, such as fl.report("digits-cnn").'
)
_HAS = "{name!r} is a problem, which brings its own data and likelihood; got {given} as well. Leave it out, or build fl.Problem(...)."


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, the data, and what to call them; ``problem`` is None for a user's own network."""

    name: str
    description: str
    model: nn.Module
    data: Any
    likelihood: Likelihood
    problem: Problem | None


def find_subject(
    subject: nn.Module | Problem | str,
    data: Any,
    likelihood: str | Likelihood | None,
    device: torch.device | None,
    seed: int,
) -> Subject:
    """Check what was handed over, and take a copy of the network in evaluation mode: the user's own is never touched."""
    if isinstance(subject, str):
        subject = problem(subject)
    if isinstance(subject, Problem):
        given = [name for name, value in (("data", data), ("likelihood", likelihood)) if value is not None]
        if given:
            raise InputError(_HAS.format(name=subject.name, given=" and ".join(given)))
        model = subject.model(seed).eval()
        model = model if device is None else model.to(device)
        return Subject(
            subject.name, subject.description, model, subject.train, as_likelihood(subject.likelihood), subject
        )
    if not isinstance(subject, nn.Module):
        raise TypeError(
            f"fl.report takes a network (torch.nn.Module), a fl.Problem or the name of one; got {type(subject).__name__}. "
            "Pass the network itself, not its class or its outputs."
        )
    missing = [name for name, value in (("data", data), ("likelihood", likelihood)) if value is None]
    if missing:
        raise InputError(_NEEDS.format(missing=" and ".join(missing)))
    found = as_likelihood(likelihood)
    model = copy.deepcopy(subject).eval()
    model = model if device is None else model.to(device)
    name = type(subject).__name__
    return Subject(
        name,
        f"A network of class {name}, analysed as it stands, on a copy in evaluation mode.",
        model,
        data,
        found,
        None,
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def default_examples(subject: Subject, kind: str) -> int:
    """How many examples keep the complete spectrum quick: fewer where each of them has many score columns."""
    if kind != "exact":
        return MOST_EXAMPLES
    first, _ = take_examples(subject.data, 1, 0, device_of(subject.model))
    columns = Fisher(subject.model, first, likelihood=subject.likelihood, progress=False).n_columns
    return max(4, min(MOST_EXAMPLES, _MOST_ROWS // max(columns, 1)))


def take_examples(data: Any, count: int, seed: int, device: torch.device) -> tuple[tuple[Any, Any], int]:
    """Some examples as one pair, and how many there were: drawn at random from tensors, the first ones of batches.

    Tensors may be sorted by class, so that their first entries would show a part of the problem only. The order of batches is the
    loader's business.
    """
    source = Source(data, device)
    total = source.n_data
    pair = isinstance(data, tuple | list) and len(data) == 2 and (data[1] is None or isinstance(data[1], Tensor))
    if pair:
        if count >= total:
            return (data[0], data[1]), total
        index = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")[:count].sort().values
        inputs = _map(data[0], lambda x: x[index.to(x.device)] if x.ndim and len(x) == total else x)
        return (inputs, None if data[1] is None else data[1][index.to(data[1].device)]), total
    kept, left = [], count
    for batch in source.batches():
        part = batch.part(0, left)
        kept.append(part)
        left -= part.size
        if left <= 0:
            break
    targets = None if any(part.targets is None for part in kept) else torch.cat([part.targets for part in kept])
    return (_join([part.inputs for part in kept]), targets), total


def _map(inputs: Any, function: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _map(value, function) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_map(value, function) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs


def _join(pieces: list[Any]) -> Any:
    first = pieces[0]
    if isinstance(first, Mapping):
        return {key: _join([piece[key] for piece in pieces]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_join([piece[k] for piece in pieces]) for k in range(len(first)))
    return torch.cat(pieces) if isinstance(first, Tensor) else first
