"""Every scheme against a definition written entry by entry, and everything that a partition must refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fisherlens.layout import Layout
from fisherlens.partitions import SCHEMES, BlockGroup, Partition, partition

CASES = [
    *((scheme, {}) for scheme in SCHEMES if scheme not in ("sequential", "random")),
    ("cw-ngd", {"variant": "2022"}),
    ("cw-ngd", {"variant": "2022-unit"}),
    ("mbf", {"variant": "A"}),
    ("sequential", {"size": 7}),
    ("random", {"size": 7}),
    ("random", {"size": 1, "seed": 3}),
]
BY_LAYER = [case for case in CASES if case[0] not in ("sequential", "random")]


def case_name(case):
    return "-".join([case[0], *map(str, case[1].values())])


class WithRoot(nn.Module):
    """A root parameter of each rank, and a layer that owns a parameter besides its weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.zeros(2, 3, 2))
        self.fc = nn.Linear(3, 2)
        self.fc.register_parameter("gain", nn.Parameter(torch.ones(2, 2)))
        self.conv = nn.Conv1d(1, 2, 2)
        self.conv.register_parameter("gain", nn.Parameter(torch.ones(2)))


def lenet():
    """Convolutions of all sorts, then dense layers on short, long and no maps."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, (3, 2), groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4, 17),
        nn.Linear(17, 5),
        nn.Linear(5, 3, bias=False),
    )


ZOO = {
    "dense": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), {}),
    "wide": lambda: (nn.Sequential(nn.Linear(17, 2), nn.Linear(2, 17), nn.Linear(17, 1)), {}),
    "root-dense": lambda: (nn.Linear(3, 2), {}),
    "lenet": lambda: (lenet(), {"4": (6, 2, 2)}),
    "lenet-long": lambda: (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(34, 3)), {"1": (2, 17, 1)}),
    "lenet-plain": lambda: (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(4, 3)), {"1": None}),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(2, 3, 4), nn.Conv1d(3, 2, 1, bias=False)), {}),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(2, 2, (2, 1, 2))), {}),
    "depthwise": lambda: (nn.Sequential(nn.Conv2d(3, 6, 2, groups=3), nn.LayerNorm((2, 3))), {}),
    "norms": lambda: (nn.Sequential(nn.LayerNorm(4, bias=False), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)), {}),
    "other": lambda: (nn.Sequential(nn.Embedding(5, 3), nn.GRU(2, 2), nn.ConvTranspose2d(2, 3, 2)), {}),
    "root": lambda: (WithRoot(), {}),
}


def zoo_layout(name):
    model, maps = ZOO[name]()
    return Layout.from_model(model).with_input_maps({k: v for k, v in maps.items() if v is not None})


def row_or_entry(info, position):
    return f"{info.name} row {position[0]}" if len(position) > 1 else entry(info, position)


def entry(info, position):
    return f"{info.name}[{','.join(map(str, position))}]" if position else info.name


def slow_label(layer, info, position, scheme, variant):
    """The block of one entry, by the table in words: who it is decides where it goes."""
    name, weight, bias = layer.name, info is layer.weight, info is layer.bias
    if scheme == "layer":
        return name
    if scheme == "parameter":
        return info.name
    if scheme == "diagonal":
        return entry(info, position)
    small = scheme in ("cw-ngd", "mbf")
    if not (weight or bias) or (layer.kind == "norm" and small):
        return entry(info, position) if small else row_or_entry(info, position)
    if layer.kind == "norm":
        channel = int(np.ravel_multi_index(position, info.shape))
        return f"{name} {'unit' if scheme == 'kernel' else scheme} {channel}"
    o = position[0]
    rule = {
        ("cw-ngd", "2022"): "kernel",
        ("cw-ngd", "2022-unit"): "unit",
        ("mbf", "B"): "input" if layer.kind == "dense" else "pairs",
        ("mbf", "A"): "unit" if layer.kind == "dense" else "pairs",
    }.get((scheme, variant), scheme)
    if rule == "unit" or (rule == "kernel" and layer.kind == "dense"):
        return f"{name} unit {o}"
    if bias:
        return entry(info, position) if rule == "pairs" else info.name
    i, window = position[1], position[2:]
    if layer.kind == "conv":
        group = o // (info.shape[0] // layer.groups)
        source = group * info.shape[1] + i  # the input channel, counted over all groups
        if rule == "input":
            return f"{name} input {','.join(map(str, (source, *window)))}"
        return f"{name} channel {source}" if rule == "channel" else f"{name} kernel {o},{i}"
    if layer.input_map is not None and rule in ("channel", "cw-ngd"):
        _, height, width = layer.input_map
        c, _y, _x = np.unravel_index(i, layer.input_map)
        if rule == "channel":
            return f"{name} channel {c}"
        return f"{name} segment {o},{c}" if height * width <= 16 else entry(info, position)
    if rule == "cw-ngd":
        return f"{name} unit {o}" if info.shape[1] <= 16 else entry(info, position)
    return f"{name} input {i}"


def slow_blocks(layout, scheme, variant):
    """Label -> flat indices, in order of first appearance; the tensors of a layer are read weight, bias, others."""
    blocks = {}
    for layer in layout.layers:
        own = [p for p in (layer.weight, layer.bias) if p is not None]
        for info in (*own, *(p for p in layer.parameters if p not in own)):
            number = info.start
            for position in np.ndindex(*info.shape):  # (o, i, y, x)
                blocks.setdefault(slow_label(layer, info, position, scheme, variant), []).append(number)
                number += 1
    return blocks


def assert_cover(p):
    seen = [i for block in p for i in block.tolist()]
    assert sorted(seen) == list(range(p.layout.n_params))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("case", BY_LAYER, ids=case_name)
def test_blocks_and_labels_equal_the_definition(name, case):
    scheme, options = case
    layout = zoo_layout(name)
    variant = options.get("variant", {"cw-ngd": "released", "mbf": "B"}.get(scheme))
    p = partition(layout, scheme, **options)
    expected = slow_blocks(layout, scheme, variant)
    got = {label: sorted(block.tolist()) for label, block in zip(p.labels, p.blocks, strict=True)}
    assert len(got) == p.num_blocks  # labels are unique
    assert got == {label: sorted(block) for label, block in expected.items()}
    assert list(got) == list(expected)  # layout order; in a layer by weight, bias and the rest, row-major
    assert p.scheme == scheme
    assert p.layout == layout


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_disjoint_cover_and_batches(name, case):
    model, maps = ZOO[name]()
    scheme, options = case
    p = partition(model, scheme, input_maps=maps, **options)
    assert_cover(p)
    assert p.sizes.tolist() == [len(block) for block in p.blocks]
    assert p.largest_block == max(map(len, p.blocks))
    assert len(p) == p.num_blocks == len(p.labels) == len(p.layers)
    owner = p.layout.parameter_layers()
    for block, layer in zip(p.blocks, p.layers, strict=True):
        assert block.dtype == torch.int64
        names = set(owner[block.numpy()])
        assert layer == (names.pop() if len(names) == 1 else None)
    ids = torch.cat([group.block_ids for group in p.groups])
    assert sorted(ids.tolist()) == list(range(p.num_blocks))
    batches = [(group.layer, group.size) for group in p.groups]
    assert len(set(batches)) == len(batches)  # one batch per layer and size
    for group in p.groups:
        assert isinstance(group, BlockGroup)
        assert group.index.shape == (len(group.block_ids), group.size) == (len(group), group.size)
        for row, number in zip(group.index, group.block_ids.tolist(), strict=True):
            assert torch.equal(row, p.blocks[number])
            assert p.layers[number] == group.layer
    if scheme not in ("sequential", "random"):
        assert None not in p.layers
        assert p.within_layers() is p


def test_counts_of_the_table():
    layout = zoo_layout("lenet")  # conv 2->4, norm 4, conv 4->6 in two groups, dense 24-17-5-3
    counts = {
        "layer": 6,
        "parameter": 10,
        "unit": 4 + 4 + 6 + 17 + 5 + 3,
        "input": (18 + 1) + 4 + 4 * 6 + (24 + 1) + (17 + 1) + 5,
        "channel": (2 + 1) + 4 + 4 + (6 + 1) + (17 + 1) + 5,
        "kernel": (8 + 1) + 4 + 12 + 17 + 5 + 3,
        "cw-ngd": (8 + 1) + 8 + 12 + (17 * 6 + 1) + (17 * 5 + 1) + 3,
        "mbf": (8 + 4) + 8 + 12 + (24 + 1) + (17 + 1) + 5,
        "diagonal": layout.n_params,
    }
    assert {scheme: partition(layout, scheme).num_blocks for scheme in counts} == counts


def test_exact_contents_of_small_layers():
    model = nn.Sequential(
        nn.Conv2d(2, 2, (1, 2)), nn.Flatten(), nn.Linear(4, 2)
    )  # weight 0..7, bias 8 9; 10..17, 18 19
    maps = {"2": (2, 1, 2)}

    def show(scheme, **options):
        p = partition(model, scheme, input_maps=maps, **options)
        return {label: block.tolist() for label, block in zip(p.labels, p, strict=True)}

    assert show("unit") == {
        "0 unit 0": [0, 1, 2, 3, 8],
        "0 unit 1": [4, 5, 6, 7, 9],
        "2 unit 0": [10, 11, 12, 13, 18],
        "2 unit 1": [14, 15, 16, 17, 19],
    }
    assert show("channel") == {
        "0 channel 0": [0, 1, 4, 5],
        "0 channel 1": [2, 3, 6, 7],
        "0.bias": [8, 9],
        "2 channel 0": [10, 11, 14, 15],
        "2 channel 1": [12, 13, 16, 17],
        "2.bias": [18, 19],
    }
    assert show("cw-ngd") == {
        "0 kernel 0,0": [0, 1],
        "0 kernel 0,1": [2, 3],
        "0 kernel 1,0": [4, 5],
        "0 kernel 1,1": [6, 7],
        "0.bias": [8, 9],
        "2 segment 0,0": [10, 11],
        "2 segment 0,1": [12, 13],
        "2 segment 1,0": [14, 15],
        "2 segment 1,1": [16, 17],
        "2.bias": [18, 19],
    }
    assert list(show("mbf").items())[4:8] == [
        ("0.bias[0]", [8]),
        ("0.bias[1]", [9]),
        ("2 input 0", [10, 14]),
        ("2 input 1", [11, 15]),
    ]
    assert list(show("diagonal"))[:3] == ["0.weight[0,0,0,0]", "0.weight[0,0,0,1]", "0.weight[0,1,0,0]"]


def test_grouped_convolution_counts_inputs_per_group():
    layout = Layout.from_model(nn.Sequential(nn.Conv1d(4, 6, 2, groups=2, bias=False)))  # weight (6, 2, 2)
    ids = layout.unflatten(torch.arange(layout.n_params))["0.weight"]
    p = partition(layout, "channel")
    assert p.labels == tuple(f"0 channel {c}" for c in range(4))
    for c, block in enumerate(p):
        group, i = divmod(c, 2)
        assert block.tolist() == ids[3 * group : 3 * group + 3, i].reshape(-1).tolist()
    kernels = partition(layout, "kernel")
    assert kernels.labels[-1] == "0 kernel 5,1"
    assert kernels.blocks[-1].tolist() == ids[5, 1].tolist()


@pytest.mark.parametrize(("height", "width", "size"), [(4, 4, 16), (17, 1, 1), (1, 1, 1)])
def test_released_rule_ends_at_maps_of_sixteen(height, width, size):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(3 * height * width, 2))
    p = partition(model, "cw-ngd", input_maps={"2": (3, height, width)}).restrict("2")
    assert p.sizes.tolist() == [size] * (6 * height * width // size) + [2]
    assert p.labels[0] == ("2.weight[0,0]" if height == 17 else "2 segment 0,0")


@pytest.mark.parametrize(("inputs", "sizes"), [(16, [16, 16, 2]), (17, [1] * 34 + [2])])
def test_released_rule_ends_at_plain_inputs_of_sixteen(inputs, sizes):
    assert partition(nn.Linear(inputs, 2), "cw-ngd").sizes.tolist() == sizes


@pytest.mark.parametrize("case", BY_LAYER, ids=case_name)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_layers_of_which_one_tensor_was_selected(case, leaf):
    model = nn.Sequential(nn.Conv2d(2, 3, 2, groups=1), nn.BatchNorm2d(3), nn.Linear(4, 2))
    layout = Layout.from_model(model, [f"*.{leaf}"])
    scheme, options = case
    p = partition(layout, scheme, **options)
    assert_cover(p)
    variant = options.get("variant", {"cw-ngd": "released", "mbf": "B"}.get(scheme))
    expected = slow_blocks(layout, scheme, variant)
    got = {label: sorted(block.tolist()) for label, block in zip(p.labels, p, strict=True)}
    assert got == {label: sorted(block) for label, block in expected.items()}


def test_a_bias_that_does_not_fit_its_kind_is_treated_as_unknown():
    layer = nn.Linear(3, 2)
    layer.bias = nn.Parameter(torch.zeros(1))
    p = partition(layer, "unit")
    assert p.labels == ("weight row 0", "weight row 1", "bias[0]")
    assert_cover(p)


def test_sequential_cuts_runs():
    layout = zoo_layout("dense")  # 24 parameters
    p = partition(layout, "sequential", size=7)
    assert [block.tolist() for block in p] == [list(range(a, min(a + 7, 24))) for a in range(0, 24, 7)]
    assert p.labels == ("sequential 0", "sequential 1", "sequential 2", "sequential 3")
    assert p.layers == ("0", "0", None, "2")
    assert p.options == {"size": 7}
    assert partition(layout, "sequential", size=100).sizes.tolist() == [24]
    assert partition(layout, "sequential", size=np.int64(24)).num_blocks == 1


def test_random_is_fixed_by_its_seed_and_leaves_global_state_alone():
    layout = zoo_layout("lenet")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 - the state to be left alone
    p = partition(layout, "random", size=9, seed=4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    again = partition(layout, "random", size=9, seed=4)
    assert [b.tolist() for b in p] == [b.tolist() for b in again]
    other = partition(layout, "random", size=9, seed=5)
    assert [b.tolist() for b in p] != [b.tolist() for b in other]
    assert p.sizes.tolist() == partition(layout, "sequential", size=9).sizes.tolist()
    assert not p.refines(partition(layout, "layer"))
    assert all((block.diff() > 0).all() for block in p)
    assert p.options == {"size": 9, "seed": 4}


def test_refinement():
    layout = zoo_layout("lenet")
    by = {
        scheme: partition(layout, scheme) for scheme in ("layer", "parameter", "unit", "kernel", "cw-ngd", "diagonal")
    }
    assert by["unit"].refines(by["layer"])
    assert not by["layer"].refines(by["unit"])
    assert by["parameter"].refines(by["layer"])
    assert not by["unit"].refines(by["parameter"])
    assert not by["cw-ngd"].refines(by["unit"])  # its bias block spans the units
    assert by["cw-ngd"].refines(by["parameter"])
    for p in by.values():
        assert p.refines(p)
        assert by["diagonal"].refines(p)
        assert p.refines(partition(layout, {"everything": range(layout.n_params)}))
    assert not by["layer"].refines(by["layer"].restrict("0"))  # nothing to lie in
    assert by["layer"].restrict("0").refines(by["layer"])
    one = partition(layout, "sequential", size=1)
    assert one.refines(by["diagonal"])
    assert by["diagonal"].refines(one)


def test_restrict_and_within_layers_cut_blocks():
    layout = zoo_layout("dense")  # layer 0: 0..15, layer 2: 16..23
    p = partition(layout, {"b": [20, 3, 17], "a": [16, 18, 19], "c": [*range(3), *range(4, 16), 21, 22, 23]})
    last = p.restrict("2")
    assert [block.tolist() for block in last] == [[20, 17], [16, 18, 19], [21, 22, 23]]
    assert last.labels == ("2 b", "a", "2 c")
    assert last.layers == ("2", "2", "2")
    assert last.block_of.tolist() == [-1] * 16 + [1, 0, 1, 1, 0, 2, 2, 2]
    assert last.layout is layout
    assert last.scheme == "own"
    cut = p.within_layers()
    assert [block.tolist() for block in cut] == [[3], [*range(3), *range(4, 16)], [20, 17], [16, 18, 19], [21, 22, 23]]
    assert cut.labels == ("0 b", "0 c", "2 b", "a", "2 c")
    assert cut.layers == ("0", "0", "2", "2", "2")
    assert_cover(cut)
    assert cut.within_layers() is cut
    assert cut.refines(p)
    assert cut.refines(partition(layout, "layer"))
    empty = last.restrict("0")
    assert (len(empty), empty.blocks, empty.labels, empty.groups, empty.layers) == (0, (), (), [], ())
    assert (empty.largest_block, empty.storage_entries, empty.solve_flops) == (0, 0, 0)
    assert empty.refines(p)
    assert empty.restrict("2").num_blocks == 0
    assert "all    0       none" in repr(empty)


def test_costs_and_table():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    p = partition(model, "unit")
    assert p.storage_entries == 2 * 16 + 9
    assert p.solve_flops == pytest.approx((2 * 64 + 27) / 3, rel=1e-12)
    assert p.storage_bytes() == 4 * 41
    assert p.storage_bytes(torch.float64) == 8 * 41
    assert repr(p).splitlines() == [
        "Partition 'unit': 3 blocks over 11 parameters",
        "  layer  blocks  sizes         storage  solve",
        "  0      2       2 x 4         128 B    42.7",
        "  1      1       1 x 3         36 B     9",
        "  all    3       2 x 4, 1 x 3  164 B    51.7",
        "storage: entries of all blocks in float32; solve: one Cholesky factor of each block, in FLOP",
    ]
    crossing = repr(partition(model, "sequential", size=3))
    assert crossing.startswith("Partition 'sequential', size=3: 4 blocks over 11 parameters")
    assert "(crossing layers)  1       1 x 3" in crossing
    assert "2 to 12" in repr(partition(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 5), nn.Linear(3, 3)), "parameter"))
    huge = Partition("own", p.layout, np.array([4 * 10**6]), torch.empty(0, dtype=torch.int64))
    assert huge.solve_flops == pytest.approx(64e18 / 3, rel=1e-12)  # beyond 64-bit integers
    with pytest.raises(
        TypeError, match=re.escape("dtype must be a torch.dtype such as torch.float32; got 'float32'. ")
    ):
        p.storage_bytes("float32")


def test_a_million_single_entries_stay_vectorised():
    p = partition(nn.Linear(999, 1000), "diagonal")
    (group,) = p.groups
    assert group.index.shape == (10**6, 1)
    assert torch.equal(group.index[:, 0], torch.arange(10**6))
    assert p.storage_entries == 10**6
    assert not {"blocks", "labels"} & set(vars(p))  # neither is made before it is asked for


def test_partition_is_frozen():
    p = partition(nn.Linear(2, 2), "unit")
    with pytest.raises(AttributeError, match="cannot assign to field 'scheme'"):
        p.scheme = "layer"
    with pytest.raises(ValueError, match="read-only"):
        p.sizes[0] = 1


def test_blocks_of_your_own_keep_their_order():
    model = nn.Sequential(nn.Linear(2, 2))
    p = partition(
        model, {"z": torch.tensor([5, 0]), "list": [1, 4], "array": np.array([3], dtype=np.uint8), "r": range(2, 3)}
    )
    assert p.labels == ("z", "list", "array", "r")
    assert [block.tolist() for block in p] == [[5, 0], [1, 4], [3], [2]]
    assert p.layers == ("0",) * 4


MAPLESS = [case for case in BY_LAYER if case not in [("channel", {}), ("cw-ngd", {})]]


@pytest.mark.parametrize("case", MAPLESS, ids=case_name)
def test_other_schemes_need_no_map(case):
    scheme, options = case
    assert_cover(partition(lenet(), scheme, **options))


def test_indices_stay_on_the_cpu_under_another_default_device():
    model = nn.Linear(3, 2)
    torch.set_default_device("meta")
    try:
        p = partition(model, "input")
        tensors = [*p.blocks, p.flat, p.block_of, *(g.index for g in p.groups), *(g.block_ids for g in p.groups)]
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@st.composite
def networks(draw):
    """A few layers of any kind and size; what one feeds the next does not matter to a partition."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        a, b, c, g = (draw(st.integers(1, 3)) for _ in range(4))
        bias = draw(st.booleans())
        make = draw(
            st.sampled_from([
                lambda a=a, b=b, bias=bias: nn.Linear(7 * a, b, bias=bias),
                lambda a=a, b=b, c=c, g=g, bias=bias: nn.Conv2d(g * a, g * b, (c, 2), groups=g, bias=bias),
                lambda a=a, b=b, c=c, bias=bias: nn.Conv1d(a, b, c, bias=bias),
                lambda a=a, b=b, bias=bias: nn.Conv3d(a, b, (1, 2, 1), bias=bias),
                lambda a=a: nn.BatchNorm2d(a),
                lambda a=a, b=b: nn.Embedding(a, b),
            ])
        )  # fmt: skip
        layers.append(make())
    return nn.Sequential(*layers)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(model=networks(), case=st.sampled_from(CASES), mapped=st.booleans())
def test_any_scheme_is_a_disjoint_cover(model, case, mapped):
    maps = {
        name: (layer.in_features // 7, 7, 1) if mapped else None
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    }
    scheme, options = case
    p = partition(model, scheme, input_maps=maps, **options)
    assert_cover(p)
    assert len(set(p.labels)) == p.num_blocks
    assert p.within_layers().refines(partition(model, "layer"))
    assert sum(group.index.numel() for group in p.groups) == p.layout.n_params
