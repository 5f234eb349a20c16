"""What a partition must refuse, and what it says then."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fisherlens.errors import InputError
from fisherlens.layout import Layout
from fisherlens.partitions import SCHEMES, partition


def lenet():
    """A convolution that feeds a dense layer through a flatten."""
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 17), nn.Linear(17, 5))


def test_owners_and_partitions_as_schemes():
    model = nn.Linear(2, 2)
    layout = Layout.from_model(model)
    p = partition(SimpleNamespace(layout=layout), "unit")
    assert partition(model, p) is p
    assert partition(p, "layer").num_blocks == 1
    other = partition(nn.Linear(2, 3), "unit")
    text = (
        "Both must be of the same parameters; got a partition over 9 parameters for a layout of 6 whose names, shapes or "
        "order differ. It was probably made for another model or another choice of params: build it again from this one."
    )
    for call in (lambda: partition(model, other), lambda: p.refines(other)):
        with pytest.raises(InputError, match=re.escape(text)):
            call()
    with pytest.raises(InputError, match=re.escape("Scheme 'unit' takes no size; got size=3.")):
        partition(model, p, size=3)
    with pytest.raises(TypeError, match=re.escape("refines compares with a Partition; got str. Build it with")):
        p.refines("layer")
    with pytest.raises(
        TypeError, match=re.escape("partition takes a Fisher, a Layout or a torch.nn.Module; got list.")
    ):
        partition([1], "unit")
    known = ", ".join(SCHEMES)
    text = f"scheme must be a name, a dict label -> flat indices, or a Partition; got list. Known names: {known}."
    with pytest.raises(TypeError, match=re.escape(text)):
        partition(model, [[0, 1]])
    with pytest.raises(InputError, match=re.escape("Unknown layer '0'. Known: '(root)'.")):
        p.restrict("0")


@pytest.mark.parametrize(
    ("scheme", "options", "error", "text"),
    [
        ("kernels", {}, InputError, "Unknown partition scheme 'kernels'. Did you mean 'kernel'? Known: 'layer', "),
        ("cw-ngd", {"variant": "2023"}, InputError, "Unknown variant of 'cw-ngd' '2023'. Did you mean '2022'? Known: "),
        ("mbf", {"variant": 3}, InputError, "Unknown variant of 'mbf' 3. Known: 'B', 'A'."),
        ("unit", {"variant": "A"}, InputError, "Scheme 'unit' takes no variant; got variant='A'. variant belongs to "),
        ("unit", {"size": 3}, InputError, "Scheme 'unit' takes no size; got size=3. size belongs to 'sequential' and "),
        ("random", {"size": 3, "variant": "A"}, InputError, "Scheme 'random' takes no variant; got variant='A'."),
        ({"a": range(6)}, {"size": 3}, InputError, "Scheme 'own' takes no size; got size=3."),
        ("sequential", {}, InputError, "'sequential' and 'random' need size, the number of parameters per block, an "),
        (
            "random",
            {"size": 0},
            InputError,
            "an int >= 1; got size=0. Nothing in the network suggests one: pass size=9",
        ),
        ("random", {"size": -2}, InputError, "an int >= 1; got size=-2."),
        (
            "random",
            {"size": 2.0},
            TypeError,
            "size must be an int; got 2.0 of type float. Convert it explicitly, with ",
        ),
        ("sequential", {"size": True}, TypeError, "size must be an int; got True of type bool."),
        (
            "random",
            {"size": 2, "seed": -1},
            InputError,
            "seed must be an int >= 0, as it seeds a generator of its own; ",
        ),
        ("random", {"size": 2, "seed": None}, TypeError, "seed must be an int; got None of type NoneType."),
    ],
)
def test_impossible_options(scheme, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        partition(nn.Linear(2, 2), scheme, **options)


@pytest.mark.parametrize(
    ("blocks", "error", "text"),
    [
        ({"a": [0, 1, 2], "b": [2, 3, 1, 4, 5]}, InputError, "Blocks must be disjoint; index 1 (0.weight[0,1]) is in 'a' and 'b' (1 more like it). Remove it from all but one; "),
        ({"a": [0, 1, 1, 2, 3, 4, 5]}, InputError, "Blocks must be disjoint; index 1 (0.weight[0,1]) is in 'a' 2 times. Remove it"),
        ({"a": [0, 1, 2, 3, 5]}, InputError, "Blocks must cover all 6 parameters; index 4 (0.bias[0]) is in no block. Add the rest as a block"),
        ({"a": [5, 1, 2, 3]}, InputError, "Blocks must cover all 6 parameters; index 0 (0.weight[0,0]) is in no block (1 more like it). Add"),
        ({}, InputError, "Blocks must cover all 6 parameters; index 0 (0.weight[0,0]) is in no block (5 more like it)."),
        ({"a": range(7)}, InputError, "Block 'a' of your own partition has index 6; indices run from 0 to 5, as there are 6 parameters. "),
        ({"a": [-1, *range(5)]}, InputError, "Block 'a' of your own partition has index -1; indices run from 0 to 5, as there "),
        ({"a": range(6), "b": []}, InputError, "Block 'b' of your own partition is empty; every block needs at least one index."),
        ({"a": [[0, 1, 2], [3, 4, 5]]}, InputError, "Block 'a' of your own partition must be a flat list of indices, shape (s,); got shape (2, 3). "),
        ({"a": torch.tensor(3)}, InputError, "shape (s,); got shape (). Flatten it with .reshape(-1)."),
        ({"a": torch.arange(6.0)}, TypeError, "must hold integer indices into the flat vector; got dtype float32. From a mask, "),
        ({"a": np.ones(6, dtype=bool)}, TypeError, "Block 'a' of your own partition must hold integer indices into the flat vector; got dtype bool."),
        ({"a": "012345"}, TypeError, "must hold integer indices into the flat vector; got str. From a mask, take mask.nonzero()"),
        ({"a": slice(0, 6)}, TypeError, "must hold integer indices into the flat vector; got slice."),
        ({0: range(6)}, TypeError, "The labels of your own partition must be strings; got 0 of type int. Use str(label)."),
    ],
)  # fmt: skip
def test_impossible_blocks_of_your_own(blocks, error, text):
    with pytest.raises(error, match=re.escape(text)):
        partition(nn.Sequential(nn.Linear(2, 2)), blocks)


class TwoHeads(nn.Module):
    """A frozen convolution feeds two heads of one width through a flatten; the second cannot follow the first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3).requires_grad_(False)
        self.policy = nn.Linear(8, 4)
        self.value = nn.Linear(8, 1)
        self.after = nn.Linear(1, 3)


@pytest.mark.parametrize("scheme", ["cw-ngd", "channel"])
def test_a_bare_model_must_be_told_the_flattened_maps(scheme):
    text = (
        f"Scheme {scheme!r} must know which (channels, height, width) map was flattened to feed dense '3' (weight (17, 24)); "
        "got a bare model, which does not tell, and a convolution comes before it. Pass input_maps={'3': (C, H, W)} with "
        "the sizes of your network (None where the input is no flattened map), or pass a Fisher instead of the model: its "
        "capture has seen the map."
    )
    with pytest.raises(InputError, match=re.escape(text)):
        partition(lenet(), scheme)
    with pytest.raises(InputError, match=re.escape(text)):
        partition(lenet(), scheme, input_maps={"4": (17, 1, 1)})
    told = partition(lenet(), scheme, input_maps={"3": [6, 2, 2]})
    layout = Layout.from_model(lenet()).with_input_maps({"3": (6, 2, 2)})
    seen = partition(layout, scheme)  # as a Fisher would have it from its capture
    assert told.labels == seen.labels
    plain = partition(lenet(), scheme, input_maps={"3": None})
    assert plain.labels == partition(Layout.from_model(lenet()), scheme).labels
    assert plain.num_blocks != told.num_blocks
    assert partition(layout, scheme, input_maps={"3": None}).labels == plain.labels  # what is given goes first
    with pytest.raises(InputError, match=re.escape("Pass input_maps={'policy': (C, H, W), 'value': (C, H, W)}")):
        partition(TwoHeads(), scheme)
    assert partition(TwoHeads(), scheme, input_maps={"policy": (2, 2, 2), "value": (2, 2, 2)}).num_blocks


@pytest.mark.parametrize(
    ("maps", "error", "text"),
    [
        ({"3": (6, 2, 3)}, InputError, "The map flattened into dense layer '3' must have C * H * W = 24 entries, the inputs of its weight; got 6 * 2 * 3 = 36. "),
        ({"3": (24,)}, InputError, "input_maps['3'] must be (channels, height, width), positive ints, or None for a plain input; got (24,). "),
        ({"3": (-6, -2, 2)}, InputError, "input_maps['3'] must be (channels, height, width), positive ints, or None for a plain input; got (-6, -2, 2)."),
        ({"3": (6.0, 2, 2)}, InputError, "or None for a plain input; got (6.0, 2, 2). It is the shape, without the batch, that "),
        ({"3": "abc"}, InputError, "or None for a plain input; got 'abc'."),
        ({"0": (2, 3, 3)}, InputError, "input_maps describes the inputs of dense layers; '0' is conv (Conv2d). A convolution's channels "),
        ({"33": (2, 3, 3)}, InputError, "Unknown layer '33'. Did you mean '3'? Known: '0', "),
        ([(6, 2, 2)], TypeError, "input_maps must be a dict, dense layer name -> (C, H, W) or None; got list. Pass {'fc': (16, 5, 5)}, "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["cw-ngd", "unit"])
def test_impossible_maps(scheme, maps, error, text):
    with pytest.raises(error, match=re.escape(text)):
        partition(lenet(), scheme, input_maps=maps)


def test_a_wrong_map_of_a_layout_is_refused():
    layout = Layout.from_model(lenet()).with_input_maps({"3": (5, 2, 2)})
    with pytest.raises(
        InputError, match=re.escape("must have C * H * W = 24 entries, the inputs of its weight; got 5 * 2")
    ):
        partition(layout, "channel")
