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
# # Reading a spectrum
#
# A network with five thousand parameters has a Fisher matrix with five thousand eigenvalues. **What does a picture of them say about
# the network, and which part of that picture can be trusted?**
#
# We start with a single eigenvalue and check, by taking a step, that it means what the theory says. Then we read the whole spectrum: where it ends,
# what stands out at the top, who owns it, how it moves while the network learns. At the end we do without the exact answer, as one must for
# large networks, and ask of every estimate how wrong it is. It takes less than a minute on two cores.

# %%
import copy
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import xarray as xr

import fisherlens as fl

torch.set_num_threads(1)  # small matrices: on a busy machine more threads only wait for each other
SMOKE = os.environ.get("FISHERLENS_SMOKE") == "1"  # less data, fewer probes
NUM_DATA, NUM_PROBES, NUM_MATVECS = (60, 4, 30) if SMOKE else (150, 10, 60)

# %% [markdown]
# ## The subject
#
# A small convolutional network that reads handwritten digits, at three points of its training: before the first step, after one pass over the
# training data, and at the end. Copies are kept in double precision; we shall see why.

# %%
digits = fl.problem("digits-cnn")
inputs, targets = digits.train
NUM_CLASSES = int(targets.max()) + 1
BATCH = 128
EPOCH = -(-len(inputs) // BATCH)
stages = {"init": 0, "one epoch": EPOCH, "end": 10 * EPOCH}
networks = {}


def keep(step, model, optimizer):
    for stage, wanted in stages.items():
        if step == wanted:
            networks[stage] = copy.deepcopy(model).double()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


fl.train(digits.model(seed=0), digits, sgd, num_steps=stages["end"], batch_size=BATCH, callbacks=[keep])
data = inputs[:NUM_DATA].double(), targets[:NUM_DATA]
losses = {stage: round(digits.loss_fn(network(data[0]), data[1]).item(), 3) for stage, network in networks.items()}
print("mean loss on the data analysed below, in nat:", losses)

# %% [markdown]
# ## What an eigenvalue means
#
# $F$ measures how far the *predictions* move when the parameters do: for a small step $\delta$ the mean Kullback–Leibler divergence between
# the predictions before and after is $\tfrac12\,\delta^\top F\,\delta$. Along an eigenvector $v$ with eigenvalue $\lambda$, a step of length
# $\varepsilon$ therefore costs $\tfrac12\,\varepsilon^2\lambda$ nat. **An eigenvalue is a stiffness**: where it is large, a tiny step changes what the
# network says; where it is zero, the parameters can move and nobody notices.
#
# That is a claim about the network and not only about a matrix, so let us test it on the network. Below, steps of a few lengths along the
# stiffest direction, along two softer ones, and along one that $F$ calls flat (a random direction from which all eigenvectors have been removed).

# %%
F = fl.Fisher(networks["init"], data, likelihood="categorical")
spectrum = fl.spectrum(F, vectors=True)
eigenvalues = spectrum["eigenvalue"].values
above = int(spectrum["num_above_noise"])
vectors = torch.from_numpy(spectrum["eigenvector"].values[:above])

flat = torch.randn(F.n_params, generator=torch.Generator().manual_seed(0), dtype=F.dtype)
for _ in range(2):  # twice, against rounding
    flat -= vectors.T @ (vectors @ flat)
flat /= flat.norm()


def divergence(network, step):
    """Mean KL divergence of the predictions after a step in parameters, in nat."""
    moved = copy.deepcopy(network)
    theta = torch.nn.utils.parameters_to_vector(moved.parameters())
    torch.nn.utils.vector_to_parameters(theta + step, moved.parameters())
    with torch.no_grad():
        before, after = network(data[0]).log_softmax(1), moved(data[0]).log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())


ranks = (0, NUM_CLASSES - 1, above // 4)
lengths = np.geomspace(1e-3, 1, 10)
figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
measured = {}
for rank in ranks:
    measured[rank] = np.array([divergence(networks["init"], length * vectors[rank]) for length in lengths])
    (line,) = ax.loglog(
        lengths, lengths**2 * eigenvalues[rank] / 2, label=f"rank {rank + 1}: λ = {eigenvalues[rank]:.2g} nat"
    )
    ax.loglog(lengths, measured[rank], "o", color=line.get_color())
measured["flat"] = np.array([divergence(networks["init"], length * flat) for length in lengths])
ax.loglog(lengths, np.abs(measured["flat"]), "x", color="0.5", label="no eigenvector: λ = 0")
ax.set_ylim(1e-19, None)
ax.set_xlabel("length of the step")
ax.set_ylabel("divergence of the predictions [nat]")
ax.set_title("lines: predicted by the eigenvalue; marks: measured on the network", loc="left", fontsize=10)
_ = ax.legend(fontsize=9)

# %% [markdown]
# The marks follow the lines while steps are short. The flat direction is flat to second order, as it must be; what it moves grows with the fourth
# power of the step and comes from the curvature of the network itself, of which no matrix of second order knows.
#
# ## How many eigenvalues are there?
#
# $F = U^\top U/N$ has one row of $U$ for every example and every class but one (probabilities sum to one, so one class says nothing new).
# Its rank is therefore at most $N(C-1)$, *however many parameters there are*. All others are exactly zero, which is no property of the network: it is how
# little can be learnt from $N$ examples. `fl.spectrum` decomposes the small matrix $UU^\top/N$, which has the same non-zero eigenvalues.
#
# The picture is called a scree plot, after the rubble at the foot of a cliff. Everything under the **noise floor**, $n\,\varepsilon\,\lambda_\mathrm{max}$,
# is rubble of another kind: the computer cannot tell it from zero. In single precision that floor would be nine powers of ten higher, hence the copies in double.

# %%
fl.plot.spectrum(spectrum)

single = fl.Fisher(copy.deepcopy(networks["init"]).float(), (data[0].float(), data[1]), likelihood="categorical")
rough = fl.spectrum(single)
print(f"parameters {F.n_params}, rank at most N(C-1) = {F.rank_bound}, above the floor {above}")
print(
    f"noise floor: {float(spectrum['noise_floor']):.1e} nat in double, {float(rough['noise_floor']):.1e} nat in single precision"
)
print(f"eigenvalues above it: {above} in double, {int(rough['num_above_noise'])} in single precision")

# %% [markdown]
# ## Outliers and bulk
#
# On a ruler rather than on logarithmic paper, the spectrum falls into two parts. A handful of eigenvalues stands far above the rest, and their
# number is no accident: there are **$C-1$ of them**, one for every way to tell ten classes apart. Behind them comes the bulk, in which most eigenvalues
# and little of the trace live.
#
# The ratio of each eigenvalue to the next finds the cliff without a ruler. The pattern is sharp while the network treats all examples of a class alike, which an
# untrained one does; look for it again at the end of training below, where it is blurred.

# %%
outliers = NUM_CLASSES - 1
ratios = eigenvalues[: 3 * outliers] / eigenvalues[1 : 3 * outliers + 1]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.stem(np.arange(1, 31), eigenvalues[:30], basefmt=" ")
left.axvline(outliers + 0.5, color="0.6", linestyle="--")
left.set_xlabel("rank")
left.set_ylabel("eigenvalue [nat]")
left.set_title(f"{outliers} outliers, then the bulk", loc="left", fontsize=10)
right.bar(np.arange(1, len(ratios) + 1), ratios)
right.set_xlabel("rank k")
right.set_ylabel("eigenvalue k / eigenvalue k + 1")
right.set_title("the cliff", loc="left", fontsize=10)
share = eigenvalues[:outliers].sum() / F.trace()
print(f"largest ratio after rank {ratios.argmax() + 1}; these {outliers} eigenvalues hold {share:.0%} of the trace")

# %% [markdown]
# ## Whose eigenvalues are they?
#
# Every layer has a Fisher of its own, a diagonal block of the whole one. The black curve is the whole network; it is not the union of the others,
# since layers are coupled. A layer's curve ends where its parameters do, or where the rank bound stops it, whichever comes first.

# %%
by_layer = fl.spectrum(F, by="layer")
fl.plot.spectrum(by_layer)
sizes = {layer.name: layer.size for layer in F.layout.layers}
table = by_layer[["trace", "num_above_noise"]].to_dataframe()
table["parameters"] = pd.Series({**sizes, "all": F.n_params})
table["largest [nat]"] = by_layer["eigenvalue"].isel(rank=0).to_series()
table.round(4)

# %% [markdown]
# ## How it moves during training
#
# Three curves, one network. While it learns, the leading eigenvalues grow by more than a power of ten: the predictions are now sharp enough to be
# moved. When it has learnt, the tail collapses, because examples that are certain of their label have nothing left to say.

# %%
fishers = {stage: fl.Fisher(network, data, likelihood="categorical") for stage, network in networks.items()}
over_time = [fl.spectrum(fisher) for fisher in fishers.values()]
joined = xr.concat(over_time, dim=xr.Variable("stage", list(fishers)), combine_attrs="drop_conflicts")
fl.plot.spectrum(joined)
cliff = {
    stage: round(float(one["eigenvalue"][outliers - 1] / one["eigenvalue"][outliers]), 1)
    for stage, one in zip(fishers, over_time, strict=True)
}
print(f"eigenvalue {outliers} over eigenvalue {outliers + 1}:", cliff)
print("trace of F, in nat:", {stage: round(fisher.trace(), 3) for stage, fisher in fishers.items()})

# %% [markdown]
# ## How many directions does the data determine?
#
# It depends on what "determine" is to mean. The effective dimension
# $d(\lambda) = \sum_i \lambda_i/(\lambda_i + \lambda)$ counts the eigenvalues above $\lambda$, softly. Read it against the question at hand: $\lambda$ is the damping of an
# optimizer, or $1/(N\sigma^2)$ for weights with a prior of variance $\sigma^2$. There is no plateau, so there is no single number of parameters that matter.

# %%
dampings = np.logspace(-8, 1, 28)
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for stage, one in zip(fishers, over_time, strict=True):
    ax.semilogx(dampings, fl.effective_dimension(one, dampings), label=stage)
ax.axhline(F.rank_bound, color="0.6", linestyle="--", linewidth=1, label="rank bound N(C - 1)")
ax.set_xlabel("damping λ [nat]")
ax.set_ylabel("effective dimension")
_ = ax.legend(fontsize=9)

# %% [markdown]
# ## Without the exact answer
#
# For a large network with many examples neither $F$ nor the Gram matrix fits, and products $Fv$ are all there is. Two tools work with products alone, and both
# say how far they can be trusted.
#
# **Lanczos** finds the leading eigenpairs. Its answer comes with a residual, $\lVert Fv - \lambda v\rVert$ recomputed from $F$: some true eigenvalue is no further away
# than that, and where eigenvalues are well apart it is closer still. The result turns this into a lower and an upper bound for each. These are bounds and not guesses.

# %%
G = fishers["one epoch"]
exact = over_time[1]["eigenvalue"].values
top = fl.top_eigenvalues(G, outliers + 3, vectors=True, method="lanczos")
leading = pd.DataFrame(
    {
        "exact": exact[: outliers + 3],
        "Lanczos": top["eigenvalue"],
        "error": np.abs(top["eigenvalue"] - exact[: outliers + 3]),
        "residual norm": top["residual_norm"],
        "bounds apart": top["upper"] - top["lower"],
    },
    index=pd.RangeIndex(1, outliers + 4, name="rank"),
)
print(f"{top.attrs['num_matvecs']} products, {float(top['eigenvalue'].sum() / G.trace()):.0%} of the trace")
leading.map("{:.3g}".format)

# %% [markdown]
# **Stochastic Lanczos quadrature** estimates the density of *all* eigenvalues from random probes. Every probe gives a density of its own, and their
# disagreement is the error band. Left, from products alone. Right, the same number of products with the leading eigenvectors that
# we just found taken out first (*deflated*): what is known exactly need not be estimated, and the probes attend to the rest.
#
# The zeros have no place on a logarithmic axis, so their share is a number in the legend. "Unresolved" is the share that so few products cannot tell
# from zero. (By itself `fl.spectral_density` would see that this problem is small and compute everything exactly; `deflate=None` forbids it.)

# %%
options = {"num_probes": NUM_PROBES, "num_matvecs": NUM_MATVECS, "progress": False}
densities = {
    "probes alone": fl.spectral_density(G, deflate=None, **options),
    "leading pairs deflated": fl.spectral_density(G, deflate=top, **options),
}
figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
for ax, (name, density) in zip(axes, densities.items(), strict=True):
    fl.plot.density(density, ax)
    ax.text(0.97, 0.93, name, transform=ax.transAxes, ha="right", fontsize=12)

# %% [markdown]
# A density turns into numbers by integration: the trace, $\lVert F\rVert^2$, the effective dimension, each with its standard error over probes. We know the
# truth here, so we can ask the only question that matters of an error bar: is the truth inside?

# %%
grid = np.logspace(-4, 0, 5) * exact[0]
truth = {"trace": G.trace(), "squared norm": float(np.square(exact).sum())}
truth |= {f"d(λ = {lam:.0e})": float(fl.effective_dimension(over_time[1], lam)) for lam in grid}


def estimates(density):
    """The same numbers with their standard errors from a density."""
    found = {"trace": (density["trace"], density["trace_sem"])}
    found["squared norm"] = (density["squared_norm"], density["squared_norm_sem"])
    dimension = fl.effective_dimension(density, grid)
    for at, lam in enumerate(grid):
        found[f"d(λ = {lam:.0e})"] = (dimension[at], dimension["sem"][at])
    return {name: (float(value), float(error)) for name, (value, error) in found.items()}


judged = pd.DataFrame({"exact": truth})
for name, density in densities.items():
    value, error = zip(*estimates(density).values(), strict=True)
    judged[name] = value
    judged[f"± ({name})"] = error
judged.map("{:.4g}".format)

# %% [markdown]
# ## Which Fisher?
#
# All of the above was the *exact* Fisher: the expectation over the labels that the network itself predicts. Much software replaces it by one sampled label per
# example (*mc*), or by the label in the data (*empirical*, which is not the Fisher at all). `fl.compare_kinds` asks whether that is good enough here.
#
# A distance needs something to be judged by. "Label noise" in the middle panel is the distance that labels drawn *from the model* would give, with as many draws. If the
# empirical matrix is no further away than that, the data are as good as the model's own labels; if it is, the network is wrong about its data, and the
# empirical matrix shows it.

# %%
kinds = {
    stage: fl.compare_kinds(networks[stage], data, likelihood="categorical", k=outliers, seed=(0, 1, 2))
    for stage in ("one epoch", "end")
}
fl.plot.kinds(kinds["one epoch"])
pair = {"kind_i": "exact", "kind_j": "empirical"}
rows = {}
for stage, one in kinds.items():
    rows[stage] = {
        "distance": float(one["distance"].sel(pair)),
        "label noise": float(one["sampling_noise"].sel(kind="empirical")),
        "overlap": float(one["overlap"].sel(pair)),
        "scale": float(one["scale"].sel(pair)),
        "cosine of natural gradients": float(one["natural_gradient_cosine"].sel(pair)),
    }
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# ## What can be trusted
#
# | number | where from | how wrong |
# |---|---|---|
# | rank bound, number of zeros | counting | exact |
# | trace, diagonal | sums over scores | exact, rounding only |
# | all eigenvalues | Gram matrix, where it fits the memory | noise floor $n\,\varepsilon\,\lambda_\mathrm{max}$ |
# | leading eigenvalues | Lanczos | lower and upper bound |
# | density, $\lVert F\rVert^2$, effective dimension | random probes | standard error over probes; none below three |
# | mc instead of exact | sampled labels | `sampling_noise`, and the spread over seeds |
# | empirical instead of exact | observed labels | a bias that no number of examples removes |
#
# One error is in none of these bars: $F$ belongs to *these* examples, and others would give another $F$.
#
# ## What we learnt, as checks

# %%
# An eigenvalue is a stiffness: short steps cost what it says, and flat directions cost nothing to second order.
for rank in ranks:
    predicted = lengths**2 * eigenvalues[rank] / 2
    assert np.allclose(measured[rank][:3], predicted[:3], rtol=0.1)
assert abs(measured["flat"][0]) < 1e-3 * measured[ranks[-1]][0]

# The spectrum is complete, and bounded by the number of examples.
assert np.isclose(eigenvalues.sum(), F.trace(), rtol=1e-10)
assert above <= F.rank_bound == NUM_DATA * outliers < F.n_params
assert rough["num_above_noise"] < above

# As many outliers as there are ways to tell the classes apart, before training and early in it.
assert ratios.argmax() + 1 == outliers
assert cliff["one epoch"] > 2 * cliff["end"]

# Lanczos kept its word: every error is inside its bound.
assert bool(top["converged"].all())
assert (top["lower"] <= leading["exact"].values).all()
assert (top["upper"] >= leading["exact"].values).all()

# So did the probes, and deflation sharpened them.
for name in densities:
    assert (np.abs(judged[name] - judged["exact"]) <= 5 * judged[f"± ({name})"] + 1e-9 * judged["exact"]).all(), name
better = judged["± (leading pairs deflated)"] < judged["± (probes alone)"]
assert better[["trace", "squared norm"]].all()

# The empirical Fisher is further from the exact one than labels of the model's own would be, after training most of all.
for one in rows.values():
    assert one["distance"] > one["label noise"]
