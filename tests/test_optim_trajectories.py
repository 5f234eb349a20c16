"""Several steps, with averages, periods, clipping, decay and a short batch, against plain loops over examples, on layers of unusual forms."""

import copy
import itertools
import math

import pytest
import torch
from optim_samples import flat, seeded
from torch import nn
from torch.nn import functional

from fisherlens.optim import CWNGD, EKFAC, FNGD, KFAC, MBF, TENGraD

pytestmark = pytest.mark.filterwarnings("ignore::fisherlens.errors.NumericalWarning")  # of PReLU and LayerNorm
LR, LAM, MU, DECAY, KAPPA = 0.1, 0.05, 0.9, 0.01, 1e-3
COMMON = {"lr": LR, "damping": LAM, "momentum": MU, "weight_decay": DECAY, "labels": "true"}
CLIPPED = COMMON | {"kl_clip": KAPPA}


class Odd(nn.Module):
    """Depthwise with stride and dilation, groups padded by reflection, no bias, PReLU, LayerNorm, a dense layer on positions."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(4, 8, 3, groups=4, stride=2, dilation=2, padding=(2, 1))
        self.pair = nn.Conv2d(
            8, 4, (2, 3), groups=2, padding="same", padding_mode="reflect", dilation=(2, 1), bias=False
        )
        self.act, self.norm = nn.PReLU(4), nn.LayerNorm(4)
        self.tokens, self.out = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        x = self.act(self.pair(torch.tanh(self.depth(x)))).flatten(2).mT
        return self.out(torch.tanh(self.tokens(self.norm(x)))).mean(1)


class Twice(nn.Module):
    """A line convolution called on two lengths, and a dense layer called twice, on two axes of positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.dense, self.out = (
            nn.Conv1d(2, 2, 3, padding="same", padding_mode="circular"),
            nn.Linear(6, 6),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))[:, :, ::2]))
        return self.out(torch.tanh(self.dense(torch.tanh(self.dense(x)))).flatten(1))


SAMPLES = {"odd": (Odd, (4, 7, 6)), "twice": (Twice, (2, 12))}


def batches(shape):
    """Six batches of seven examples, one of them short."""
    generator = torch.Generator().manual_seed(5)
    for k in range(6):
        n = 4 if k == 3 else 7
        yield (
            torch.randn(n, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (n,), generator=generator),
        )


class Plain:
    """A model in plain terms: rows of examples, entries and matrices of layers, inputs and scores by position."""

    def __init__(self, model):
        self.model, start, self.at = copy.deepcopy(model), 0, {}
        for name, p in self.model.named_parameters():
            self.at[name] = torch.arange(start, start + p.numel())
            start += p.numel()
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}

    def set(self, theta):
        nn.utils.vector_to_parameters(theta.clone(), self.model.parameters())
        return self

    def rows(self, x, y):
        parameters = list(self.model.parameters())
        found = (
            torch.autograd.grad(functional.cross_entropy(self.model(x[[n]]), y[[n]]), parameters) for n in range(len(x))
        )
        return torch.stack([torch.cat([g.reshape(-1) for g in grads]) for grads in found])

    def entries(self, layer):
        return torch.cat([at for name, at in self.at.items() if name.rpartition(".")[0] == layer])

    def matrix_entries(self, layer):
        """(groups, outputs, inputs with the bias last): where the entries of [W, b] lie."""
        groups = getattr(self.layers[layer], "groups", 1)
        parts = [self.at[f"{layer}.{leaf}"] for leaf in ("weight", "bias") if f"{layer}.{leaf}" in self.at]
        outputs = self.layers[layer].weight.shape[0] // groups
        return torch.cat([part.view(groups, outputs, -1) for part in parts], dim=2)

    def positions(self, x, y):
        """Layer -> a (N, groups, T, d_i) and scores (N, groups, T, d_o) of the summed loss."""
        calls, handles = [], []
        for name, module in self.layers.items():

            def hook(module, inputs, output, name=name):
                output.retain_grad()
                calls.append((name, module, inputs[0].detach(), output))

            handles.append(module.register_forward_hook(hook))
        functional.cross_entropy(self.model(x), y, reduction="sum").backward()
        found = {}
        for name, module, inputs, output in calls:
            groups = getattr(module, "groups", 1)
            if isinstance(module, nn.Linear):
                a, g = (v.reshape(len(x), 1, -1, v.shape[-1]) for v in (inputs, output.grad))
            else:
                a, g = patches(module, inputs), output.grad.reshape(len(x), groups, output.shape[1] // groups, -1).mT
            if module.bias is not None:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=3)
            found.setdefault(name, []).append((a, g))
        for handle in handles:
            handle.remove()
        self.model.zero_grad()
        return {name: [torch.cat(v, dim=2) for v in zip(*own, strict=True)] for name, own in found.items()}


def patches(module, x):
    """What each output pixel reads, one after another: (N, groups, T, d_i)."""
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    pads = [(p, p) for p in module.padding] if module.padding != "same" else []
    pads = pads or [((d * (k - 1)) // 2, -(-d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    counts = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    columns = []
    for pixel in itertools.product(*map(range, counts)):
        cut = [slice(p * s, p * s + r, d) for p, s, r, d in zip(pixel, stride, reach, dilation, strict=True)]
        columns.append(x[(slice(None), slice(None), *cut)].reshape(len(x), module.groups, -1))
    return torch.stack(columns, dim=2)


def solve(matrix, vector, damping=LAM):
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), vector)


def clipped(u, g):
    product = (LR**2 * (u @ g)).item()
    return u * min(1.0, math.sqrt(KAPPA / product)) if product > 0 else u


class Reference:
    """A method in plain terms: ``direction(plain, x, y, k)``, then clip over covered layers, momentum and decay."""

    clip, memory = True, 0.0

    def step(self, plain, x, y, k):
        theta = flat(plain.model)
        u, g = self.direction(plain, x, y, k)
        if self.clip:
            covered = torch.cat([plain.entries(name) for name in plain.layers])
            u[covered] = clipped(u[covered], g[covered])
        self.memory = u + MU * self.memory
        return theta * (1 - LR * DECAY) - LR * self.memory


class Kronecker(Reference):
    """KFAC with averages of 0.95 and inverses of every second step; ``moments``: EKFAC with bases of every second step and averages of 0.5."""

    def __init__(self, form="exact", moments=False):
        self.form, self.moments, self.kept = form, moments, {}

    def direction(self, plain, x, y, k):
        g = plain.rows(x, y).mean(0)
        u = g / (1 + LAM)
        for name, (a, s) in plain.positions(x, y).items():
            n, groups, t, _ = a.shape
            at = plain.matrix_entries(name)
            for b in range(groups):
                A = torch.einsum("nti,ntj->ij", a[:, b], a[:, b]) / n
                G = torch.einsum("nti,ntj->ij", s[:, b], s[:, b]) / (n * t)
                one = self.kept.setdefault((name, b), {"A": 0, "G": 0})
                if self.moments:
                    u[at[b]] = self._along_bases(one, A, G, a[:, b], s[:, b], g[at[b]], k)
                    continue
                one["A"], one["G"] = 0.95 * one["A"] + 0.05 * A, 0.95 * one["G"] + 0.05 * G
                if k % 2 == 0:
                    one["pair"] = [one[side] / (1 - 0.95 ** (k + 1)) for side in "GA"]
                G, A = one["pair"]
                if self.form == "exact":
                    u[at[b]] = solve(torch.kron(G, A), g[at[b]].reshape(-1)).view_as(at[b])
                else:
                    pi = math.sqrt(A.trace() / len(A) / (G.trace() / len(G)))
                    half = solve(G, g[at[b]], math.sqrt(LAM) / pi)
                    u[at[b]] = solve(A, half.T, math.sqrt(LAM) * pi).T
        return u, g

    @staticmethod
    def _along_bases(one, A, G, a, s, g, k):
        if k % 2 == 0:
            one |= {"Q": [torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1]], "s": 0, "weight": 0}
        left, right = one["Q"]
        rows = torch.einsum("nto,nti->noi", s, a)
        one["s"] = 0.5 * one["s"] + 0.5 * (left.T @ rows @ right).square().mean(0)
        one["weight"] = 0.5 * one["weight"] + 0.5
        return left @ ((left.T @ g @ right) / (one["s"] / one["weight"] + LAM)) @ right.T


class LayerBlocks(Reference):
    """TENGraD's first rule, with rows of every second step: the clip over all parameters, plain gradients elsewhere."""

    def step(self, plain, x, y, k):
        theta, rows = flat(plain.model), plain.rows(x, y)
        g = rows.mean(0)
        self.kept = rows if k % 2 == 0 else self.kept
        u = g.clone()
        for name in plain.layers:
            at = plain.entries(name)
            u[at] = solve(self.kept[:, at].T @ self.kept[:, at] / len(self.kept), g[at])
        self.memory = MU * self.memory + clipped(u, g)
        return theta - LR * (self.memory + DECAY * theta)


class Components(Reference):
    """CW-NGD as released: kernels, segments of flattened maps or whole short units, biases; the scalar rule for norm layers."""

    clip = False

    def __init__(self):
        self.m, self.h, self.H = 0, 0, {}

    def blocks(self, plain):
        for name, module in plain.layers.items():
            size = math.prod(module.weight.shape[2:]) if module.weight.ndim > 2 else module.weight.shape[1]
            yield from plain.at[f"{name}.weight"].view(-1, 6 if name == "out" and size == 12 else size)
            if module.bias is not None:
                yield plain.at[f"{name}.bias"]

    def direction(self, plain, x, y, k):
        rows = plain.rows(x, y)
        g, weight = rows.mean(0), 1 - 0.99 ** (k + 1)
        u = g / (1 + LAM)
        self.m = 0.9 * self.m + 0.1 * g
        m_hat = self.m / (1 - 0.9 ** (k + 1))
        for at in self.blocks(plain):
            key = at[0].item()
            self.H[key] = 0.99 * self.H.get(key, 0) + 0.01 * rows[:, at].T @ rows[:, at] / len(rows)
            u[at] = solve(self.H[key] / weight, m_hat[at])
        if "norm.weight" in plain.at:
            at = plain.entries("norm")
            self.h = 0.99 * self.h + 0.01 * g[at] ** 2
            u[at] = m_hat[at] / ((self.h / weight).sqrt() + 1e-8)
        return u, g


class Minis(Reference):
    """MBF, variant B, T1 = 2 and T2 = 4: momentum of gradients, and the scalar rule for norm layers and biases of convolutions."""

    def __init__(self):
        self.m, self.a, self.v, self.F, self.inverse = 0, 0, 0, {}, {}

    def step(self, plain, x, y, k):
        theta, g = flat(plain.model), plain.rows(x, y).mean(0)
        self.m = MU * self.m + g
        self.a = 0.9 * self.a + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * self.a**2
        u, scalar = self.m / (1 + LAM), self.a / (1e-8 + (self.v / (1 - 0.999 ** (k + 1))).sqrt())
        for name, module in plain.layers.items():
            dense = isinstance(module, nn.Linear)
            at = (
                plain.matrix_entries(name)[0]
                if dense
                else plain.at[f"{name}.weight"].view(-1, *module.weight.shape[2:])
            )
            at = at if dense else at.flatten(1)
            S = g[at] @ g[at].T / at.shape[1] if dense else g[at][:, :, None] * g[at][:, None]
            if k % 2 == 0:
                self.F[name] = 0.9 * self.F.get(name, 0) + 0.1 * S
                if k <= 4:
                    self.inverse[name] = torch.linalg.inv(self.F[name] + LAM * torch.eye(S.shape[-1], dtype=S.dtype))
            u[at] = self.inverse[name] @ self.m[at] if dense else (self.inverse[name] @ self.m[at][:, :, None])[:, :, 0]
            if not dense and module.bias is not None:
                u[plain.at[f"{name}.bias"]] = scalar[plain.at[f"{name}.bias"]]
        if "norm.weight" in plain.at:
            u[plain.entries("norm")] = scalar[plain.entries("norm")]
        return theta * (1 - LR * DECAY) - LR * u


class Weights(Reference):
    """FNGD, four steps in the first epoch, the last of them short."""

    clip = False

    def __init__(self):
        self.c, self.count = {}, {}

    def direction(self, plain, x, y, k):
        rows = plain.rows(x, y)
        n, g = len(rows), rows.mean(0)
        u = g / (1 + LAM)
        for name in plain.layers:
            at = plain.entries(name)
            mean, count = (kept.setdefault(name, torch.zeros(7, dtype=rows.dtype)) for kept in (self.c, self.count))
            if k < 4:
                c = solve(rows[:, at] @ rows[:, at].T / n, torch.ones(n, dtype=rows.dtype))
                mean[:n] = (count[:n] * mean[:n] + c) / (count[:n] + 1)
                count[:n] += 1
            u[at] = (mean[:n, None] * rows[:, at]).mean(0)
        return u, g


METHODS = {
    "kfac": (lambda m: KFAC(m, **CLIPPED, inverse_refresh=2), Kronecker),
    "kfac factored": (lambda m: KFAC(m, **CLIPPED, inverse_refresh=2, preset="paper"), lambda: Kronecker("factored")),
    "ekfac": (lambda m: EKFAC(m, **CLIPPED, inverse_refresh=2, ema=0.5), lambda: Kronecker(moments=True)),
    "tengrad": (lambda m: TENGraD(m, **CLIPPED, refresh=2), LayerBlocks),
    "cw-ngd": (lambda m: CWNGD(m, **COMMON), Components),
    "mbf": (lambda m: MBF(m, **COMMON, refresh=2, inverse_refresh=4), Minis),
    "fngd": (lambda m: FNGD(m, **COMMON, epoch_steps=4), Weights),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("method", METHODS)
def test_six_steps_are_those_of_plain_loops(method, name):
    factory, shape = SAMPLES[name]
    build, reference = METHODS[method]
    model = seeded(factory)
    opt, slow, plain = build(model), reference(), Plain(model)
    for k, (x, y) in enumerate(batches(shape)):
        before = flat(model)
        wanted = slow.step(plain.set(before), x, y, k) - before
        opt.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        opt.step()
        gap = torch.linalg.vector_norm(flat(model) - before - wanted)
        assert gap < 1e-10 * torch.linalg.vector_norm(wanted), f"step {k}"
