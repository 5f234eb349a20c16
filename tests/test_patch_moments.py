"""Second moments of patches without patches, and the two sums of KFAC that use them."""

import pytest
import torch
from test_cwngd import backpropagate, make
from torch import nn

from fisherlens.errors import InputError
from fisherlens.optim import KFAC, factors, patch_moments
from fisherlens.optim.factors import normal, rounded
from fisherlens.optim.patch_moments import patch_sums, shifts_are_cheaper
from fisherlens.scores.conv import ConvGeometry

CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(3, 2, 3),
    "same": lambda: nn.Conv2d(3, 2, 3, padding=1),
    "wide padding": lambda: nn.Conv2d(2, 2, 3, padding=(3, 2)),
    "even, same": lambda: nn.Conv2d(2, 2, (4, 2), padding="same"),
    "5x5": lambda: nn.Conv2d(2, 2, 5, padding=(1, 2)),
    "row": lambda: nn.Conv2d(2, 2, (1, 3), padding=(0, 1)),
    "column": lambda: nn.Conv2d(2, 2, (3, 1)),
    "1x1": lambda: nn.Conv2d(4, 2, 1),
    "groups, dilated, circular": lambda: nn.Conv2d(
        4, 4, (3, 2), groups=2, dilation=(2, 1), padding="same", padding_mode="circular"
    ),
    "depthwise, dilated": lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=(1, 2), padding=2),
    "reflect": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    "line": lambda: nn.Conv1d(3, 2, 4, padding=2),
    "line, dilated, groups": lambda: nn.Conv1d(4, 2, 3, dilation=2, padding=1, groups=2),
}


def padded(name, dtype=torch.float64):
    module = CONVOLUTIONS[name]()
    geometry = ConvGeometry.of(module)
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(5, module.in_channels, *(9, 8)[: geometry.dim], generator=generator, dtype=torch.float64)
    return geometry, geometry.padded(x.to(dtype))


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_moments_are_those_of_the_patches(name, dtype, tolerance, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(patch_moments, "_IMAGES", at_once)
    geometry, x = padded(name, dtype)
    patches = geometry.patches(x.double()).permute(1, 2, 0, 3).flatten(2)
    wanted = patches @ patches.mT
    found = patch_moments.patch_moments(geometry, x)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
    torch.testing.assert_close(patch_sums(geometry, x).double(), patches.sum(-1), rtol=1e-5, atol=1e-5)


def test_when_moved_images_save_work():
    assert shifts_are_cheaper(ConvGeometry.of(nn.Conv2d(32, 32, 3, padding=1)), 32, (32, 32))
    assert not shifts_are_cheaper(ConvGeometry.of(nn.Conv2d(32, 32, 3, stride=2)), 32, (16, 16))
    assert not shifts_are_cheaper(ConvGeometry.of(nn.Conv3d(32, 32, 3)), 32, (8, 8, 8))
    assert not shifts_are_cheaper(ConvGeometry.of(nn.Conv2d(512, 512, 3, padding=1)), 512, (2, 2))
    assert not shifts_are_cheaper(ConvGeometry.of(nn.Conv2d(32, 32, 1)), 32, (32, 32))


def whenever_possible(geometry, channels, positions):
    return geometry.dim < 3 and set(geometry.stride) == {1}


@pytest.mark.parametrize("name", ["flattened", "groups", "shared", "1d"])
def test_factors_are_the_same_either_way(name, monkeypatch):
    found = []
    for rule in (whenever_possible, lambda *_: False):
        monkeypatch.setattr(factors, "shifts_are_cheaper", rule)
        model, x, y = make(name)
        opt = KFAC(model, labels="true", ema=0.5)
        for _ in range(2):
            backpropagate(opt, model, x, y)
            opt.step()
        found.append([(r.A, r.G) for r in opt._records.values()])
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_input_that_was_written_over_is_noticed(monkeypatch):
    monkeypatch.setattr(factors, "shifts_are_cheaper", whenever_possible)
    model, x, y = make("flattened")
    opt = KFAC(model, labels="true")
    backpropagate(opt, model, x, y)
    x += 1
    with pytest.raises(InputError, match="The input of layer '0' was changed in place"):
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_without_a_full_mantissa_are_dropped(dtype):
    info = torch.finfo(dtype)
    x = torch.tensor([1.0, -info.tiny / 4, info.tiny, 1e-9, torch.nan], dtype=dtype)
    assert normal(x[:4]).tolist() == [1.0, 0.0, 0.0, x[3].item()]
    assert normal(x)[4].isnan()
    small = x[:3] * info.tiny
    assert torch.equal(normal(small), small), "all are as small"
    assert rounded(torch.tensor([0.5, info.eps**2 / 2, info.eps], dtype=dtype)).tolist() == [0.5, 0.0, info.eps]
