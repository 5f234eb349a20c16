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
# # Which blocks are independent?
#
# The natural gradient needs the inverse of a matrix with as many rows as the network has parameters. Nobody inverts that. Component-wise natural gradient descent
# (CW-NGD, arXiv 2210.05268) cuts every layer into small segments, *takes the segments for independent*, and inverts each by itself. Other methods cut elsewhere.
# **Which cuts go through joints, and which through bones?**
#
# We look at the segments of one convolution and one dense layer, say what independence would mean and how chance imitates it, measure it on a network
# before and after training, and at last ask what the cuts cost. It takes less than a minute on two cores.

# %%
import copy
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import fisherlens as fl

torch.set_num_threads(1)  # small matrices: on a busy machine more threads only wait for each other
SMOKE = os.environ.get("FISHERLENS_SMOKE") == "1"  # less data, fewer permutations
NUM_DATA, NUM_NULL, NUM_EPOCHS = (30, 99, 3) if SMOKE else (100, 199, 10)
LAYERS = ("conv2",) if SMOKE else ("conv2", "hidden")
DAMPINGS = [1e-2] if SMOKE else [1e-3, 1e-2, 1e-1, 1.0]

digits = fl.problem("digits-cnn")
inputs, targets = digits.train
BATCH = 128
start, end = 0, NUM_EPOCHS * -(-len(inputs) // BATCH)
networks = {}


def keep(step, model, optimizer):
    if step in (start, end):
        networks["start" if step == start else "end"] = copy.deepcopy(model).double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


fl.train(digits.model(seed=0), digits, sgd, num_steps=end, batch_size=BATCH, callbacks=[keep])
data = inputs[:NUM_DATA].double(), targets[:NUM_DATA]
fishers = {stage: fl.Fisher(network, data, likelihood="categorical") for stage, network in networks.items()}
F = fishers["end"]
print("mean loss in nat:", {s: round(digits.loss_fn(n(data[0]), data[1]).item(), 3) for s, n in networks.items()})
print(F.layout)

# %% [markdown]
# ## What a segment is
#
# The weight of the second convolution is a matrix of small pictures: 16 output channels by 8 input channels, each cell a kernel of 3 × 3 numbers. CW-NGD makes
# every kernel a segment, and all biases of the layer one more. The dense layer behind it reads 16 maps of 4 × 4 pixels; there a segment is what one
# unit reads from one map, 16 numbers. Below, a colour ends where a segment ends and means nothing else.
#
# Units are the coarser cut: a whole row, with its bias, as in the unit-wise Fisher of Kurita (1993).

# %%
figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
for row, layer in zip(axes, ("conv2", "hidden"), strict=True):
    for ax, scheme in zip(row, ("cw-ngd", "unit"), strict=True):
        cut = fl.partition(F, scheme)
        fl.plot.partition(cut, ax, layer=layer, max_outputs=4, max_inputs=64, squares=True)

schemes = ("layer", "unit", "cw-ngd", "mbf", "diagonal")
cuts = {scheme: fl.partition(F, scheme) for scheme in schemes}
pd.DataFrame(
    {
        scheme: {
            "blocks": cut.num_blocks,
            "largest block": cut.largest_block,
            "numbers to store": cut.storage_entries,
            "operations to factor": f"{cut.solve_flops:.2g}",
        }
        for scheme, cut in cuts.items()
    }
).transpose()
# %% [markdown]
# From layers to CW-NGD's segments the cost of factoring falls by nearly five powers of ten. That is the attraction. (`mbf` takes the same kernels, but cuts dense layers by *input*.)
#
# ## What "independent" means
#
# $F$ is the covariance of the score, the gradient of $\log p$ (its mean is zero, when labels are the network's own). A block-diagonal matrix claims that for two different
# blocks $F_{ij} = 0$: **their scores are uncorrelated**. How far that is from true is measured by
# $\rho_{ij} = \lVert F_{ij}\rVert / \sqrt{\lVert F_{ii}\rVert\lVert F_{jj}\rVert}$, between 0 and 1.
#
# Before we use it on a network, a case in which we know the truth. The score of a linear model with one Gaussian output is the error times the input. With weights of zero and labels
# that are all -1 the error is 1 everywhere, and the score *is* the input, so we can make blocks as we please (`kind="empirical"` takes the labels as they are): ten inputs and ten others that are *unrelated*; that have a *planted* correlation of 0.3, for which $\rho = 0.3$; or that are
# uncorrelated, but share a random *length*: in examples where one block is large, so is the other.

# %%
generator = torch.Generator().manual_seed(0)


def made(case, num):
    """Twenty inputs in two blocks of ten, and what F says of them."""
    x, y = torch.randn(2, num, 10, generator=generator, dtype=torch.float64)
    if case == "planted":
        y = 0.3 * x + (1 - 0.3**2) ** 0.5 * y
    if case == "shared length":
        length = torch.randn(num, 1, generator=generator, dtype=torch.float64).exp()
        x, y = x * length, y * length
    model = torch.nn.Linear(20, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    given = torch.cat([x, y], 1), -torch.ones(num, 1, dtype=torch.float64)
    return fl.Fisher(model, given, likelihood="gaussian", kind="empirical")


halves = {"first ten": torch.arange(10), "last ten": torch.arange(10, 20)}
numbers = [50, 100, 200, 400, 800, 1600, 3200]
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
rho = {}
for case, colour in (("unrelated", "C0"), ("planted", "C1")):
    found = [fl.coupling(made(case, num), halves, num_null=0).isel(block_i=0, block_j=1) for num in numbers]
    rho[case] = np.array([float(one["coupling"]) for one in found])
    ax.loglog(numbers, rho[case], "o-", color=colour, label=case)
    if case == "unrelated":
        floor = np.array([float(one["noise_floor"]) for one in found])
        ax.loglog(numbers, floor, "--", color="0.4", label="noise floor, predicted")
ax.axhline(0.3, color="C1", linewidth=1, linestyle=":", label="what was planted")
ax.set_xlabel("examples N")
ax.set_ylabel("coupling")
_ = ax.legend(fontsize=9)

# %% [markdown]
# Unrelated blocks do *not* have coupling 0. A finite sample couples everything, by an amount that falls as $1/\sqrt{N}$ and that can be computed from the blocks alone: the
# **noise floor**, which stands beside every coupling. The planted correlation stays, and is found at its size as soon as it is above the floor.
#
# The third case needs another instrument. `fl.dependence` asks whether *anything* about one block's score tells about the other's: the distance correlation, 0 on average for
# independent blocks and 1 at most. That is more than a block-diagonal matrix needs, and it is what the word "independent" says. Both come with the p-value of a test that
# permutes the examples of one block.

# %%
known = {}
for case in ("unrelated", "planted", "shared length"):
    one = made(case, 150)
    pair = {"block_i": 0, "block_j": 1}
    linear = fl.coupling(one, halves, num_null=NUM_NULL).isel(pair)
    any_kind = fl.dependence(one, halves, num_null=NUM_NULL).isel(pair)
    known[case] = {
        "coupling": float(linear["coupling"]),
        "noise floor": float(linear["noise_floor"]),
        "p": float(linear["p_value"]),
        "dependence": float(any_kind["dependence"]),
        "p of dependence": float(any_kind["p_value"]),
    }
pd.DataFrame(known).T.round(3)

# %% [markdown]
# ## Layers
#
# Now the network. Every cell is a pair of layers; a dot marks pairs that stand out from what permuted examples give.

# %%
layers = {stage: fl.coupling(fisher, "layer", num_null=NUM_NULL) for stage, fisher in fishers.items()}


def side_by_side(width, height, rows=1):
    """A figure with a part for each stage, and the Axes of each part."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    parts = figure.subfigures(1, len(fishers))
    for part, stage in zip(parts, fishers, strict=True):
        part.suptitle(f"{stage} of training", fontweight="bold")
    return {stage: part.subplots(rows) for stage, part in zip(fishers, parts, strict=True)}


for stage, ax in side_by_side(11.5, 4.8).items():
    fl.plot.coupling(layers[stage], ax)

depends = {}
for stage, fisher in fishers.items():
    for what, normalise in (("scores as they are", None), ("lengths taken out", "outputs")):
        one = fl.dependence(fisher, "layer", num_null=0, normalise=normalise)["dependence"].values
        depends[f"{stage}, {what}"] = one[np.triu_indices(len(one), 1)]
names = F.layout.layer_names
pairs = [f"{a}–{b}" for i, a in enumerate(names) for b in names[i + 1 :]]
pd.DataFrame(depends, index=pairs).T.round(2)

# %% [markdown]
# No two layers of this network are independent, neither before nor after training: all couplings are several times their floor. Neighbours are coupled most, as
# the score of a layer is made from the activations of the layer before it and the errors of the layer behind it.
#
# The table shows dependence, and training seems to raise it. That is the trap of the third case: all layers share the *length* of the error at the output, which after training is
# very uneven (most digits are certain, a few are not). `normalise="outputs"` divides it out. What is left is about what it was at the start, where predictions are all alike and there is no
# such length to take out; and it is far from nothing.
#
# ## Inside a kernel and between kernels
#
# CW-NGD's claim is finer: kernels of one layer are independent of each other, the nine weights of one kernel are not. Below, all segments of the second convolution
# after training (16 × 8 kernels, row-major, and the biases; those that tell nothing, because a ReLU before or behind them is never on, are left out). Then the places in the kernel:
# how the blocks of all weights at one place are coupled, and in the middle the mean correlation of the nine weights of a single kernel with each other. The last panel is about the output
# map: contributions of different positions to one score are coupled as well, which KFAC leaves out.

# %%
kernels = fl.coupling(F.restrict("conv2"), "cw-ngd", num_null=0)
alive = np.flatnonzero(kernels["block_norm"].values > 0)
print(f"{len(alive)} of {kernels.sizes['block_i']} segments tell something")
figure, ax = plt.subplots(figsize=(7.4, 6), layout="constrained")
fl.plot.coupling(kernels.isel(block_i=alive, block_j=alive), ax, below="above floor")
_ = fl.plot.spatial_coupling(fl.spatial_coupling(F, "conv2", max_positions=16))

# %% [markdown]
# Blocks of different size cannot be compared by eye, so let us ask the same of *single weights*, where the coupling is nothing but the absolute correlation: how strongly are two
# weights of one segment correlated, two of different segments in one unit, two that only read from the same source, and two that have neither in common? All pairs of weights of
# both layers, as root mean square, and what chance would give ($1/\sqrt{NR}$ with $R$ score columns).

# %%
relations = ("same segment", "same unit", "same source", "neither")


def relation_of_weights(fisher, layer):
    """Root mean square correlation of two weights of a layer, by what they have in common."""
    own = fisher.restrict(layer)
    ids = {scheme: fl.partition(own, scheme).block_of.numpy() for scheme in ("cw-ngd", "unit", "channel")}
    weights = ids["channel"] != ids["channel"][-1]  # the biases are the last block
    squared = fl.coupling(own, "diagonal", num_null=0, max_blocks=own.n_params)["coupling"].values ** 2
    informed = np.diagonal(squared) > 0
    use = np.flatnonzero(weights & informed)
    squared = squared[np.ix_(use, use)]
    same = {scheme: number[use][:, None] == number[use] for scheme, number in ids.items()}
    masks = {
        "same segment": same["cw-ngd"] & ~np.eye(len(use), dtype=bool),
        "same unit": same["unit"] & ~same["cw-ngd"],
        "same source": same["channel"] & ~same["cw-ngd"],
        "neither": ~(same["unit"] | same["channel"]),
    }
    return {name: squared[mask].mean() ** 0.5 for name, mask in masks.items()} | {"chance": own.n_rows**-0.5}


related = pd.DataFrame(
    {(stage, layer): relation_of_weights(fisher, layer) for stage, fisher in fishers.items() for layer in LAYERS}
).T
figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
width = 0.2
for k, name in enumerate(relations):
    ax.bar(np.arange(len(related)) + (k - 1.5) * width, related[name], width, label=name)
at = np.arange(len(related))
ax.hlines(related["chance"], at - 2 * width, at + 2 * width, color="k", label="chance")
ax.set_ylim(0, 1.25 * related.to_numpy().max())
ax.set_xticks(np.arange(len(related)), [f"{layer}, {stage}" for stage, layer in related.index])
ax.set_ylabel("correlation of two weights (rms)")
ax.legend(fontsize=9, ncols=5)
related.round(3)

# %% [markdown]
# Kernels are not joints. Two weights of one kernel are the most correlated, as CW-NGD says. But two weights of *different* kernels of one unit are nearly as
# correlated: they meet the same error at the output of that unit, pixel by pixel, and their inputs are maps of one image. The step that is there is the border of the *unit*, before training. After
# training even weights of the convolution that have nothing in common are correlated eight times as much as chance: few examples still have an error, and they move everything together.
#
# ## What it costs to cut
#
# Correlations that are dropped need not matter: their effect on a *step* is what counts. `fl.independence` compares the block-wise natural gradient
# $p_b = (F_b + \lambda)^{-1} g$ with the true one:
#
# - **energy**: the share of $\lVert F\rVert^2$ inside the blocks, beside what *random* blocks of the same sizes would hold on average;
# - **decrease ratio**: of the decrease that the best step achieves in the quadratic model, the share that the best step along $-p_b$ still achieves;
# - **condition number** $\kappa$: how unevenly the preconditioner treats directions; about $\kappa/2$ steps do what one exact step would.
#
# To be fair to CW-NGD we set its segments against a control: blocks of *exactly* the same sizes in the same layers, filled at random.


# %%
def shuffled(fisher, scheme, seed):
    """The blocks of a scheme, of the same sizes in the same layers, filled at random."""
    cut, order = fl.partition(fisher, scheme), torch.Generator().manual_seed(seed)
    filled = {}
    for info in fisher.layout.layers:
        own = cut.restrict(info.name)
        mixed = own.flat[torch.randperm(info.size, generator=order)]
        filled |= dict(zip(own.labels, mixed.split(own.sizes.tolist()), strict=True))
    return fl.partition(fisher, filled)


judged = {}
for stage, fisher in fishers.items():
    control = shuffled(fisher, "cw-ngd", seed=0)
    found = fl.independence(fisher, [*schemes, control], damping=DAMPINGS)
    judged[stage] = found.assign_coords(partition=[*schemes, "cw-ngd, shuffled"])

for stage, ax in side_by_side(13, 4.6).items():
    fl.plot.independence(judged[stage].isel(damping=0), ax, variable="energy_captured")

# %% [markdown]
# Read the bars within a layer first. In every layer CW-NGD's segments hold more than random blocks of their sizes (the black marks; the shuffled control agrees with them): about
# twice to four times as much in the two large layers. So the content of a segment matters, and not only its size. Units hold much more than that, at a higher price.
#
# The group "all" has a surprise: layers hold *less* than random blocks of the same sizes would. The dense layer owns three quarters of the parameters, but the convolutions most of the
# information, and the couplings between the two are strong. Cutting between layers is a cut through bones, too.

# %%
for stage, column in side_by_side(12, 7.6, rows=2).items():
    for ax, variable in zip(column, ("decrease_ratio", "condition_number"), strict=True):
        fl.plot.independence(judged[stage], ax, variable=variable, over="damping", legend=variable == "decrease_ratio")

# %% [markdown]
# Three readings. **Damping hides everything**: the larger $\lambda$, the less the cut matters, because every step then is the gradient. **Before training** CW-NGD's segments stand between
# their control, which is no better than the diagonal, and the units. **After training** all cuts are worse by far, and at small dampings, where there is most to gain, the segments reach
# a tenth of what the exact step would and less.
#
# ## Beside other stand-ins
#
# KFAC and EKFAC keep whole layers, but only a Kronecker product of each. Their error has two parts, and so has that of `mbf` when all inputs of a dense layer share one
# matrix, as its authors do: the **couplings that were dropped** between blocks, and what is **wrong inside** the blocks. `fl.compare_approximations` splits the two.

# %%
LAMBDA = 1e-2
compared = {}
for stage, fisher in fishers.items():
    stand_ins = ["layer", fl.EKFAC, fl.KFAC, "unit", "cw-ngd", shuffled(fisher, "cw-ngd", seed=0)]
    stand_ins = {
        one if isinstance(one, str) else getattr(one, "__name__", "cw-ngd, shuffled"): one for one in stand_ins
    }
    stand_ins |= {"mbf shared": fl.BlockDiagonal(fisher, "mbf", shared=True), "diagonal": "diagonal"}
    compared[stage] = fl.compare_approximations(fisher, stand_ins, damping=LAMBDA)
for stage, (above, below) in side_by_side(12, 7.4, rows=2).items():
    fl.plot.approximations(compared[stage], {"error": above, "step": below})

# %% [markdown]
# Two lessons. First, an error that is small does not make a step that is good. After training the Kronecker products are *nearer* to $F$ than CW-NGD's segments, which drop nine tenths of
# $\lVert F\rVert^2$, and yet their steps are worse at this damping: the Frobenius norm is ruled by the few stiff directions, the step by the many soft ones, through the inverse.
# Second, all that keep to layers pay the same toll for the couplings between layers, and even for KFAC that is more than what it gets wrong inside.
#
# ## The conclusion, in numbers

# %%
rows = {}
for stage, found in compared.items():
    whole = found.sel(layer="all")
    for name in ("layer", "unit", "cw-ngd", "cw-ngd, shuffled", "diagonal"):
        one = whole.sel(approximation=name)
        rows[stage, name] = {
            "energy": float(one["energy_captured"]),
            "of random blocks": float(one["energy_noise_floor"]),
            "decrease ratio": float(one["decrease_ratio"]),
            "condition number": float(one["condition_number"]),
            "κ/2: steps per factor e": float(one["condition_number"]) / 2,
            "divergence [nat]": float(one["kl_divergence"]),
            "MB stored": float(one["storage_bytes"]) / 1e6,
        }
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# - **Are the segments independent?** No. Between kernels of one unit, weights are nearly as correlated as inside a kernel; between units less, between layers again strongly.
#   No pair of layers comes near its noise floor.
# - **Are they a good choice of their size?** Yes. Random blocks of the same sizes are worth no more than the diagonal; CW-NGD's reach more of the step, before training clearly so,
#   after training by a little.
# - **When?** At the start most, where segments reach half of the exact step at this damping. After training couplings are stronger and the damping matters more than the cut.
# - **What would help?** Units: the largest single improvement among the cuts, for three to four times the memory. And layers are no end of it: they are coupled among each other.
#
# This is one small network, one seed, and some hundred examples; with fewer examples than parameters $F$ has a large null space, in which every cut is equally right. The quadratic model is not the
# training. What these numbers cannot say is whether a better step trains better: `fl.compare_optimizers` asks that.
#
# ## What we learnt, as checks

# %%
# The coupling finds what was planted, at its size, and unrelated blocks lie at the predicted floor.
assert abs(rho["planted"][-1] - 0.3) < 0.05
assert np.allclose(rho["unrelated"], floor, rtol=0.35)

# A shared length is invisible to the coupling and plain to the dependence.
assert known["shared length"]["dependence"] > 4 * abs(known["unrelated"]["dependence"])
assert known["shared length"]["p of dependence"] <= 0.01

# No two layers are independent, at no stage.
for found in layers.values():
    apart = ~np.eye(found.sizes["block_i"], dtype=bool)
    assert (found["coupling"].values > 2 * found["noise_floor"].values)[apart].all()

# Weights of one segment are the most correlated; weights of different kernels of one unit far above chance.
assert (related["same segment"] >= related["same unit"]).all()
assert (related["same unit"] > 3 * related["chance"]).all()

finer = ["layer", "unit", "diagonal"]  # each refines the one before
for found in judged.values():
    # Refining a partition loses energy and adds divergence.
    assert (found["energy_captured"].sel(partition=finer).diff("partition") <= 1e-9).all()
    assert (found["kl_divergence"].sel(partition=finer).diff("partition") >= -1e-9).all()
    # No eigenvalue exceeds the number of blocks, and Kantorovich ties the decrease to the condition number.
    assert (found["mu_max"] <= found["num_blocks"] * 1.02).all()
    kappa = found["condition_number"]
    assert (found["decrease_ratio"] >= 0.95 * 4 * kappa / (1 + kappa) ** 2).all()
    # Segments hold more than random blocks of their sizes.
    segments = found.sel(partition="cw-ngd", layer=["conv1", "conv2", "hidden", "output"])
    assert (segments["energy_captured"] > segments["energy_noise_floor"]).all()

for found in compared.values():
    # The two errors add up, and EKFAC is the best diagonal in KFAC's bases.
    total = found["dropped_coupling"] + found["within_block_error"]
    assert np.allclose(found["relative_error"] ** 2, total)
    within = found["within_block_error"].sel(layer="all")
    assert within.sel(approximation="EKFAC") <= within.sel(approximation="KFAC")
    # The content of a segment matters, not only its size.
    energy = found["energy_captured"].sel(layer="all")
    assert energy.sel(approximation="cw-ngd") > energy.sel(approximation="cw-ngd, shuffled")
