"""Parameter groups: which options hold for which parameters, and where they must agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fisherlens.errors import UNKNOWN_NAME, InputError, nearest
from fisherlens.layout import Layout
from fisherlens.optim import texts
from fisherlens.optim.checks import number

Groups = Iterable[Mapping[str, Any]] | None  # as a user gives them

# What a group may have of its own, with the bounds of each. The first two act on single entries, the others on whole layers.
OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {},  # a scheduler may bring it to 0
    "weight_decay": {},
    "damping": {"strict": True},
    "ema": {"high": 1.0},
    "momentum_ema": {"high": 1.0},
    "momentum": {"high": 1.0},
    "kl_clip": {"strict": True},
}
BY_ENTRY = ("lr", "weight_decay")
WITHIN_BLOCKS = ("damping", "ema", "momentum_ema")  # what a block that crosses layers has one of
_MORE = ("name", "initial_lr")  # of schedulers and of users


def check_options(options: Mapping[str, Any], nullable: Sequence[str], *, new: bool = False) -> None:
    """Check the options of one group; those in ``nullable`` may be None, and a ``new`` lr is not 0."""
    for option, bounds in OPTIONS.items():
        if option in options and not (options[option] is None and option in nullable):
            number(option, options[option], **bounds | ({"strict": True} if new and option == "lr" else {}))


def make_groups(
    name: str,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    defaults: Mapping[str, Any],
    given: Groups,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Groups as torch has them, the rest of the parameters as the last one; and the group of each parameter.

    Parameters
    ----------
    name
        Of the method.
    model, parameters
        The network, and its trainable parameters by name, in their order.
    defaults
        What holds where a group says nothing.
    given
        A list of dicts: ``"params"``, names, layers or glob patterns, or parameters of the model, and options.
    """
    if given is None:
        return [{"params": list(parameters.values())}], dict.fromkeys(parameters, 0)
    if isinstance(given, (Mapping, str, Tensor)) or not isinstance(given, Iterable):
        raise TypeError(texts.BAD_GROUPS.format(got=type(given).__name__))
    groups: list[dict[str, Any]] = []
    owner: dict[str, int] = {}
    for k, one in enumerate(given):
        if not isinstance(one, Mapping) or "params" not in one:
            got = f"keys {sorted(map(str, one))}" if isinstance(one, Mapping) else type(one).__name__
            raise TypeError(texts.BAD_GROUPS.format(got=f"{got} as number {k}"))
        known = [*defaults, *_MORE]
        for option in one:
            if option not in ("params", *known):
                what = f"option in parameter group {k}"
                raise InputError(UNKNOWN_NAME.format(what=what, name=option, hint=nearest(str(option), known)))
        for found in _names(name, k, model, parameters, one["params"]):
            if found in owner:
                raise InputError(texts.TWO_GROUPS.format(parameter=found, first=owner[found], second=k))
            owner[found] = k
        groups.append({**one, "params": [p for n, p in parameters.items() if owner.get(n) == k]})
    rest = [n for n in parameters if n not in owner]
    if rest:
        owner |= dict.fromkeys(rest, len(groups))
        groups.append({"params": [parameters[n] for n in rest]})
    return groups, owner


def _names(name: str, k: int, model: nn.Module, parameters: Mapping[str, nn.Parameter], params: Any) -> list[str]:
    """Trainable parameters that a group asks for; frozen ones are no part of it, as everywhere."""
    entries = [params] if isinstance(params, (str, Tensor)) else params
    if not isinstance(entries, Iterable):
        raise TypeError(texts.BAD_PARAMS.format(number=k, got=type(params).__name__))
    own = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, None] = {}
    shown = []
    for entry in entries:
        one = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry  # named_parameters() gives pairs
        if isinstance(one, str):
            found |= dict.fromkeys(Layout.from_model(model, one))
            shown.append(repr(one))
        elif isinstance(one, Tensor):
            if id(one) not in own:
                raise InputError(texts.NOT_OWN.format(number=k, shape=tuple(one.shape), name=name))
            found[own[id(one)]] = None
            shown.append(repr(own[id(one)]))
        else:
            raise TypeError(texts.BAD_PARAMS.format(number=k, got=type(one).__name__))
    trainable = [n for n in found if n in parameters]
    if not trainable:
        raise InputError(texts.EMPTY_GROUP.format(number=k, got=", ".join(shown) or "an empty list"))
    return trainable


class Membership:
    """To which group each parameter and each layer belongs."""

    def __init__(self, layout: Layout, owner: Mapping[str, int]):
        self.owner = dict(owner)  # parameter -> group
        self.of_layer = {layer.name: owner[layer.parameters[0].name] for layer in layout.layers}
        members = {layer.name: sorted({owner[p.name] for p in layer.parameters}) for layer in layout.layers}
        self.split = {name: groups for name, groups in members.items() if len(groups) > 1}
        self.names: list[list[str]] = [[] for _ in range(max(owner.values()) + 1)]
        for p in layout.parameters:
            self.names[owner[p.name]].append(p.name)

    def require_agreement(self, name: str, groups: Sequence[Mapping[str, Any]], *, across_layers: bool) -> None:
        """Refuse groups that divide what a method treats as one: a layer, or all of them where its blocks cross layers."""
        for layer, members in self.split.items():
            for option in OPTIONS:
                if option in groups[0] and option not in BY_ENTRY:
                    values = [groups[k][option] for k in members]
                    if any(value != values[0] for value in values):
                        text = texts.SPLIT_LAYER.format(
                            layer=layer, groups=members, option=option, values=values, name=name
                        )
                        raise InputError(text)
        for option in WITHIN_BLOCKS if across_layers else ():
            values = [group[option] for group in groups if option in group]
            if any(value != values[0] for value in values):
                raise InputError(texts.COUPLED_LAYERS.format(name=name, option=option, values=values))
