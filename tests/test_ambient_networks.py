"""Networks as people bring them, against loops over single examples, outputs and derivatives that share nothing with the package."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as Fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import fisherlens as fl
from fisherlens.errors import InputError


class MixerBlock(nn.Module):
    """A linear layer over positions, and one over channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.positions, self.channels = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + torch.tanh(self.positions(self.norm(x).transpose(1, 2))).transpose(1, 2)
        return x + Fn.gelu(self.channels(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 4, 2, 2), MixerBlock(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class UNet(nn.Module):
    """A transposed convolution back up, and a skip connection around it; one prediction per pixel."""

    def __init__(self):
        super().__init__()
        self.down, self.low = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up, self.out = (
            nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Conv2d(5, 2, 1),
        )

    def forward(self, x):
        a = torch.tanh(self.down(x))
        return self.out(torch.cat([self.up(torch.tanh(self.low(a))), a], 1))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(2, 4, 3, groups=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.head = nn.Conv2d(4, 5, 1, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(
            Fn.relu6(self.point(Fn.relu6(self.norm(self.depth(x)), inplace=True)), inplace=True).mean((2, 3))
        )


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3, padding_idx=0), nn.Linear(8, 3)
        self.cell = nn.GRU(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.head(self.cell(self.table(x))[0].mean(1))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(1, 3, 3))
        self.head = parametrizations.weight_norm(nn.Linear(12, 3), dim=None)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.bias = nn.Linear(5, 3), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return Fn.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


class OwnDepth(nn.Module):
    """Every example takes its own number of steps, and one of two heads: rows are picked, worked on and put back."""

    def __init__(self):
        super().__init__()
        self.first, self.step = nn.Linear(4, 5), nn.Linear(5, 5)
        self.even, self.odd = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h, depth = torch.tanh(self.first(x)), (x.abs().sum(1) * 2).long() % 4
        for k in range(4):
            at = (depth > k).nonzero()[:, 0]
            if len(at):
                h = h.index_copy(0, at, torch.tanh(self.step(h[at])))
        out, even = h.new_zeros(len(x), 3), depth % 2 == 0
        if even.any():
            out[even] = self.even(h[even])
        if not even.all():
            out[~even] = self.odd(h[~even])
        return out


class Experts(nn.Module):
    """Two of three experts per example, weighted by their gate."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, weight[row, place, None] * torch.tanh(expert(x[row])))
        return out


def _rotated(x: Tensor) -> Tensor:
    t, d = x.shape[-2:]
    angle = torch.arange(t, dtype=x.dtype)[:, None] / 100 ** (torch.arange(0, d, 2, dtype=x.dtype) / d)
    cos, sin = (f.repeat_interleave(2, -1) for f in (angle.cos(), angle.sin()))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


class Decoder(nn.Module):
    """Grouped causal attention with rotated queries and keys, a gated linear unit, torch's own attention, and tied tables."""

    def __init__(self):
        super().__init__()
        self.table, self.norms = nn.Embedding(6, 4), nn.ModuleList([nn.RMSNorm(4), nn.RMSNorm(4), nn.LayerNorm(4)])
        self.q, self.k, self.v, self.o = (nn.Linear(4, 8, bias=False), *(nn.Linear(4, 4, bias=False) for _ in range(3)))
        self.gate, self.up, self.down = (
            nn.Linear(4, 5, bias=False),
            nn.Linear(4, 5, bias=False),
            nn.Linear(5, 4, bias=False),
        )
        self.back, self.attention = nn.Linear(8, 4, bias=False), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        h, (n, t) = self.norms[0](x), ids.shape
        q, k, v = (f(h).view(n, t, -1, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = Fn.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(self.back(mixed.transpose(1, 2).reshape(n, t, 8)))
        h = self.norms[1](x)
        x = x + self.down(Fn.silu(self.gate(h)) * self.up(h))
        h = self.norms[2](x)
        return self.head(x + self.attention(h, h, h, need_weights=False)[0]).mean(1)


class Counting(nn.Module):
    """Writes into its buffers, and keeps its last activations, in every forward; one parameter is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.spare = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.first(x))
        self.seen, self.last = 0.9 * self.seen + 0.1 * h.detach().mean(0), h.detach()
        return self.head(h)


class Spectral(nn.Module):
    """A filter in Fourier space whose parameters are viewed as complex numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.filter, self.head = nn.Linear(4, 4), nn.Parameter(torch.ones(3, 4, 2)), nn.Linear(4, 3)

    def forward(self, x):
        waves = torch.fft.rfft(torch.tanh(self.first(x)), dim=1) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft(waves, n=4, dim=1).mean(1))


class Folded(nn.Module):
    """Positions are folded into the batch axis, and unfolded again."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.head = nn.Linear(4, 4), nn.Conv1d(1, 2, 3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(torch.tanh(self.first(x.reshape(-1, 4)))[:, None]).flatten(1)
        return self.head(h.view(len(x), -1, 4).mean(1))


NETWORKS = {
    Mixer: (1, 4, 4),
    UNet: (1, 4, 4),
    Separable: (2, 4, 4),
    Gated: 7,
    Normed: (1, 4, 4),
    TiedAutoencoder: (5,),
    OwnDepth: (4,),
    Experts: (4,),
    Decoder: 6,
    Counting: (4,),
    Spectral: (4, 4),
    Folded: (3, 4),
}

#: budgets in bytes that hold the scores of a few examples
SMALL = {UNet: 20_000, Gated: 5_000, Decoder: 20_000}


@functools.cache
def sample(build: type[nn.Module]):
    """The network, its data, and (F exact, F empirical, mean gradient) by loops."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    kind = NETWORKS[build]
    x = (
        torch.randint(kind, (5, 4), generator=generator)
        if isinstance(kind, int)
        else torch.randn(9, *kind, generator=generator, dtype=torch.float64)
    )
    likelihood = "gaussian" if build is TiedAutoencoder else "categorical"
    with torch.no_grad():
        outputs = copy.deepcopy(model)(x)
    y = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    if likelihood == "categorical":
        y = torch.randint(outputs.shape[1], (len(x), *outputs.shape[2:]), generator=generator)
    return model, (x, y), likelihood, by_loops(copy.deepcopy(model), x, y, likelihood)


def plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Of the fused one torch has a wrong second derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def flat(model: nn.Module, value: Tensor, **options) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, **options)
    return torch.cat([g.reshape(-1) for g in found])


def by_loops(model: nn.Module, x: Tensor, y: Tensor, likelihood: str) -> tuple[Tensor, Tensor, Tensor]:
    exact = empirical = gradient = terms = 0
    for n in range(len(x)):
        out = model(x[n : n + 1])[0]
        pieces = out.reshape(len(out), -1).T if likelihood == "categorical" else out.reshape(1, -1)
        for t, f in enumerate(pieces):  # the terms of the mean
            J = torch.stack([flat(model, output, retain_graph=True) for output in f])
            p, f = f.detach().softmax(0), f.detach()
            H = p.diag() - p.outer(p) if likelihood == "categorical" else torch.eye(len(f), dtype=f.dtype)
            target = Fn.one_hot(y[n].reshape(-1)[t], len(f)) if likelihood == "categorical" else y[n]
            score = J.T @ ((p if likelihood == "categorical" else f) - target)
            exact, empirical = exact + J.T @ H @ J, empirical + score.outer(score)
            gradient, terms = gradient + score, terms + 1
    return exact / terms, empirical / terms, gradient / terms


def close(found: Tensor, truth: Tensor) -> None:
    assert found.shape == truth.shape
    assert (found - truth).norm() <= 1e-10 * truth.norm()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "passed over"])
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_products_are_those_of_the_jacobian(build, kept, unchanged):
    model, data, likelihood, (exact, empirical, gradient) = sample(build)
    V = torch.randn(len(exact), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    memory = "2GiB" if kept else SMALL.get(build, 2_000)
    for kind, truth in (("exact", exact), ("empirical", empirical)):
        with unchanged(model):
            F = fl.Fisher(model, data, likelihood=likelihood, kind=kind, memory=memory)
            close(F @ V, truth @ V)
            close(F @ V[:, 0], truth @ V[:, 0])
            close(F.diagonal(), truth.diagonal())
            close(F.gradient(), gradient)


@pytest.mark.parametrize("memory", ["2GiB", 20_000])
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_hessians_are_second_derivatives(build, memory, monkeypatch):
    model, (x, y), likelihood, (exact, _, _) = sample(build)
    V = torch.randn(len(exact), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH), monkeypatch.context() as patch:
        patch.setattr(torch, "_weight_norm", plain_weight_norm)
        out = net(x)
    loss = Fn.cross_entropy(out, y) if likelihood == "categorical" else (out - y).square().sum() / (2 * len(x))
    gradient = flat(net, loss, create_graph=True)
    truth = torch.stack([flat(net, gradient @ v, retain_graph=True) for v in V.T], dim=1)
    H = fl.Fisher(model, (x, y), likelihood=likelihood, kind="hessian", memory=memory)
    close(H @ V, truth)
    close(H @ V[:, 0], truth[:, 0])


def test_a_norm_of_the_batch_is_refused_in_eval_mode_too():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).eval()
    with pytest.raises(InputError, match=r"'1' \(BatchNorm1d\) has no running statistics.*track_running_stats=True"):
        fl.Fisher(
            model, (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), None), likelihood="categorical"
        )
