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
# # Products without the matrix
#
# A network with a million parameters has a Fisher matrix with $10^{12}$ entries. Nobody can store it, and nobody needs to. **How does one multiply
# with a matrix that was never written down, and which Fisher is it then: the exact one, a sampled one or the empirical one?**
#
# We start where the answer is known in closed form, look at the object behind every product, the score matrix $U$, and see what a
# product costs. Then the three kinds of Fisher stand side by side on handwritten digits, before and after training. At the end the product
# alone is enough to solve equations, to find eigenvalues, and to work through data that do not fit into memory.
#
# It takes well under a minute on two cores, and nothing is downloaded.

# %%
import copy
import itertools
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.sparse.linalg import eigsh
from torch.utils.data import DataLoader, TensorDataset

import fisherlens as fl
from fisherlens import reference

torch.set_num_threads(1)  # small matrices: on a busy machine more threads only wait for each other
SMOKE = os.environ.get("FISHERLENS_SMOKE") == "1"  # less data, fewer draws
NUM_DATA, MOST_DRAWS, SEEDS = (100, 256, 3) if SMOKE else (200, 1024, 4)
# told apart with any colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#4D4D4D"

generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %% [markdown]
# ## Where the answer is known
#
# Take a straight line through noisy points: outputs $Xw$, and labels with Gaussian noise of variance $\sigma^2$. Its Fisher is
#
# $$ F = \frac{X^\top X}{N \sigma^2} , $$
#
# so a product is $F v = X^\top (X v) / (N \sigma^2)$: two thin products, first to the examples and back again. The brackets are the whole trick:
# with $P$ parameters and $N$ examples $X^\top X$ has $P^2$ entries, the other way needs $2 N P$ multiplications and no new matrix at all.
#
# `fl.Fisher` is an operator. It has a shape and it multiplies, but there is no matrix inside.

# %%
X, y = randn(50, 6), randn(50, 1)
line = torch.nn.Linear(6, 1, bias=False).double()
F = fl.Fisher(line, (X, y), likelihood=fl.Gaussian(variance=0.25))
v = randn(6)

by_hand = X.T @ (X @ v) / (50 * 0.25)
error_line = float((F @ v - by_hand).abs().max() / by_hand.abs().max())
print(F)
print(f"relative difference to XᵀXv / (N σ²): {error_line:.0e}")

# %% [markdown]
# What does $F v$ *say*? If the parameters move a little way along $v$, the predictions move by $\frac12 v^\top F v$, measured as a Kullback–Leibler
# divergence in nats per example. The vector $F v$ is the force with which the data resist that move, one number per parameter.
#
# ## The score matrix
#
# A network is no straight line, but around its present parameters it has a matrix that plays the role of $X$. Row $(n, r)$ of the **score matrix** $U$
# is a gradient: how the parameters would have to change to make prediction $n$ answer in the $r$-th of the ways in which it can. Then
#
# $$ F = \frac{1}{N} U^\top U , \qquad F v = \frac{1}{N} U^\top (U v) . $$
#
# Here is one that is small enough to look at: 12 points in the plane, three classes, and a network of 27 parameters. Three probabilities that sum
# to one can move in two ways, so every point brings two rows.

# %%
points, classes = randn(12, 2), torch.arange(12) % 3
with torch.random.fork_rng():
    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
tiny = torch.nn.Sequential(*layers).double()
F = fl.Fisher(tiny, (points, classes), likelihood="categorical")
U = F.scores.rows_at(torch.arange(F.n_rows))  # written out for the picture only
matrices = {
    f"$U$: {U.shape[0]} score rows × {U.shape[1]} parameters": U,
    "$F = U^\\top U / N$": U.T @ U / F.n_data,
    "$K = U U^\\top / N$": U @ U.T / F.n_data,
}

figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.2), layout="constrained")
starts = [F.layout[name].start for name in F.layout.names] + [F.n_params]
for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
    limit = float(matrix.abs().quantile(0.97))  # a few large entries would leave the rest pale
    image = ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.8, extend="both")
    bar.set_ticks([-limit, 0, limit], labels=[f"−{limit:.2f}", "0", f"{limit:.2f}"])
    bar.set_label("√nat" if matrix is U else "nat")
for ax, along in ((axes[0], "x"), (axes[1], "x"), (axes[1], "y")):
    for start in starts[1:-1]:
        (ax.axvline if along == "x" else ax.axhline)(start - 0.5, color="0.4", linewidth=0.8)
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(starts)]
    look = {"fontsize": 8, "rotation": 30 if along == "x" else 0}
    getattr(ax, f"set_{along}ticks")(middles, F.layout.names, **look)
for ax, along in ((axes[0], "y"), (axes[2], "x"), (axes[2], "y")):
    getattr(ax, f"set_{along}ticks")(np.arange(0, 24, 4) + 0.5, range(0, 12, 2), fontsize=8)
    getattr(ax, f"set_{along}label")("example (two rows each)")

# %% [markdown]
# On the left, the first layer's weights take part of each row and the output layer's the rest. Every entry of $F$, in the middle, is the inner product
# of two columns of $U$: two parameters that move the same predictions in the same way. On the right is the other product of $U$ with itself,
# the Gram matrix: every entry compares two *examples*. $F$ and $K$ have the same non-zero eigenvalues, so one may work with whichever is smaller.
#
# A product needs neither. In a dense layer a row of $U$ is the outer product of what came into the layer and the score of what went out, so
# fisherlens keeps those two short vectors per example, once, and each product contracts them. For comparison `fisherlens.reference` builds the matrix
# slowly, straight from the definition.

# %%
slow = reference.fisher(tiny, (points, classes), "categorical")
V = randn(F.n_params, 5)
error_tiny = float((F @ V - slow @ V).norm() / (slow @ V).norm())
print(f"F @ V against the matrix: relative difference {error_tiny:.0e}")
print("v F v for each v:", *(f"{form:.3f}" for form in (V * (F @ V)).sum(0).tolist()))
print(f"rank at most {F.rank_bound} of {F.n_params}")

# %% [markdown]
# ## What is kept, and what a product costs
#
# Now a real, if small, network: two convolutions and two dense layers on handwritten digits. `F.plan` says for each layer what is kept.
# A dense layer keeps *factors*, the two short vectors. A convolution does its work at 64 positions per example, but an example has only 9 score rows:
# there it is cheaper to keep the rows of $U$ themselves. `product/gradient` is the work of one product in units of one gradient evaluation
# (forward and backward on the same data), counted in multiplications.

# %%
digits = fl.problem("digits-cnn")
cnn = digits.model(seed=0)
images, labels = (part[:512] for part in digits.train)
F = fl.Fisher(cnn, (images, labels), likelihood="categorical")
print(F.plan)

# %% [markdown]
# Counting is one thing, the clock another. A product with one vector must read everything that is kept, and that takes the time; a product with a
# *block* of vectors reads it once for all of them. So `F @ V` with $V$ of shape $(P, K)$ is much cheaper than $K$ products. The usual way to a
# product pushes the vector forward through the network and pulls the answer back, and does so again for the next vector.

# %%
parameters = {name: p.detach() for name, p in cnn.named_parameters()}


def outputs(values):
    return torch.func.functional_call(cnn, values, (images,))


def usual_recipe(vector):
    """J v forward, times the Fisher of the softmax outputs, then Jᵀ backward."""
    f, change = torch.func.jvp(outputs, (parameters,), (F.layout.unflatten(vector),))
    p = f.softmax(1)
    _, pull_back = torch.func.vjp(outputs, parameters)
    (answer,) = pull_back(p * (change - (p * change).sum(1, keepdim=True)) / len(images))
    return F.layout.flatten(answer)


def gradient():
    return torch.autograd.grad(digits.loss_fn(cnn(images), labels), list(cnn.parameters()))


def seconds(call, rounds=5):
    """The fastest of a few calls: other work on the machine can only make a call slower."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


V = torch.randn(F.n_params, 64, generator=generator)
sizes = [1, 2, 4, 8, 16, 32, 64]
unit = seconds(gradient)
blocks = [V[:, :size].contiguous() for size in sizes]
per_vector = [seconds(lambda block=block: F @ block) / block.shape[1] / unit for block in blocks]
recipe = seconds(lambda: usual_recipe(V[:, 0])) / unit
error_recipe = float((F @ V[:, 0] - usual_recipe(V[:, 0])).norm() / (F @ V[:, 0]).norm())

figure, ax = plt.subplots(figsize=(6.8, 4), layout="constrained")
ax.axhline(recipe, color=ORANGE, linestyle="--", label="usual recipe, forward and back")
ax.axhline(1, color=GREY, linewidth=0.9, label="one gradient evaluation")
ax.plot(sizes, per_vector, "o-", color=BLUE, label="F @ V")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(sizes, sizes)
ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
ax.minorticks_off()
ax.set_xlabel("vectors in the block, K")
ax.set_ylabel("time per vector / gradient evaluation")
ax.grid(axis="y", color="0.92")
_ = ax.legend(fontsize=9)
print(f"one gradient evaluation takes {unit * 1e3:.1f} ms")
print(f"the two ways differ by {error_recipe:.0e}, in single precision")

# %% [markdown]
# ## Three kinds, side by side
#
# A row of $U$ is a score, and a score needs a label. *Whose* label makes the kind:
#
# - `"exact"`: no label at all. The average over the labels that the network itself predicts is known in closed form.
# - `"mc"`: labels drawn from the network's predictions, `mc_samples` per example. This estimates the exact kind without bias. They are drawn
#   once and kept, so that the operator is one fixed matrix.
# - `"empirical"`: the labels in the data. Cheap and popular, but it is another matrix.
#
# We train a small dense network and compare the kinds at its start, while it learns and at its end. Below is the trace, the mean squared
# length of a score, with two empirical ones: with the labels as they are, and with the same labels in shuffled order.

# %%
digits = fl.problem("digits-mlp")
x, y = digits.train[0][:NUM_DATA].double(), digits.train[1][:NUM_DATA]
shuffled = y[torch.randperm(NUM_DATA, generator=generator)]
steps = [0, 1, 2, 3, 5, 9, 15, 26, 45, 78, 135, 232, 400]
networks = {}


def keep(step, model, optimizer):
    if step in steps:
        networks[step] = copy.deepcopy(model).double()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


fl.train(digits.model(seed=0), digits, adam, num_steps=steps[-1], batch_size=128, callbacks=[keep])


def fisher(step, kind="exact", targets=y, **options):
    data = (x, targets)
    return fl.Fisher(networks[step], data, likelihood="categorical", kind=kind, **options)


def kinds_at(step):
    return {
        "exact": fisher(step),
        "mc, 1 draw": fisher(step, "mc"),
        "mc, 16 draws": fisher(step, "mc", mc_samples=16),
        "empirical": fisher(step, "empirical"),
    }


rows = [{name: F.trace() for name, F in kinds_at(step).items()} for step in steps]
traces = pd.DataFrame(rows, index=pd.Index(steps, name="step"))
traces["shuffled labels"] = [fisher(step, "empirical", shuffled).trace() for step in steps]
losses = [digits.loss_fn(networks[step](x), y).item() for step in steps]

looks = {
    "exact": {"color": "black", "linewidth": 2.2},
    "mc, 1 draw": {"color": BLUE, "marker": "o", "ms": 8, "mfc": "none", "linestyle": ":"},
    "mc, 16 draws": {"color": BLUE, "marker": "s", "ms": 4},
    "empirical": {"color": ORANGE, "marker": "^", "ms": 5},
    "shuffled labels": {"color": ORANGE, "marker": "v", "ms": 5, "linestyle": "--"},
}
size = {"figsize": (7.5, 5.6), "layout": "constrained", "height_ratios": (3, 1)}
figure, (top, bottom) = plt.subplots(2, 1, sharex=True, **size)
for name, look in looks.items():
    label = "empirical, shuffled labels" if name == "shuffled labels" else name
    top.plot(steps, traces[name], label=label, **look)
top.set_yscale("log")
top.set_ylabel("trace [nat]")
top.legend(fontsize=9)
bottom.plot(steps, losses, color=GREY)
bottom.set_ylabel("loss [nat]")
bottom.set_xscale("symlog", linthresh=3, linscale=0.6)
bottom.set_xticks([0, 1, 10, 100, 400], [0, 1, 10, 100, 400])
bottom.set_xlabel("optimizer step")
traces.loc[[steps[0], 26, steps[-1]]].round(2)

# %% [markdown]
# Read it from left to right.
#
# - **At the start** all agree. The network knows nothing, so the labels of the data are as surprising to it as its own.
# - **While it learns** the empirical kind falls behind. It measures with labels that the network gets right more and more, so its scores shrink
#   with the error, and they do so faster than the exact ones. With a Gaussian likelihood it is zero at a perfect fit, where the
#   Fisher is as large as ever.
# - **With shuffled labels** it explodes instead, on the same network and the same images. The exact Fisher is a property of the network and its
#   inputs, and does not look at labels; the black line would be the same.
# - **Sampling** is right on average at every step, but look at the single draw at the end. A sure network hardly ever draws a label that is not
#   its first choice, so 200 draws meet few of those rare labels, each with a very long score: mostly too little, now and then far too much.
#
# The trace is one number. The next picture looks along single directions: the eigenvectors of the exact Fisher, from the one that the data fix best
# downwards. Each is asked how much information every kind sees along it, $v^\top F v$. The eigenvectors go in as one block.

# %%
shown = 60
figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained", sharey=True)
along = {}
for ax, step in zip(axes, (steps[0], steps[-1]), strict=True):
    F = fisher(step)
    eigen = fl.spectrum(F, vectors=True).isel(rank=slice(shown))
    V = torch.as_tensor(eigen["eigenvector"].transpose("param", "rank").values)
    forms = {name: (V * (A @ V)).sum(0) for name, A in kinds_at(step).items()}
    for name, form in forms.items():
        look = looks[name] | ({} if name == "exact" else {"linestyle": ""})
        ax.plot(np.arange(1, shown + 1), form, label=name, **look)
    ax.set_yscale("log")
    ax.set_title(f"step {step}: loss {losses[steps.index(step)]:.2f} nat", loc="left", fontsize=10)
    ax.set_xlabel("eigenvector of the exact Fisher")
    factors = {name: (form / forms["exact"]).log().abs() for name, form in forms.items()}
    along[f"step {step}"] = {name: factor.median().exp().item() for name, factor in factors.items()}
axes[0].set_ylabel("information along it, $v^\\top F v$ [nat]")
axes[0].legend(fontsize=9)
print("median factor by which a kind misses the exact information along one of these directions:")
along = pd.DataFrame(along)
along.round(2)

# %% [markdown]
# At the start both the single draw and the empirical kind use one label per example, and yet the empirical one is further off: the labels of
# the data go with the images, and drawn ones do not at that stage. At the end sixteen draws still follow the black line roughly. The single draw
# misses it just as the empirical kind does, and where the circles lie on the triangles for a simple reason: a network that is sure and right draws
# the labels that the data have. But one misses by chance and the other by nature: more examples or more draws would cure the first and not the second.

# %% [markdown]
# ## How many draws?
#
# The error of an average falls as one over the square root of the number of draws, $1/\sqrt S$: ten times closer for a hundred times the work.
# We check it on a network in the middle of learning, for products and quadratic forms with 16 random vectors, and fit the slope on log axes. It should be −½.
#
# Draws can be spread better than by throwing dice. `mc_sampling="stratified"` takes one from each of $S$ equal slices of the predicted distribution.
# It has the same average and a smaller error, and its slope is steeper.

# %%
step = 26
F = fisher(step)
V = randn(F.n_params, 16)
draws = 2 ** np.arange(0, int(np.log2(MOST_DRAWS)) + 1, 2)
truth = F @ V
forms = (V * truth).sum(0)
errors = {}
for sampling in ("independent", "stratified"):
    found = np.empty((2, len(draws), SEEDS))
    for i, number in enumerate(draws):
        for seed in range(SEEDS):
            A = fisher(step, "mc", mc_samples=int(number), mc_sampling=sampling, seed=seed)
            AV = A @ V
            of_products = ((AV - truth).norm(dim=0) / truth.norm(dim=0)).square().mean()
            of_forms = ((V * AV).sum(0) / forms - 1).square().mean()
            found[:, i, seed] = of_products, of_forms
    errors[sampling] = np.sqrt(found.mean(2))  # root mean square over seeds and vectors

slopes = {}
figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
for (sampling, what), look in {
    ("independent", "product"): {"color": BLUE, "marker": "o"},
    ("independent", "quadratic form"): {"color": BLUE, "marker": "s", "markerfacecolor": "white"},
    ("stratified", "product"): {"color": GREEN, "marker": "o"},
    ("stratified", "quadratic form"): {"color": GREEN, "marker": "s", "markerfacecolor": "white"},
}.items():
    values = errors[sampling][("product", "quadratic form").index(what)]
    # a single draw has no slices yet, so the fit starts at the second point
    slope, height = np.polyfit(np.log(draws[1:]), np.log(values[1:]), 1)
    slopes[sampling, what] = slope
    ax.plot(draws, values, linestyle="", label=f"{sampling}, {what}: slope −{-slope:.2f}", **look)
    ax.plot(
        draws[1:],
        np.exp(height) * draws[1:] ** slope,
        color=look["color"],
        linewidth=1,
        linestyle="-" if what == "product" else ":",
    )
of_empirical = (fisher(step, "empirical") @ V - truth).norm(dim=0) / truth.norm(dim=0)
error_empirical = float(of_empirical.square().mean().sqrt())
ax.axhline(error_empirical, color=ORANGE, label="empirical, product: no draws to raise")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(draws, draws)
ax.set_xlabel("draws per example, S")
ax.set_ylabel("relative error (root mean square)")
_ = ax.legend(fontsize=9)

# %% [markdown]
# So why not always take `"exact"`? Its rows number $C - 1$ per example for a softmax over $C$ classes. For ten classes that is nine, and a sample of nine draws is worse
# and costs the same. For a vocabulary of 50,000 words it is 49,999, and then a few draws are the only way.
#
# ## Solving with products
#
# Natural-gradient steps need $(F + \lambda I)^{-1} g$. `F.solve` gets it without the matrix: exactly through the smaller of $F$ and the Gram matrix if one of them is
# of moderate size, else by conjugate gradients, which ask for nothing but products. Those converge faster the larger the damping $\lambda$ is: the count of
# products grows like $\sqrt{\lambda_{\max} / \lambda}$.
#
# The left panel counts, beside the bound of theory on the steps until the error has fallen to $10^{-8}$, with $\kappa = 1 + \lambda_{\max} / \lambda$. To
# get conjugate gradients here, where the direct way would do, we pass a preconditioner that does nothing. The right panel asks
# the question behind all of this: if the kind is the wrong one, how wrong is the *step*? It shows the cosine between the natural gradient of each kind and the exact one.


# %%
class DoNothing:
    """Anything with ``solve`` can precondition; this one only brings in conjugate gradients."""

    def solve(self, v, damping):
        return v


step = 78
F = fisher(step)
g = F.gradient()
top_eigenvalue = float(fl.spectrum(F)["eigenvalue"][0])
relative = np.logspace(-4, 1, 6)
dampings = relative * top_eigenvalue
direct, counts, residuals = [], [], []
for damping in dampings:
    solution, info = F.solve(g, damping, return_info=True)
    options = {"preconditioner": DoNothing(), "tol": 1e-8}
    iterated, iteration = F.solve(g, damping, return_info=True, **options)
    direct.append(solution)
    counts.append(iteration["steps"])
    difference = (iterated - solution).norm() / solution.norm()
    residuals.append((float(info["residual"]), float(difference)))


def cosines_of(steps):
    return [torch.cosine_similarity(d, e, dim=0).item() for d, e in zip(steps, direct, strict=True)]


kinds = kinds_at(step)
del kinds["exact"]
cosines = {name: cosines_of([A.solve(g, d) for d in dampings]) for name, A in kinds.items()}
cosines["plain gradient"] = cosines_of([g] * len(dampings))
bound = 0.5 * np.sqrt(1 + 1 / relative) * np.log(2 / 1e-8)

figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
left.plot(relative, counts, "o-", color=BLUE, label="products taken")
left.plot(relative, bound, "--", color=GREY, label="½ √κ ln(2/10⁻⁸)")
left.set_yscale("log")
left.set_ylabel("products until the residual is $10^{-8}$")
for name, values in cosines.items():
    right.plot(relative, values, label=name, **looks.get(name, {"color": GREY, "linestyle": "-."}))
right.set_ylim(0, 1.03)
right.set_ylabel("cosine with the exact natural gradient")
for ax in (left, right):
    ax.set_xscale("log")
    ax.set_xlabel("damping $\\lambda$ / largest eigenvalue")
    ax.legend(fontsize=9)

# %% [markdown]
# With much damping every kind gives the plain gradient, and the kind does not matter. With little damping the small eigenvalues decide, where the
# kinds differ most: sixteen draws keep most of the direction, while the step of the empirical kind is then no closer to the natural gradient than the
# plain gradient is.
#
# ## Anything that takes an operator
#
# `F.to_scipy()` hands the operator to scipy. Here `eigsh` finds the ten largest eigenvalues from products alone, and `fl.spectrum` gives all of them through
# the Gram matrix. They agree to rounding.

# %%
found = np.sort(eigsh(F.to_scipy(), k=10, return_eigenvectors=False, v0=np.ones(F.n_params)))[::-1]
complete = fl.spectrum(F)["eigenvalue"].values
error_eigsh = float(np.abs(found / complete[:10] - 1).max())
print("eigsh      ", *(f"{value:.4f}" for value in found))
print("fl.spectrum", *(f"{value:.4f}" for value in complete[:10]))
print(f"largest relative difference {error_eigsh:.0e}")

# %% [markdown]
# ## Data that do not fit
#
# What is kept grows with the number of examples. `memory=` is the budget, 2 GiB unless you say otherwise, and the plan keeps to it. If the
# scores do not fit but the graph of the network does, that is kept and every product runs through it (*linearised*). If that does not fit either, nothing is kept
# and each product reads the data again, batch by batch (*streamed*). It is slower, and still the same matrix: nothing is dropped or rounded off.
#
# The data come from a loader here. It must not shuffle: a second pass over other data would be another matrix, and that is an error.

# %%
everything = TensorDataset(digits.train[0].double(), digits.train[1])
loader = DataLoader(everything, batch_size=256, shuffle=False)
v = randn(F.n_params)
table, answers = [], []
for memory in ("64MiB", "2MiB", "256KiB"):
    A = fl.Fisher(networks[0], loader, likelihood="categorical", memory=memory)
    answers.append(A @ v)
    row = {
        "memory": memory,
        "path": ", ".join(sorted({layer.path for layer in A.plan})),
        "held [KiB]": round(A.plan.nbytes / 2**10),
        "ms per product": round(1e3 * seconds(lambda A=A: A @ v, rounds=3), 1),
        "relative difference": float((answers[-1] - answers[0]).norm() / answers[0].norm()),
    }
    table.append(row)
error_streamed = max(row["relative difference"] for row in table)
pd.DataFrame(table).set_index("memory")

# %% [markdown]
# ## What we learnt, as checks
#
# Each line below is a claim of this page. If one of them stops being true, this cell fails.

# %%
# A product is what the formulae and the slow matrix say, and what the usual recipe gives.
assert error_line < 1e-12
assert error_tiny < 1e-12
assert error_recipe < 1e-4

# A block is cheaper per vector than a single product, and a single product than the usual recipe.
assert per_vector[sizes.index(16)] < per_vector[0] < recipe

# Kinds agree at the start. At the end the empirical one is too small, and with other labels far too large.
assert abs(traces["empirical"].iloc[0] / traces["exact"].iloc[0] - 1) < 0.1
assert traces["empirical"].iloc[-1] < 0.6 * traces["exact"].iloc[-1]
assert traces["shuffled labels"].iloc[-1] > 10 * traces["exact"].iloc[-1]
assert along.iloc[:, -1]["mc, 16 draws"] < along.iloc[:, -1]["empirical"]

# The exact kind does not look at labels at all.
assert torch.equal(fisher(steps[-1], targets=shuffled) @ v, fisher(steps[-1]) @ v)

# The error of sampling falls with the root of the draws; stratified draws do better.
assert all(abs(slopes["independent", what] + 0.5) < 0.15 for what in ("product", "quadratic form"))
assert all(errors["stratified"][0][1:] < errors["independent"][0][1:])

# Solves are solves, by either way; conjugate gradients stay below the bound, and need fewer products with more damping.
assert max(max(pair) for pair in residuals) < 1e-5
assert all(np.diff(counts) < 0)
assert all(np.array(counts) <= bound + 1)

# Everything agrees at much damping, and scipy's eigenvalues with ours.
assert all(values[-1] > 0.95 for values in cosines.values())
assert error_eigsh < 1e-6

# Streaming changes what is held, not the answer.
assert table[-1]["path"] == "streamed"
assert table[-1]["held [KiB]"] == 0
assert error_streamed < 1e-12
