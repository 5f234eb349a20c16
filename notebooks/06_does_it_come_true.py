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
# # Does it come true? What the analysis predicts, and what training does
#
# The notebooks before this one computed many numbers from the Fisher matrix $F$. Each of them is more than a description: it says what will happen *if* one does something to the network.
#
# | what we computed | what it predicts | what can be done to see |
# |---|---|---|
# | an ellipse, an eigenvalue | how far a step changes the answers of the network | take the step |
# | the information of a unit | what the network loses without it | remove it |
# | the decrease ratio of a segmentation | how well a block-wise step follows the exact one | take both |
# | the condition number of a segmentation | which optimizer is the faster | let them race |
# | a stale matrix | what it costs to keep it | keep it |
#
# A number whose prediction never fails because nobody looks is worth little. **So we look.** `fl.verify` takes the predictions one by one, does the thing, and writes predicted and measured
# side by side. A prediction that fails is a result too, and you will see some.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

import fisherlens as fl
from fisherlens.training.synthetic import known_fisher

torch.set_num_threads(1)  # small matrices: on a busy machine more threads only wait for each other
SMOKE = os.environ.get("FISHERLENS_SMOKE") == "1"  # fewer steps, seeds and data
SEEDS, EXAMPLES, RACE_STEPS = (1, 32, 6) if SMOKE else (3, 128, 40)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.55"


def table(result, claim=None):
    """The rows of a verification, or of one claim, short enough to read."""
    rows = result.claim.values if claim is None else [row for row in result.claim.values if row.startswith(f"{claim}/")]
    return (
        result.sel(claim=rows)[["predicted", "measured", "tolerance", "relation", "holds", "decided"]]
        .to_dataframe()
        .round(3)
    )


# %% [markdown]
# ## Where the answer is known
#
# Before we trust a referee we try it on a match whose result we know. For a linear model with Gaussian noise of variance $\sigma^2$ the Fisher matrix is $I \otimes X^\top X/(N\sigma^2)$, and with
# it everything is *exactly* quadratic: the divergence between the answers before and after a step $\delta$ is $\tfrac12 \delta^\top F \delta$, however long the step. So every claim about it must hold.

# %%
line = fl.problem("linear-gaussian")
known = fl.verify(line, ["metric", "information"], seeds=SEEDS, num_examples=EXAMPLES, progress=False)
table(known)

# %% [markdown]
# Some rows compare two numbers (`equal`), some an order (`order`, a rank correlation), some ask that something be no larger or smaller than something else. `tolerance` belongs to the row, and `holds` takes the
# uncertainty over seeds into account: where the seeds disagree too much to tell, a row is *undecided* and does not hold.
#
# ## A referee who can say no
#
# A test that cannot fail tells nothing. So we hand in a *wrong* Fisher, three times too large, and see whether it is caught. What is measured does not ask for the operator and stays the same; the predictions
# are now three times too large.


# %%
def three_times(F):
    return fl.Operator(lambda v: 3 * (F @ v), F.n_params, F.dtype, F.device, block=True)


wrong = fl.verify(
    line, ["metric", "information"], operator=three_times, seeds=SEEDS, num_examples=EXAMPLES, progress=False
)
table(wrong)

# %% [markdown]
# ## A network
#
# Now the digits: 64 inputs, 32 hidden units with tanh, 10 classes. `fl.verify` trains a copy for a hundred steps first, so that the analysis is made at parameters as one meets them in practice.
#
# We begin with the first line of the table. Along the stiffest and the sloppiest directions we walk from $\theta$ and watch the divergence. In double logarithmic axes the prediction $\tfrac12 \ell^2 v^\top F v$ is a straight
# line of slope two, and what we want to know is not only whether the dots lie on it, but *where they leave it*: beyond that length the Fisher matrix no longer describes the network.

# %%
digits = fl.problem("digits-mlp", num_train=200, num_test=100) if SMOKE else fl.problem("digits-mlp")
CLAIMS = ["metric", "information", "independence", "sharing"]
result = fl.verify(digits, CLAIMS, seeds=SEEDS, num_examples=EXAMPLES, progress=False)
figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
one = result.isel(seed=0)
for direction, colour in zip(one.metric_direction.values, (BLUE, ORANGE, GREEN), strict=True):
    here = one.sel(metric_direction=direction)
    ax.loglog(here.metric_length, here.metric_quadratic, color=colour, linewidth=1)
    ax.loglog(
        here.metric_length, here.metric_divergence.sel(metric_sign=1), "o", color=colour, markersize=4, label=direction
    )
ax.set(xlabel="length of the step", ylabel="divergence of the answers, nat", ylim=(1e-16, 1e3))
ax.legend(title="eigenvector of F", frameon=False)
ax.set_title("Lines: what F says. Dots: what the network does.", loc="left", fontsize=10)
table(result, "metric")

# %% [markdown]
# At the short end rounding wins: two answers that differ by $10^{-16}$ look the same to a computer. At the long end the dots bend away. Between them lies the region in which a Fisher matrix is worth having, and natural-gradient
# methods clip their steps to stay in it.
#
# ## Removing a unit
#
# What happens if a hidden unit is taken away? Its parameters $\theta_b$ become zero, that is a step $\delta = -\theta_b$, and the divergence should be $\tfrac12 \theta_b^\top F_{bb} \theta_b$. On the left every dot is a unit.
# The change of the *loss* has one more term, $-g^\top \theta_b$: where training has not converged the loss has a slope, and removing a unit walks along it, up or down. No Fisher matrix knows that.
#
# If the prediction ranks the units well we can prune by it. On the right units go one after the other, in three orders.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for ax, (predicted, measured, words) in zip(
    axes,
    (
        ("information_predicted", "information_divergence", "divergence of the answers"),
        ("information_loss_predicted", "information_loss_change", "change of the loss"),
    ),
    strict=False,
):
    a, b = one[predicted].values, one[measured].values
    ax.plot(a, b, "o", color=BLUE, markersize=4)
    ends = [min(a.min(), b.min()), max(a.max(), b.max())]
    ax.plot(ends, ends, color=GREY, linewidth=1)
    ax.set(xlabel=f"predicted {words}, nat", ylabel="measured, nat")
axes[0].set(xscale="log", yscale="log")
pruned = result.information_pruned.mean("seed")
for ranking, colour in zip(pruned.information_ranking.values, (BLUE, ORANGE, GREY), strict=True):
    axes[2].plot(pruned.information_removed, pruned.sel(information_ranking=ranking), ".-", color=colour, label=ranking)
axes[2].set(xlabel="share of the units removed", ylabel="divergence of the answers, nat")
axes[2].legend(title="removed first: smallest", frameon=False)
table(result, "information")

# %% [markdown]
# Read the table with the picture. For a *twentieth* of a unit's parameters the form is right to a few per cent. For a whole unit it is right in order and rough in size, because a whole unit is a long step: look at where its dots lie in the first picture.
# That is enough to choose what to remove: both informed orders do far better than chance. That `information` and `magnitude` coincide here is a property of this network, in which every hidden unit sees the same inputs; where layers
# differ, as in `digits-cnn`, weights of one size mean different things in different layers, and the two part.
#
# ## Steps that know their block only
#
# Block-wise natural gradient (CW-NGD, MBF, unit-wise methods) divides the gradient by blocks of $F$ and forgets the rest. `fl.independence` says what that costs before any training: the *decrease ratio* $\eta$. It has a second meaning that can
# be seen from outside. If $p$ is the exact natural step and $\alpha p_b$ the block-wise one at its best length, then $\|p - \alpha p_b\| / \|p\| = \sqrt{1 - \eta}$, lengths taken in the metric of $F$ (with its damping). And a squared length in that metric is twice a divergence
# of answers. So we let both methods make a step from the same weights with the same batch, and ask how differently the two networks answer. On the right both methods go on by themselves, through equal batches.

# %%
mean = result[["independence_predicted", "independence_shared", "independence_apart"]].mean("seed")
names = [str(name) for name in mean.independence_segmentation.values]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
place = np.arange(len(names))
steps = result.sel(claim=[f"independence/{name}" for name in names])
axes[0].barh(place - 0.2, steps.predicted, 0.38, color="0.75", label="predicted, √(1 - η)")
axes[0].barh(place + 0.2, steps.measured, 0.38, color=BLUE, label="measured in the answers")
axes[0].set_yticks(place, names)
axes[0].set(xlim=(0, 1.35), xlabel="distance from the exact step, over its length")
axes[0].invert_yaxis()
axes[0].legend(frameon=False, fontsize=8, loc="upper right")
axes[0].set_title("one step from equal weights", loc="left", fontsize=10)
for name, colour in zip(names, plt.cm.viridis(np.linspace(0, 0.9, len(names))), strict=True):
    own = mean.independence_apart.sel(independence_segmentation=name)
    axes[1].plot(mean.independence_step, own, ".-", color=colour, label=name)
axes[1].set(xlabel="steps", ylabel="divergence from the exact run,\nshare of its own way", ylim=(0, 1))
axes[1].legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
axes[1].set_title("runs of their own, equal batches", loc="left", fontsize=10)
table(result, "independence")

# %% [markdown]
# Two groups show: blocks of a whole layer, which hardly depart, and fine cuts, among which it makes little difference whether the blocks follow the segments of CW-NGD, are shuffled, or are single entries. That is a statement about *this* network, whose inputs are 64 separate grey levels:
# CW-NGD's rule leaves single entries there.
#
# ## Keeping an old matrix
#
# TENGraD inverts the blocks of one batch and keeps the inverses for many steps; FNGD finds the weights of the examples in the first epoch and keeps them for ever. How much of a fresh direction is left after a while? The
# quadratic model predicts the share of the decrease that a stale direction still reaches, and we measure it, both from the same weights. The dashed line is a useful ruler: it is the cosine of two *fresh* directions that differ in nothing but
# the batch that the matrix was made of. Where the solid line runs near the dashed one, age costs nothing that chance had not taken already.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
aged = result[["sharing_predicted", "sharing_measured", "sharing_cosine", "sharing_other_batch"]].mean("seed")
for method, colour in zip(aged.sharing_method.values, (BLUE, ORANGE), strict=True):
    own = aged.sel(sharing_method=method)
    axes[0].semilogx(own.sharing_age, own.sharing_cosine, "o-", color=colour, label=f"{method}, stale")
    if np.isfinite(own.sharing_other_batch).all():
        axes[0].semilogx(
            own.sharing_age, own.sharing_other_batch, "--", color=colour, label=f"{method}, fresh, other batch"
        )
    axes[1].semilogx(own.sharing_age, own.sharing_predicted, "--", color=colour, label=f"{method}, predicted")
    axes[1].semilogx(own.sharing_age, own.sharing_measured, "o-", color=colour, label=f"{method}, measured")
axes[0].set(xlabel="age in steps", ylabel="cosine to the fresh direction")
axes[1].set(xlabel="age in steps", ylabel="decrease of the loss, stale over fresh")
for ax in axes:
    ax.legend(frameon=False, fontsize=8)
table(result, "sharing")

# %% [markdown]
# ## A race that is fair
#
# Whether a method *trains* better is a question of its own, and the easiest one to get wrong: the winner is often the one that was tuned. `fl.compare_optimizers` gives every entry the same search, on seeds that are not reported afterwards, and starts
# all of them from the same weights with the same batches. Below: block-wise natural gradient on units, on single entries, and SGD.

# %%
RATES = [0.03, 0.1, 0.3] if SMOKE else [0.03, 0.1, 0.3, 1.0, 3.0]
plain = {"damping": 0.1, "likelihood": "categorical", "kl_clip": None}
entries = {
    "units": lambda model, lr: fl.optim.UnitWise(model, lr, **plain),
    "single entries": lambda model, lr: fl.optim.CWNGD(
        model, lr, partition="diagonal", ema=0.0, momentum_ema=0.0, labels="sampled", **plain
    ),
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
}
search = fl.Tuning({name: {"lr": RATES} for name in entries}, criterion="mean")
with warnings.catch_warnings(
    record=True
) as told:  # a best rate at the edge of the search is told, and kept in the result
    warnings.simplefilter("always")
    race = fl.compare_optimizers(digits, entries, num_steps=RACE_STEPS, seeds=SEEDS, tune=search, progress=False)
print(*{str(warning.message) for warning in told}, sep="\n")
figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
fl.plot.optimizers(race, ax)
race[["trial_options", "trial_score", "trial_chosen"]].to_dataframe().round(3)

# %% [markdown]
# Units lead, and single entries do about as well as SGD. Look back at the decrease ratios: units keep three quarters of the exact step's decrease here, single entries a third. The claim `convergence` of `fl.verify` does this race for all segmentations at once,
# with the rank correlation of the two orders. It takes longer than a notebook should, and it does not always hold: on `digits-cnn`, *exact* natural gradient, which keeps everything, comes in last. Its matrix is that of one batch with one drawn label per example, and it follows the noise of that faithfully.
# Closer to $F$ is not by itself better training (Benzing 2022).
#
# ## Watching a run of your own
#
# All of this was our training. `fl.Monitor` puts the same eye on *yours*: it is told after each step, measures now and then on a few fixed examples, and leaves the training as it was, bit by bit. What it costs is part of the result.
# (Here that is most of the time: a step of so small a network takes a fraction of a millisecond. On larger ones, or with `max_share=0.05`, it is as little as you like.)


# %%
def trained(watched):
    model, (x, y) = digits.model(seed=0), digits.train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    monitor = fl.Monitor(model, digits.train, likelihood="categorical", every=20, k=3) if watched else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        index = torch.randint(len(x), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
    return model, None if monitor is None else monitor.result


(watched, diary), (alone, _) = trained(True), trained(False)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
axes[0].plot(diary.step, diary.eigenvalue, ".-")
axes[0].set(xlabel="steps", ylabel="three largest eigenvalues of F, nat")
axes[1].plot(diary.step, diary.alignment, ".-", color=ORANGE)
axes[1].set(xlabel="steps", ylabel="share of the gradient in the top space", ylim=(0, 1))
print(f"The Monitor took {float(diary.share_of_time[-1]):.0%} of the time.")

# %% [markdown]
# ## How to read a failure
#
# - **A row that fails says where a model ends**, not that the arithmetic is wrong: the arithmetic is tested against closed forms. The quadratic form of a whole unit fails where the unit is a long step; the decrease ratio fails where one batch
#   says little about the rest.
# - **Undecided is not refuted.** Three seeds are few. More seeds, or the larger preset (`preset="full"`), narrow the interval.
# - **A prediction that holds here holds here.** One small network, one data set. `fl.verify` takes the name of any problem or your own (`fl.Problem`), and `fisherlens verify digits-cnn` does it from the command line.
#
# ## What we learnt, as checks

# %%
# The Fisher of the linear problem is the closed form, and every claim about it holds.
model = line.model(0)
closed = known_fisher(line, model)
assert torch.allclose(fl.Fisher(model, line.train, likelihood=line.likelihood).dense(), closed, rtol=1e-10)
assert known.holds.all()

# A Fisher three times too large is caught, and what is measured does not depend on it.
assert not wrong.holds.sel(claim=["metric/top", "information/small", "information/removed"]).any()
assert np.allclose(wrong.measured.sel(claim="metric/top"), known.measured.sel(claim="metric/top"))
assert np.isclose(wrong.predicted.sel(claim="metric/top"), 3 * known.predicted.sel(claim="metric/top"))

# The Fisher is the metric of the answers of the network too, for short steps.
assert result.holds.sel(claim=["metric/top", "information/small"]).all()

# What is predicted of removals ranks them.
assert result.measured.sel(claim="information/rank") > 0.8

# Whole layers depart less than single entries: predicted, and measured.
for kind in ("predicted", "measured"):
    whole, single = result[kind].sel(claim=["independence/layer", "independence/diagonal"]).values
    assert whole < single

# Fresh and stale directions are compared at every age, and no cosine is larger than one.
assert (result.sharing_cosine.values <= 1 + 1e-9).all()

# Units keep more of the decrease than single entries, and are faster.
assert (
    result.independence_predicted.mean(["seed", "independence_step"])
    .sel(independence_segmentation=["unit", "diagonal"])
    .diff("independence_segmentation")
    < 0
)
ends = race.train_loss.isel(step=slice(1, None)).mean(["step", "seed"])
assert ends.sel(optimizer="units") < ends.sel(optimizer="single entries")

# The race was equal: as many trials for each, and equal starts.
assert len(set(race.trial_score.notnull().sum("trial").values)) == 1
start = race.train_loss.isel(step=0)
assert (start == start.isel(optimizer=0)).all()

# The Monitor changed nothing.
assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
