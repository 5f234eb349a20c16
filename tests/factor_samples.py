"""Dense matrices of layers, made from the definitions, for the tests of Kronecker-factored optimizers."""

import copy
import io

import torch
from test_cwngd import Shared, backpropagate, flat, make, rows_of
from torch.nn import functional

from fisherlens.reference.kronecker import inputs_and_scores, kronecker_block, kronecker_factors, with_bias


def layers_of(opt):
    return [(layer, torch.arange(layer.start, layer.stop)) for layer in opt.covered]


class Positional(Shared):
    """The same network without a keyword argument, which the slow twin does not look for."""

    def forward(self, x):
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.out(torch.tanh(self.dense(torch.tanh(self.dense(x)))))


def factors(model, x, y, layer, form="expand"):
    """G and A of a layer, (groups, d, d), with the 1 of the bias in A."""
    if type(model) is Shared:
        model = copy.deepcopy(model)
        model.__class__ = Positional
    a, g, w = inputs_and_scores(model, (x, y), "categorical", layer.name, "empirical")
    return kronecker_factors(with_bias(a) if layer.bias else a, g, w, form)


def blocks_of(model, x, y, opt, form="expand"):
    """G ⊗ A of all layers, over the entries of each in the flat vector."""
    return [kronecker_block(*factors(model, x, y, layer, form), layer.bias is not None) for layer in opt.covered]


def first_step(opt, model, x, y):
    """What the first step adds to the parameters, and the gradient."""
    before, gradient = flat(model), rows_of(copy.deepcopy(model), x, y).mean(0)
    backpropagate(opt, model, x, y)
    opt.step()
    return flat(model) - before, gradient


def resumed(build, options, steps=(0, 1, 4)):
    """Whether a run resumed after some steps is the run itself, bit by bit."""
    for after in steps:
        model, x, y = make("groups")
        opt = build(model, **options)
        for _ in range(after):
            backpropagate(opt, model, x, y)
            opt.step()
        other, _, _ = make("groups")
        other.load_state_dict(model.state_dict())
        again = build(other, **options | {"lr": 0.5})
        again.load_state_dict(opt.state_dict())
        for _ in range(4):
            for o, m in ((opt, model), (again, other)):
                backpropagate(o, m, x, y)
                o.step()
        if not torch.equal(flat(model), flat(other)) or opt.diagnostics != again.diagnostics:
            return False
    return True


def stored(opt):
    """The state as bytes."""
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    return buffer.getvalue()
