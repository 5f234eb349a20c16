"""What the papers assume and what the numbers say of it, one comparison per statement: a, b, and which way would support it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cuts import NEIGHBOURS, RANDOM, SCATTERED, SHIFTED
from gather import Network, half_width, mean_sem, number, said
from pairs import RELATIONS


@dataclass
class Claim:
    """One comparison over seeds. ``wants`` is "above" or "below": what a - b must be to support the statement.

    ``"not above"`` is supported unless a is found above b.
    """

    key: str
    statement: str
    compared: str
    a: np.ndarray
    b: np.ndarray
    wants: str
    assumed: bool = True  # by CW-NGD or MBF; False for what only helps to see why

    @property
    def difference(self) -> np.ndarray:
        """Paired over seeds."""
        return self.a - self.b

    @property
    def lower(self) -> str:
        """The statement, to go on a sentence with."""
        return self.statement if self.statement.startswith("MBF") else self.statement[0].lower() + self.statement[1:]

    @property
    def direction(self) -> str:
        """Above, below, or open: whether 0 lies in the 95 % interval of the mean difference."""
        mean, width = mean_sem(self.difference)[0], half_width(self.difference)
        if not np.isfinite(mean) or not np.isfinite(width):
            return "open"
        return "above" if mean > width else "below" if mean < -width else "open"

    @property
    def verdict(self) -> str:
        """Supported, contradicted or undecided."""
        found = self.direction
        if not np.isfinite(mean_sem(self.difference)[0]):
            return "does not arise"
        if not np.isfinite(half_width(self.difference)):
            return "one seed only"
        if self.wants == "not above":
            return "contradicted" if found == "above" else "supported" if found == "below" else "not contradicted"
        return "undecided" if found == "open" else "supported" if found == self.wants else "contradicted"

    def row(self) -> str:
        """A line of the table."""
        mean, width = mean_sem(self.difference)[0], half_width(self.difference)
        cells = self.statement, self.compared, number(self.a), number(self.b), said(mean, width), f"**{self.verdict}**"
        return "| " + " | ".join(cells) + " |"


HEAD = "| statement | compared: a against b | a | b | a − b, 95 % interval | verdict |\n|---|---|---|---|---|---|"


def _excess(n: Network, cut: str, layers: list[str]) -> np.ndarray:
    where = {"stage": n.last}
    return n.over_layers("energy_captured", cut, layers, **where) - n.over_layers(
        "energy_noise_floor", cut, layers, **where
    )


def of_network(n: Network) -> Iterator[Claim]:
    """The statements at the last stage that is there."""
    stage = n.last
    conv = [name for name in n.convolutions if n.single_share("cw-ngd", name) < 1]
    cut = [name for name in n.layers if n.single_share("cw-ngd", name) < 0.5]

    def energy(name: str, layers: list[str]) -> np.ndarray:
        return n.over_layers("energy_captured", name, layers, stage=stage)

    def ratio(name: str, damping: int = 1, kind: str = "exact") -> np.ndarray:
        return n.value("decrease_ratio", name, stage=stage, damping=damping, kind=kind)

    yield Claim(
        "inside", "Parameters of one convolution kernel belong together",
        "energy in convolutions: cw-ngd against random blocks of its sizes",
        energy("cw-ngd", conv), energy(RANDOM.format("cw-ngd"), conv), "above",
    )  # fmt: skip
    yield Claim(
        "border", "The borders between segments are where they should be",
        "energy in segmented layers: cw-ngd against the same moved by half a segment",
        energy("cw-ngd", cut), energy(SHIFTED, cut), "above", False,
    )  # fmt: skip
    yield Claim(
        "neighbours", "Neighbouring segments of a unit are independent",
        "mean ρ² of neighbours against the squared noise floor",
        n.coupling("squared_coupling", RELATIONS[0], n.segmented, stage),
        n.coupling("squared_floor", RELATIONS[0], n.segmented, stage), "not above",
    )  # fmt: skip
    yield Claim(
        "distance", "Neighbouring segments of a unit are coupled more than farther ones",
        "mean ρ² of neighbours against that of farther segments of the same unit",
        n.coupling("squared_coupling", RELATIONS[0], n.segmented, stage),
        n.coupling("squared_coupling", RELATIONS[1], n.segmented, stage), "above", False,
    )  # fmt: skip
    yield Claim(
        "units apart", "Segments of different units are independent",
        "mean ρ² of segments that share neither unit nor source against the squared noise floor",
        n.coupling("squared_coupling", RELATIONS[3], n.segmented, stage),
        n.coupling("squared_floor", RELATIONS[3], n.segmented, stage), "not above",
    )  # fmt: skip
    yield Claim(
        "same unit", "A unit holds together: its segments are coupled more than those of different units",
        "mean ρ² of neighbours in a unit against segments that share neither unit nor source",
        n.coupling("squared_coupling", RELATIONS[0], n.segmented, stage),
        n.coupling("squared_coupling", RELATIONS[3], n.segmented, stage), "above", False,
    )  # fmt: skip
    if n.has("stand_ins"):
        yield Claim(
            "merging", "Merging neighbours keeps more than merging any two segments",
            "energy in layers whose units have several segments: neighbours merged against strangers merged",
            energy(NEIGHBOURS, n.segmented), energy(SCATTERED, n.segmented), "above", False,
        )  # fmt: skip
        yield Claim(
            "unit", "Cutting dense layers by output unit keeps more than by input",
            "energy above chance in dense layers: unit against input",
            _excess(n, "unit", n.dense), _excess(n, "input", n.dense), "above",
        )  # fmt: skip
        yield Claim(
            "shared", "MBF's one shared block per dense layer does no harm",
            "decrease ratio at 0.01 λ_max: mbf with blocks of their own against the shared one",
            n.stand_in("decrease_ratio", "mbf", stage), n.stand_in("decrease_ratio", "mbf, shared", stage), "not above",
        )  # fmt: skip
    for place, name in enumerate(("1e-7", "0.01 λ_max")):
        yield Claim(
            f"diagonal {place}", f"The segments beat a diagonal, at λ = {name}",
            "decrease ratio: cw-ngd against diagonal", ratio("cw-ngd", place), ratio("diagonal", place), "above",
        )  # fmt: skip
        yield Claim(
            f"random {place}", f"The segments beat random blocks of their sizes, at λ = {name}",
            "decrease ratio: cw-ngd against random", ratio("cw-ngd", place), ratio(RANDOM.format("cw-ngd"), place), "above",
        )  # fmt: skip
    for kind, words in (("batch", "one batch"), ("averaged", "several batches")):
        if n.has(kind):
            yield Claim(
                f"{kind}", f"As the optimizer sees it ({words}, empirical, λ = 1e-7): the segments beat random blocks",
                "decrease ratio: cw-ngd against random",
                ratio("cw-ngd", 0, kind), ratio(RANDOM.format("cw-ngd"), 0, kind), "above",
            )  # fmt: skip


def of_training(n: Network) -> Iterator[Claim]:
    """What changes from the first to the last stage that is there."""
    first, last = n.stages[0], n.last
    if first == last:
        return
    for variable, words in (("energy_captured", "energy captured"), ("decrease_ratio", "decrease ratio at 0.01 λ_max")):
        yield Claim(
            f"grow {variable}", f"Independence grows with training: {words} of cw-ngd", f"{last} against {first}",
            n.value(variable, "cw-ngd", stage=last), n.value(variable, "cw-ngd", stage=first), "above",
        )  # fmt: skip
    for relation in (RELATIONS[0], RELATIONS[3]):
        yield Claim(
            f"fade {relation}", f"Independence grows with training: ρ² of segments falls ({relation})",
            f"{last} against {first}", n.coupling("squared_coupling", relation, n.segmented, last),
            n.coupling("squared_coupling", relation, n.segmented, first), "below",
        )  # fmt: skip


def of_width(narrow: Network, wide: Network) -> Iterator[Claim]:
    """What changes from the narrowest to the widest network, at the first and the last stage both have."""
    seeds = [s for s in narrow.seeds if s in wide.seeds]
    a, b = (Network(n.name, n.plan, {k: v for k, v in n.trees.items() if k[0] in seeds}) for n in (wide, narrow))
    stages = [s for s in a.stages if s in b.stages]
    for stage in dict.fromkeys((stages[0], stages[-1])) if stages else ():
        words = f"width {a.plan['width']:g} against {b.plan['width']:g}, {stage}"
        for variable, name in (
            ("energy_captured", "energy captured"),
            ("decrease_ratio", "decrease ratio at 0.01 λ_max"),
        ):
            yield Claim(
                f"width {variable} {stage}", f"Independence grows with width: {name} of cw-ngd", words,
                a.value(variable, "cw-ngd", stage=stage), b.value(variable, "cw-ngd", stage=stage), "above",
            )  # fmt: skip
        for relation in (RELATIONS[0], RELATIONS[3]):
            yield Claim(
                f"width {relation} {stage}", f"Independence grows with width: ρ² of segments falls ({relation})", words,
                a.coupling("squared_coupling", relation, a.segmented, stage),
                b.coupling("squared_coupling", relation, b.segmented, stage), "below",
            )  # fmt: skip
