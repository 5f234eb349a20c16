"""Are the segments of CW-NGD and MBF independent? Measure it, and write the page ``cw-ngd.md`` with its figures.

    python docs/findings/cw_ngd.py                          # everything: more than an hour on one core; files of networks are apart, so that two commands can share the work
    python docs/findings/cw_ngd.py --networks digits-cnn    # one network; the page says which have not been run
    python docs/findings/cw_ngd.py --page                   # the page again, from the results that are there

Each network, seed and stage has a netCDF file of its own in OUT/data, written whole or not at all. Ctrl-C loses the one
that is being measured; the same command goes on from there. Settings are in the files: one made with others is measured again.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import matplotlib as mpl  # noqa: E402

mpl.use("Agg")

from page import write  # noqa: E402
from study import NETWORKS, STAGES, run, smoke  # noqa: E402


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    lines = [f"  {name:18} {plan.title}" for name, plan in NETWORKS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="networks:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help="which; default all"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of weights and batch order, counted from 0; default 3")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="before training, after an epoch, at the end"
    )
    parser.add_argument(
        "--examples", type=int, help="examples of the exact Fisher; default 128, 32 for the largest network"
    )
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("FISHERLENS_DATA"),
        help="folder of Fashion-MNIST and CIFAR-10; default $FISHERLENS_DATA",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="where page, figures and data/ go; default beside this file"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from what is there")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny networks, one seed, seconds: whether it runs; not for reading"
    )
    options = parser.parse_args(given)
    if options.seeds < 1 or (options.examples is not None and options.examples < 4):
        parser.error("--seeds must be at least 1 and --examples at least 4")
    if options.smoke and options.out == HERE:
        parser.error("--smoke would write over the page; give another --out")
    return options


def main(given: list[str] | None = None) -> None:
    """Measure, then write the page; after Ctrl-C too, of what is there."""
    options = arguments(given)
    plans = {name: NETWORKS[name] for name in options.networks}
    seeds = options.seeds
    if options.examples:
        plans = {name: replace(plan, examples=options.examples) for name, plan in plans.items()}
    if options.smoke:
        some = ("digits-cnn", "digits-cnn-double")
        plans, seeds = {name: smoke(NETWORKS[name]) for name in some}, 1
    data = options.out / "data"
    try:
        if not options.page:
            for name, plan in plans.items():
                print(
                    f"{name}: about {plan.seconds * seeds / 60:.0f} min for {seeds} seeds on one core, if nothing is there yet"
                )
            run(plans, seeds, options.stages, data, options.data_dir, lambda text: print(text, flush=True))
    finally:
        if any(data.glob("*.nc")):
            print(f"written: {write(data, options.out)}")


if __name__ == "__main__":
    main()
