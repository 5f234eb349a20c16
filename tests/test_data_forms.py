"""Data in the forms in which libraries hand them over: mappings with labels, objects with logits, shared and missing entries."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from cases import fill
from fisher_checks import KINDS, case, drawn_labels, error
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, WeightedRandomSampler

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.scores.batch import Batch, joined, joined_size, make_batch
from fisherlens.scores.source import Source

N, LENGTH, VOCABULARY = 7, 4, 6
CPU = torch.device("cpu")


class Encoding(collections.UserDict):
    """A tokenizer's batch: a mapping that is no dict."""


class Output(collections.OrderedDict):
    """A model's output: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Pair = collections.namedtuple("Pair", ["logits", "hidden"])


class Slots:
    """An output object that is no mapping."""

    def __init__(self, logits: Tensor):
        self.logits = logits


class Classifier(nn.Module):
    """Takes keyword inputs as text models do, and answers in one of several forms."""

    def __init__(self, form: str = "tensor", per_token: bool = False):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 3, padding_idx=0), nn.Linear(3, 3)
        self.form, self.per_token = form, per_token

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, return_dict=None):
        h = self.table(input_ids)
        if position_ids is not None:
            h = h + 0.1 * position_ids[..., None]
        mask = attention_mask[..., None].to(h.dtype)
        pooled = torch.tanh(h) if self.per_token else torch.tanh((h * mask).sum(1) / mask.sum(1))
        logits = self.head(pooled)
        if self.form == "tensor":
            return logits
        forms = {
            "dict": {"logits": logits, "loss": None},
            "mapping": Output(loss=None, logits=logits),
            "object": Slots(logits),
            "named tuple": Pair(logits, pooled),
            "nothing": None,
            "tuple": (logits, pooled),
            "other dict": {"scores": logits},
            "wrong logits": Slots([logits]),
        }
        return forms[self.form]


def classifier(form: str = "tensor", per_token: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return fill(Classifier(form, per_token).double(), torch.Generator().manual_seed(0))


def text(per_token: bool = False) -> tuple[dict[str, Any], Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(N, LENGTH, dtype=torch.long)
    mask[1, 2:], mask[4, 1:] = 0, 0
    ids = torch.randint(1, VOCABULARY, (N, LENGTH), generator=g) * mask
    y = torch.randint(3, (N, LENGTH) if per_token else (N,), generator=g)
    return {"input_ids": ids, "attention_mask": mask}, y.masked_fill(mask == 0, -100) if per_token else y


def cut(batch: dict[str, Any], *sizes: int) -> list[dict[str, Any]]:
    """The batch in pieces; what is not as long as the data goes into all of them."""
    pieces, start = [], 0
    for size in sizes:
        at = slice(start, start + size)
        pieces.append({k: v[at] if isinstance(v, Tensor) and len(v) == N else v for k, v in batch.items()})
        start += size
    return pieces


def truth(kind: str = "exact", per_token: bool = False, **more: Any) -> Tensor:
    model, (inputs, y) = classifier(per_token=per_token), text(per_token)
    likelihood = fl.Categorical(class_axis=-1) if per_token else "categorical"
    drawn = drawn_labels(model, ({**inputs, **more}, y), likelihood) if kind == "mc" else None
    return reference.fisher(model, ({**inputs, **more}, y), likelihood, kind, labels=drawn)


@pytest.mark.parametrize("form", ["tensor", "dict", "mapping", "object", "named tuple"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_read_where_they_are(form, kind, unchanged):
    model, data = classifier(form), text()
    with unchanged(model):
        for memory in ("2GiB", 1000):
            F = fl.Fisher(model, data, likelihood="categorical", kind=kind, mc_samples=2, seed=5, memory=memory)
            assert error(F.dense(), truth(kind)) < 1e-10
            assert error(F @ torch.eye(F.n_params, dtype=F.dtype)[:, :2], truth(kind)[:, :2]) < 1e-10


@pytest.mark.parametrize(
    ("form", "got"),
    [
        ("tuple", "tuple of length 2"),
        ("nothing", "NoneType"),
        ("other dict", r"dict with the keys \['scores'\]"),
        ("wrong logits", "Slots"),
    ],
)
def test_other_outputs_name_the_remedy(form, got, unchanged):
    model = classifier(form)
    expected = rf"must return one tensor of outputs, .*; it returned {got}\. Wrap it .* `return self\.model\(x\)\[0\]`"
    with unchanged(model), pytest.raises(InputError, match=expected):
        fl.Fisher(model, text(), likelihood="categorical")


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
def test_mappings_with_labels(kind):
    """One mapping for all, a list of them, a loader that collates them: with entries that are no tensors, and shared ones."""
    model, (inputs, y) = classifier("mapping"), text()
    position = torch.arange(LENGTH, dtype=torch.float64)[None]  # for all examples alike
    shared = {"position_ids": position, "return_dict": True}
    whole = {**shared, **inputs, "labels": y}
    options = {"likelihood": "categorical", "kind": kind, "mc_samples": 2, "seed": 5}
    expected = fl.Fisher(classifier(), ({**inputs, **shared}, y), **options).dense()
    if kind != "hessian":
        assert error(expected, truth(kind, position_ids=position)) < 1e-10
    forms = [whole, Encoding(whole), cut(whole, 3, 4), [Encoding(piece) for piece in cut(whole, 1, 2, 4)]]
    forms.append([({k: v for k, v in piece.items() if k != "labels"}, piece["labels"]) for piece in cut(whole, 5, 2)])
    for data in forms:
        assert error(fl.Fisher(model, data, **options).dense(), expected) < 1e-12
    missing = {**inputs, "labels": y, "position_ids": None}
    none = fl.Fisher(model, [Encoding(piece) for piece in cut(missing, 3, 4)], **options).dense()
    assert error(none, fl.Fisher(classifier(), (inputs, y), **options).dense()) < 1e-12


class Sentences(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        inputs, y = text()
        return {**{key: value[i] for key, value in inputs.items()}, "labels": y[i]}


def test_loaders_of_mappings():
    F = fl.Fisher(classifier("object"), DataLoader(Sentences(), batch_size=3), likelihood="categorical")
    assert error(F.dense(), truth()) < 1e-10
    for sampler in (SubsetRandomSampler(range(N)), WeightedRandomSampler([1.0] * N, N)):
        loader = DataLoader(Sentences(), batch_size=3, sampler=sampler)
        with pytest.raises(InputError, match=rf"its sampler is a {type(sampler).__name__}\)\. Turn off shuffling"):
            fl.Fisher(classifier("object"), loader, likelihood="categorical")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_tokens(kind):
    """Ignored labels at padding, classes on the last axis; labels are not shifted."""
    model, (inputs, y) = classifier("mapping", per_token=True), text(per_token=True)
    batches = [Encoding(piece) for piece in cut({**inputs, "labels": y}, 4, 3)]
    options = {"likelihood": fl.Categorical(class_axis=-1), "kind": kind, "mc_samples": 2, "seed": 5}
    F = fl.Fisher(model, batches, **options)
    assert F.total_weight == (y != -100).sum()
    assert error(F.dense(), truth(kind, per_token=True)) < 1e-10


def test_mappings_that_are_no_batch(unchanged):
    model, (inputs, y) = classifier(), text()
    for data, expected in (
        (inputs, r"re-iterable of such batches; got dict.*A dict is one batch if it holds its targets under 'labels'"),
        (
            [Encoding(inputs)],
            r"Batch 0 .* is a Encoding with the keys \['input_ids', 'attention_mask'\].*under 'labels'",
        ),
        ({**inputs, "labels": y.tolist()}, "targets of the data must be a tensor or None; got list"),
        ({**inputs, "labels": y[:3]}, "differ in length: 7 inputs, targets of length 3"),
        ({"labels": y}, "inputs of a batch must hold tensors; got dict.*torch.as_tensor"),
        ({"input_ids": [[1, 2]], "labels": y}, "inputs of a batch must hold tensors"),
        (({"wrong": y}, y), "The model failed on the data: TypeError.*unexpected keyword"),
    ):
        with unchanged(model), pytest.raises(InputError, match=expected):
            fl.Fisher(model, data, likelihood="categorical")
    no_labels = {**inputs, "labels": None}
    assert error(fl.Fisher(model, no_labels, likelihood="categorical").dense(), truth()) < 1e-10
    with pytest.raises(InputError, match="targets are None, but the empirical kind"):
        fl.Fisher(model, no_labels, likelihood="categorical", kind="empirical")


# --- nested and shared inputs ----------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Inputs inside of inputs, a table that all examples share, and a setting."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.GRUCell(3, 3)

    def forward(self, table: Tensor, pair: Any, mode: str = "sum") -> Tensor:
        x, (state, extra) = pair
        h = self.b(torch.tanh(self.a(x)), state)
        return h @ table if mode == "sum" and extra is None else h


def test_nested_inputs():
    g = torch.Generator().manual_seed(2)
    x, state, table = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, 3), (N, 3), (3, 3)))
    y = torch.randint(3, (N,), generator=g)
    with torch.random.fork_rng(devices=[]):
        model = fill(Nested().double(), g)
    expected = reference.fisher(model, ({"table": table, "pair": (x, (state, None))}, y), "categorical")
    for inputs in (
        {"table": table, "pair": [x, (state, None)], "mode": "sum"},
        (table, Pair(x, [state, None]), "sum"),
        [table, (x, (state, None))],
    ):
        for memory in ("2GiB", 3000):
            F = fl.Fisher(model, (inputs, y), likelihood="categorical", memory=memory)
            assert F.n_data == N
            assert error(F.dense(), expected) < 1e-10
            assert error(F @ torch.eye(F.n_params, dtype=F.dtype)[:, :1], expected[:, :1]) < 1e-10
    x = x.clone()
    x[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="Input 'pair' of the data hold NaN or infinity, first at example 3"):
        fl.Fisher(model, ({"table": table, "pair": (x, (state, None))}, y), likelihood="categorical")


def test_tensors_without_values_to_cut():
    c = case("mlp_tanh")
    x, y = c.data
    nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    for inputs, targets, how in (
        (x.to("meta"), y, "on the meta device, without values"),
        (x.to_sparse(), y, "of layout torch.sparse_coo"),
        (nested, y[:2], "nested"),
        (x, y.to("meta"), "on the meta device"),
    ):
        with pytest.raises(InputError, match=f"A tensor of the data is {how}.*to_dense"):
            c.fisher(data=(inputs, targets))


# --- devices and checksums -------------------------------------------------------------------------------------------


class Tracked(Tensor):
    """A tensor that notes where it is asked to go."""

    moves: list[tuple[int, torch.device]]

    @classmethod
    def of(cls, x: Tensor, moves: list) -> Tracked:
        tracked = x.as_subclass(cls)
        tracked.moves = moves
        return tracked

    def __getitem__(self, index: Any) -> Tracked:
        return Tracked.of(super().__getitem__(index).as_subclass(Tensor), self.moves)

    def to(self, device: Any, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        self.moves.append((len(self), device))
        return self.as_subclass(Tensor)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:1")


def test_batches_are_moved_one_by_one(monkeypatch):
    """Data that live elsewhere come in parts of bounded size, never all at once."""
    x, y = torch.arange(20.0).view(10, 2), torch.arange(10)
    moves: list[tuple[int, torch.device]] = []
    monkeypatch.setattr("fisherlens.scores.source._AT_ONCE", 3 * 16)  # bytes of three examples
    source = Source((Tracked.of(x, moves), Tracked.of(y, moves)), CPU)
    assert source.sizes == [3, 3, 3, 1]
    assert moves == []
    seen = list(source.batches())
    assert moves == [(n, CPU) for n in (3, 3, 3, 1) for _ in range(2)]
    assert torch.equal(torch.cat([batch.inputs for batch in seen]), x)
    assert [batch.where for batch in seen][:2] == ["the data, examples 0..2", "the data, examples 3..5"]
    moves.clear()
    batches = [
        (Tracked.of(x[:4], moves), Tracked.of(y[:4], moves)),
        (Tracked.of(x[4:], moves), Tracked.of(y[4:], moves)),
    ]
    iterator = Source(batches, CPU).batches()
    next(iterator)
    assert moves == [(4, CPU)] * 2  # the second batch waits
    assert Source((x, y), CPU).sizes == [10]  # nothing to move, nothing to cut


def test_parts_of_moved_data_change_nothing(monkeypatch):
    c = case("mlp_tanh")
    monkeypatch.setattr(Source, "_step", lambda self, whole: 2)
    for kind in KINDS:
        some = case("mlp_tanh", kind)
        assert error(some.fisher().dense(), some.matrix) < 1e-10
    F = fl.Fisher(c.model, c.data, likelihood="categorical", kind="hessian", memory=8000)
    monkeypatch.undo()
    assert error(F.dense(), fl.Fisher(c.model, c.data, likelihood="categorical", kind="hessian").dense()) < 1e-12


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
@pytest.mark.parametrize("width", [3, 40_001])  # within one row of the checksum, and in many with a rest
def test_fingerprints_see_every_change(dtype, width):
    """One bit, one place, one order: whatever the dtype and the layout in memory."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (5, width), generator=g).to(dtype)
    x[0, 0], x[1, 1] = 1, 0

    def seen(inputs: Tensor, targets: Tensor | None = None) -> tuple[int, ...]:
        return next(iter(Source((inputs, targets), CPU)._read())).fingerprint()

    assert seen(x) == seen(x.clone()) == seen(x.T.contiguous().T)
    assert seen(x[:, ::2]) == seen(x[:, ::2].clone())
    assert seen(torch.cat([x[:1], x])[1:]) == seen(x)  # at another address
    changed = x.clone()
    changed[1, 1] = 1
    swapped = x.clone()
    swapped[0, 0], swapped[1, 1] = x[1, 1], x[0, 0]  # as in one-hot vectors that change places
    for other in (changed, swapped, x.flip(0)):
        assert seen(other) != seen(x)
    assert seen(x, torch.arange(5)) != seen(x, torch.tensor([0, 1, 2, 4, 3]))


def test_reordered_one_hot_vectors_are_seen():
    """Sums over rows and columns stay the same when one-hot examples change places; the checksum does not."""
    x, y = torch.eye(5, dtype=torch.float64).repeat(2, 1)[:6], torch.zeros(6).long()
    orders = iter([torch.arange(6), torch.tensor([1, 0, 2, 3, 4, 5]), torch.arange(6)])

    class Loader:
        def __iter__(self):
            index = next(orders)
            yield x[index], y[index]

    model = fill(nn.Linear(5, 3).double(), torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"batch 0 differs from .*The Loader gives other batches in every pass"):
        fl.Fisher(model, Loader(), likelihood="categorical")


def test_small_batches_are_joined():
    """Up to so many examples together, in order, and only where they are alike."""

    def batch(n: int, at: int, width: int = 2) -> Batch:
        x = torch.arange(at, at + n).double()
        return make_batch(x[:, None].expand(n, width), x.long(), f"batch {at}")

    def sizes(batches: list[Batch], most: int) -> list[int]:
        found = list(joined(batches, most))
        assert torch.equal(torch.cat([b.targets for b in found]), torch.arange(sum(b.size for b in batches)))
        assert all(torch.equal(b.inputs[:, 0].long(), b.targets) for b in found)
        most_of_one = joined_size([b.size for b in batches], most)
        assert all(b.size <= most_of_one for b in found)
        return [b.size for b in found]

    equal = [batch(3, at) for at in range(0, 15, 3)]
    assert sizes(equal, 6) == [6, 6, 3]
    assert sizes(equal, 5) == [3] * 5
    assert sizes(equal, 100) == [15]
    assert sizes([batch(1, 0), batch(4, 1), batch(2, 5), batch(7, 7)], 6) == [5, 2, 7]
    assert sizes([batch(2, 0), batch(2, 2, width=3), batch(2, 4, width=3)], 6) == [2, 4]
    assert next(joined(equal, 6)).where == "batch 0 to batch 3"
    tables = [make_batch({"x": torch.ones(2, 2), "table": torch.ones(2, 5)}, None, "b") for _ in range(3)]
    assert list(joined(tables, 6)) == tables  # the table may be one of all examples


def test_batches_are_read_no_further_than_needed():
    read = []

    def batches():
        for k in range(4):
            read.append(k)
            yield make_batch(torch.ones(3, 2), None, f"batch {k}")

    pairs = joined(batches(), 6)
    assert next(pairs).size == 6
    assert read == [0, 1]
