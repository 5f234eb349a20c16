# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look through the lens
#
# A network has thousands of parameters, and the data speak about all of them at once. **What do the data know about the
# parameters, and which parameters do they know only together?** The Fisher information matrix $F$ answers both: its diagonal says how
# much each parameter matters for what the network predicts, and everything off the diagonal says which of them matter jointly.
# Optimizers that follow the natural gradient, $(F + \lambda I)^{-1} g$, must forget most of that matrix to be affordable. This
# notebook takes the matrix whole, so that we can see what they forget and what it costs.
#
# We go through the story of a Fisher report, one question per cell: train a small network on handwritten digits; ask where its
# information sits, what its spectrum looks like and which blocks are coupled; ask what each way of cutting the
# parameters into blocks keeps; and at the end take one step and see whether the prediction comes true. It takes well under a minute
# on two cores, and nothing is downloaded.

# %%
import copy
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import xarray as xr

import fisherlens as fl

torch.set_num_threads(1)  # small matrices: on a busy machine more threads only wait for each other
SMOKE = os.environ.get("FISHERLENS_SMOKE") == "1"  # less data, fewer steps
NUM_DATA, NUM_STEPS, SEEDS = (60, 25, 2) if SMOKE else (200, 100, 3)
MIDDLE = 10  # a step at which CW-NGD is on its way and far from done

# %% [markdown]
# ## The problem
#
# `fl.problem` brings a network, data and a likelihood. The network is small on purpose: with 5,530 parameters the
# matrix that we shall *not* form could still be formed, so every claim below can be checked the slow way.

# %%
digits = fl.problem("digits-cnn")
print(digits.model(seed=0))
inputs, targets = digits.train

figure, axes = plt.subplots(1, 10, figsize=(8, 1.2), layout="constrained")
for number, ax in enumerate(axes):
    ax.imshow(inputs[targets == number][0, 0], cmap="Greys")
    ax.set_title(number, fontsize=9)
    ax.set_axis_off()

# %% [markdown]
# ## Two optimizers, side by side
#
# CW-NGD is a natural-gradient method that believes the Fisher to be block-diagonal with very small blocks: one for each kernel of
# a convolution, one for each segment of a dense unit. SGD with momentum believes nothing. Every seed starts both from the same weights and feeds
# them the same batches. The learning rate of SGD is the best of a few that we tried by hand, and so is CW-NGD's, so the picture
# shows what the methods can do here; it does not settle which one is better.
#
# Look at the left panel for what a step achieves, and at the right one for what a second achieves: a CW-NGD step is dearer.


# %%
def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def cw_ngd(model):
    return fl.optim.CWNGD(model, lr=0.01, damping=1e-3)


settings = {"num_steps": NUM_STEPS, "batch_size": 128}
optimizers = {"SGD, momentum 0.9": sgd, "CW-NGD": cw_ngd}
training = fl.compare_optimizers(digits, optimizers, seeds=SEEDS, **settings)
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
fl.plot.optimizers(training, axes[0])
fl.plot.optimizers(training, axes[1], x="seconds", legend=False)

last = training.isel(step=-1, drop=True).median("seed")
last[["train_loss", "test_loss", "test_accuracy", "seconds"]].to_pandas().round(3)

# %% [markdown]
# ## Three moments of one run
#
# The Fisher belongs to a network at one point of its life. We train once more and keep copies of three: before the first step, in
# the middle of learning, and at the end. The copies are in double precision. Small eigenvalues drown in rounding
# otherwise: in single precision everything below about $10^{-4}$ of the largest one is noise.

# %%
stages = {"start": 0, "middle": MIDDLE, "end": NUM_STEPS}
networks = {}


def keep(step, model, optimizer):
    for stage, wanted in stages.items():
        if step == wanted:
            networks[stage] = copy.deepcopy(model).double()


fl.train(digits.model(seed=0), digits, cw_ngd, callbacks=[keep], **settings)
data = inputs[:NUM_DATA].double(), targets[:NUM_DATA]
losses = {stage: digits.loss_fn(net(data[0]), data[1]).item() for stage, net in networks.items()}
print("mean loss on the data analysed below, in nat:")
print({stage: round(loss, 4) for stage, loss in losses.items()})

# %% [markdown]
# ## The Fisher, captured once
#
# `fl.Fisher` runs the data through the network once and keeps, for each layer, just enough to contract later: never the matrix. The
# `plan` says what that is, how many bytes it takes and what a product costs, in units of one gradient evaluation on the same data.
#
# Each example brings nine rows of scores: ten classes, minus one because probabilities sum to one. So $F$ has
# at most nine times the number of examples in non-zero eigenvalues, however many parameters there are.

# %%
fishers = {}
for stage, network in networks.items():
    fishers[stage] = fl.Fisher(network, data, likelihood="categorical")
F = fishers["middle"]
print(F)
print(F.plan)

# %% [markdown]
# `F @ v` is the exact product. It answers in the form in which it is asked: a flat vector, a block of vectors, or a dict with a
# tensor for each parameter. Two properties that any Fisher must have make a first check: it is symmetric, and no direction has
# negative information.

# %%
generator = torch.Generator().manual_seed(0)
V = torch.randn(F.n_params, 16, generator=generator, dtype=F.dtype)
FV = F @ V
as_dict = F @ F.layout.unflatten(V[:, 0])
print(*(f"{name}: {tuple(tensor.shape)}" for name, tensor in as_dict.items()), sep="\n")

asymmetry = float((V.T @ FV - FV.T @ V).abs().max() / (V.T @ FV).abs().max())
smallest = float((V * FV).sum(0).min())
print(f"asymmetry {asymmetry:.1e}, smallest of 16 quadratic forms {smallest:.3g} nat")

# %% [markdown]
# ## How large is the information, and where does it sit?
#
# The trace of $F$ is the mean squared length of a score: how violently the predictions would answer to a nudge of the parameters.
# `fl.information` splits it over the layers. Watch how it grows while the network is learning, when predictions are sharp enough to be
# moved and not yet sure, and falls again once the network is certain of its answers. And watch who holds it: the two dense layers are
# closest to the output, and they have most of the parameters too.

# %%
by_stage = [fl.information(fisher) for fisher in fishers.values()]
stage = xr.Variable("stage", list(fishers))
information = xr.concat(by_stage, dim=stage, combine_attrs="drop_conflicts")
fl.plot.information(information)

print("trace of F, in nat:", {stage: round(F.trace(), 3) for stage, F in fishers.items()})
information["share"].to_pandas().round(3)

# %% [markdown]
# ## What does the spectrum look like?
#
# The Gram matrix $UU^\top/N$ of the scores has the same non-zero eigenvalues as $F$ and is smaller here, so `fl.spectrum` gives
# all of them exactly, nothing estimated. Both axes are logarithmic. A few stiff directions carry most of the information, and the
# rest falls away over many powers of ten: the data know a few things about this network very well, and most things hardly at all. That
# decay is why a natural-gradient step needs a damping $\lambda$, and why the choice of $\lambda$ matters so much.
#
# The curves of single layers end early where the layer has few parameters: the first convolution has only 80.

# %%
spectra = fl.spectrum(F, by="layer")
fl.plot.spectrum(spectra)

whole = spectra.sel(layer="all")
eigenvalues = whole["eigenvalue"].values
held = eigenvalues.cumsum() / eigenvalues.sum()
above = int(whole["num_above_noise"])
print(f"{above} eigenvalues above the noise floor; rank at most {F.rank_bound} of {F.n_params}")
print(f"the largest 10 hold {held[9]:.0%} of the trace, the largest 100 hold {held[99]:.0%}")

# %% [markdown]
# The effective dimension counts the directions that stand out above a damping. Read it as the number of parameters that the data
# can really set when $\lambda$ holds the others in place.

# %%
dampings = float(eigenvalues[0]) * np.logspace(-8, 0, 9)
fl.effective_dimension(whole, dampings).to_series().round(1).rename_axis("damping [nat]")

# %% [markdown]
# ## Which layers are coupled?
#
# The coupling of two blocks is the size of the off-diagonal block $F_{ij}$ relative to the diagonal ones: 0 if the blocks know
# nothing of each other, and at most 1. Because a finite sample never gives exactly 0, `fl.coupling` also says what two
# *uncorrelated* blocks would show (the noise floor), and permutes the examples to ask whether the coupling beats chance. A dot marks pairs for which
# it does, after allowing for the number of pairs tested.
#
# The result here is plain. The layers are coupled far above chance, neighbours most of all. To call them independent, as most
# natural-gradient optimizers do, is an approximation, and not a small one.

# %%
layers = fl.coupling(F, "layer")
fl.plot.coupling(layers)

off_diagonal = ~np.eye(len(F.layout.layer_names), dtype=bool)
weakest = float(layers["coupling"].values[off_diagonal].min())
highest_floor = float(layers["noise_floor"].values[off_diagonal].max())
print(f"weakest coupling of layers {weakest:.2f}, highest noise floor {highest_floor:.2f}")

# %% [markdown]
# ## And inside a layer?
#
# CW-NGD goes further: it also cuts each layer into segments. This is its cut of the second convolution, where every block is
# the 3 × 3 kernel that leads from one input channel to one output channel. Blocks that touch differ in colour, which means nothing else.

# %%
segments = fl.partition(F, "cw-ngd")
fl.plot.partition(segments, layer="conv2")
print(segments)

# %% [markdown]
# Are these segments independent? `F.restrict` looks at one layer alone. The map below has the biases and all 128 kernels of that
# convolution in rows and columns, ordered by output channel, and the tick marks count those channels. If segments were independent, only
# the diagonal would be dark. The dark squares of eight by eight along it are the kernels that feed one output channel. Pale stripes are dead:
# kernels about which no example says anything, because their channel is silent behind the ReLU.

# %%
kernels = fl.coupling(F.restrict("conv2"), "cw-ngd", num_null=0)
ax = fl.plot.coupling(kernels)
for axis, ha, va in ((ax.xaxis, "center", "top"), (ax.yaxis, "right", "center")):
    axis.set_ticks(np.arange(16) * 8 + 3.5, range(16), rotation=0, fontsize=9, ha=ha, va=va)
ax.set_xlabel("kernels of conv2, by output channel; last the biases")
ax.set_ylabel("kernels of conv2, by output channel; last the biases")

labels = [label.rpartition("kernel ")[2] for label in kernels["block_i"].values[:128]]
channel = np.array([int(label.split(",")[0]) for label in labels])  # a kernel is "out,in"
values = kernels["coupling"].values[:128, :128]
same = (channel[:, None] == channel) & ~np.eye(128, dtype=bool)
other = channel[:, None] != channel
into_one, into_two = values[same].mean(), values[other].mean()
print(f"mean coupling of two kernels: {into_one:.2f} into one channel, {into_two:.2f} into two")

# %% [markdown]
# ## What does each segmentation keep?
#
# Coupling alone does not say what is lost. `fl.independence` takes each segmentation, drops all that it drops, and judges what
# remains, from the exact quantities:
#
# - **cosine**: does the block-wise natural gradient still point along the exact one?
# - **energy**: what share of $\lVert F\rVert^2$ lies inside the blocks? The mark shows what random blocks of the same sizes would hold;
#   large blocks hold much by size alone.
# - **decrease ratio**: how much of the best possible decrease of the quadratic model does the block-wise step reach?
# - **condition number**: how unevenly is the curvature treated? 1 is perfect.
#
# From layers down to single parameters each segmentation is finer than the one before, so it is cheaper and keeps less. In the
# panel of energies, look at the marks first. The four layers hold no more than random blocks of their sizes would, because so much of
# this matrix lies *between* layers; units and the segments of CW-NGD hold several times more than theirs, so they are cut along
# the grain. The damping is a thousandth of the largest eigenvalue.

# %%
damping = 1e-3 * float(eigenvalues[0])
schemes = ("layer", "unit", "cw-ngd", "diagonal")
independence = fl.independence(F, schemes, damping=damping)
fl.plot.independence_panels(independence)

columns = ["num_blocks", "natural_gradient_cosine", "decrease_ratio", "kl_divergence"]
independence[columns].sel(layer="all", drop=True).to_pandas().round(3)

# %% [markdown]
# ## Does the prediction come true?
#
# Everything so far was said about a quadratic model: along a step $\delta$ the loss should change by
# $g^\top\delta + \tfrac12\delta^\top F\delta$, and the predictions of the network should move by $\tfrac12\delta^\top F\delta$ in
# Kullback–Leibler divergence. Now we take the step and look. For each segmentation the
# direction is $-(\hat F + \lambda I)^{-1} g$, and the axis runs from no step to one and a half times the step that the model calls best.
#
# Solid is what happens, dashed is what was predicted. For short steps they must agree, because this is what $F$ *means*. For long
# steps the better the direction, the further it goes and the earlier the model is left behind, which is why natural-gradient methods need a
# trust region, or more damping, or smaller steps than the model asks for. Single parameters as blocks, at the other end,
# buy hardly more than the plain gradient does.


# %%
def moved(step):
    """Change of the loss and divergence of the predictions after a step in parameters."""
    other = copy.deepcopy(networks["middle"])
    flat = torch.nn.utils.parameters_to_vector(other.parameters())
    torch.nn.utils.vector_to_parameters(flat + step, other.parameters())
    with torch.no_grad():
        before = networks["middle"](data[0]).log_softmax(1)
        after = other(data[0]).log_softmax(1)
    divergence = (before.exp() * (before - after)).sum(1).mean()
    return float(digits.loss_fn(after, data[1])) - losses["middle"], float(divergence)


def predicted(step):
    """The same two numbers from the gradient and F alone."""
    divergence = float(step @ (F @ step)) / 2
    return float(g @ step) + divergence, divergence


g = F.gradient()
directions = {"exact natural gradient": F.solve(g, damping)}
for scheme in schemes:
    directions[f"{scheme} blocks"] = fl.BlockDiagonal(F, scheme).solve(g, damping)
directions["plain gradient"] = g
for name, d in directions.items():  # in the damped quadratic model, 1 is the best length
    directions[name] = -d * (g @ d) / (d @ (F @ d) + damping * (d @ d))

lengths = np.linspace(0, 1.5, 16)
figure, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
for name, step in directions.items():
    look = {"color": "black", "marker": "."} if name == "plain gradient" else {}
    real, model = zip(*[(moved(a * step)[0], predicted(a * step)[0]) for a in lengths], strict=True)
    (line,) = ax.plot(lengths, real, label=name, **look)
    ax.plot(lengths, model, "--", color=line.get_color())
ax.axhline(0, color="0.6", linewidth=0.8)
deepest = predicted(directions["exact natural gradient"])[0]
ax.set_ylim(1.1 * deepest, 0.15 * losses["middle"])
ax.set_xlabel("step length / best length in the quadratic model")
ax.set_ylabel("change of the loss [nat]")
ax.set_title("solid: what happens, dashed: what was predicted", loc="left", fontsize=10)
_ = ax.legend(fontsize=9)
# %% [markdown]
# In numbers: first a full step, then a fiftieth of it, where measured over predicted should be close to 1 for the loss and for
# the divergence. That is what it means that the Fisher told the truth about the network.

# %%
steps = pd.DataFrame(index=pd.Index(directions, name="direction"))
steps["full step, predicted"] = [predicted(step)[0] for step in directions.values()]
steps["full step, measured"] = [moved(step)[0] for step in directions.values()]
short = [(moved(step / 50), predicted(step / 50)) for step in directions.values()]
steps["short step, loss"] = [real[0] / model[0] for real, model in short]
steps["short step, divergence"] = [real[1] / model[1] for real, model in short]
steps.round(3)

# %% [markdown]
# ## Keep it
#
# Every result is an `xarray.Dataset` with named axes, units and the settings that made it. `fl.save` writes it whole or
# not at all, and `fl.load` gives back the same numbers and names.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "first_look.nc"
    fl.save(independence, path)
    again = fl.load(path)
print("identical:", again.identical(independence))
print({name: again.attrs[name] for name in ("kind", "n_data", "fisherlens_version")})

# %% [markdown]
# ## What we learnt, as checks
#
# Each line below is a claim of this page. If one of them stops being true, this cell fails.

# %%
# CW-NGD got further in as many steps, whatever the seed.
end_loss = training["train_loss"].isel(step=-1)
assert (end_loss.sel(optimizer="CW-NGD") < end_loss.sel(optimizer="SGD, momentum 0.9")).all()

# F is symmetric and positive, and its spectrum is complete: it adds up to the trace.
assert asymmetry < 1e-12
assert smallest > 0
assert np.isclose(eigenvalues.sum(), F.trace(), rtol=1e-10)
assert above <= F.rank_bound < F.n_params

# Information peaks while the network learns, and the dense layers hold most of it.
assert F.trace() > max(fishers["start"].trace(), fishers["end"].trace())
assert (information["share"].sel(layer=["hidden", "output"]).sum("layer") > 0.5).all()

# All layers are coupled, far above the noise floor and significantly; so are kernels of one channel.
assert weakest > 3 * highest_floor
assert (layers["p_adjusted"].values[off_diagonal] < 0.05).all()
assert into_one > into_two

# Finer blocks hold less of F, and their steps reach less.
kept = independence.sel(layer="all")
assert (np.diff(kept["energy_captured"]) < 0).all()
assert (np.diff(kept["decrease_ratio"]) < 0).all()

# Short steps change the loss and the predictions as F says.
assert np.allclose(steps["short step, loss"], 1, atol=0.15)
assert np.allclose(steps["short step, divergence"], 1, atol=0.35)

# What was saved came back, and the networks were left alone.
assert again.identical(independence)
assert all(p.grad is None for network in networks.values() for p in network.parameters())
