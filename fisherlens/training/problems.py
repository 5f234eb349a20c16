"""Ready problems: a model factory, training and test data, and the likelihood, under one name."""

from __future__ import annotations

from collections.abc import Mapping

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.linalg.precision import own_precision
from fisherlens.training.base import Pair, Problem, check_pair, seeded
from fisherlens.training.folder import Where, find
from fisherlens.training.ready import READY
from fisherlens.training.synthetic import SYNTHETIC

__all__ = ["Listing", "Pair", "Problem", "check_pair", "problem", "problems", "seeded"]

_NOT_READY = "{given} chooses data of a ready problem, and {name!r} brings its own. Leave it out, or choose the data where the problem is built."
_NO_VERSIONS = "version goes with data that come in several forms, those of 'cifar-vgg' and 'cifar-resnet'; got {version!r} for {name!r}. Leave it out."
_NAMES = [*READY, *SYNTHETIC]


@own_precision
def problem(
    name: str | Problem,
    *,
    data_dir: Where = None,
    num_train: int | None = None,
    num_test: int | None = None,
    version: str | None = None,
    verify: bool = True,
) -> Problem:
    """Build one of the ready problems: a model factory, training and test data, and the likelihood.

    Parameters
    ----------
    name
        One of :func:`problems`, such as ``"digits-cnn"`` or ``"fashion-mlp"``. A :class:`Problem` comes back as it is.
    data_dir
        Folder that the data of ``"fashion-…"``, ``"mnist-…"`` and ``"cifar-…"`` are read from, by default the one that the
        environment variable ``FISHERLENS_DATA`` names: ``fashion-mnist/`` and ``mnist/`` with the four idx files, packed or not,
        ``cifar10/`` with ``cifar-10-batches-bin/`` or ``cifar-10-batches-py/``. torchvision's folders are found too. Nothing is
        downloaded.
    num_train, num_test
        Take so many examples only: as equally many of each class as there are, always the same ones, a smaller subset part of a larger
        one. None takes all. The synthetic problems draw any number.
    version
        Which form of CIFAR-10 to read where several are there: ``"binary"``, ``"python"``, ``"jpeg"`` or ``"lossless-4000"``; by
        default the first of them that is there.
    verify
        Compare each file with its known checksum. False reads data of your own in the same format.

    Returns
    -------
    A :class:`Problem`. Its tensors are new ones with each call; files are read once per process.

    Raises
    ------
    InputError: an unknown name, with the nearest known one; no data folder, or a file that is not in it, with where it comes from; a
    subset larger than the data. FileFormatError: a wrong checksum; a damaged or cut file, with the place. TypeError: counts that are no
    int.

    Notes
    -----
    ============================  ======================  ============================================================
    problems                      inputs, float32         grey levels
    ============================  ======================  ============================================================
    digits-cnn                    ``(N, 1, 8, 8)``        in [0, 1]
    digits-mlp, -autoencoder      ``(N, 64)``             in [0, 1]
    mnist-lenet                   ``(N, 1, 28, 28)``      in [0, 1], then (x - 0.1307) / 0.3081
    mnist-autoencoder             ``(N, 1, 28, 28)``      in [0, 1], as are its targets ``(N, 784)``
    fashion-cnn, -mlp             ``(N, 1, 28, 28)``      in [0, 1], then (x - 0.2860) / 0.3530
    cifar-vgg, -resnet            ``(N, 3, 32, 32)``      in [0, 1], then less (0.4914, 0.4822, 0.4465), over
                                                          (0.2470, 0.2435, 0.2616)
    linear-gaussian, logistic,    ``(N, 6)``, float64     not images: see ``fisherlens.training.synthetic``
    softmax-regression
    ============================  ======================  ============================================================

    Targets are class indices, and the grey levels themselves for autoencoders.

    The digits are those that scikit-learn installs with itself (UCI "Optical Recognition of Handwritten Digits", test part).
    Means and deviations are those of the training images. ``"cifar-resnet"`` is built in training mode and holds batch
    normalisation: a Fisher wants ``model.eval()``; report and analyses of training take an eval-mode copy by themselves. ``"jpeg"`` is
    CIFAR-10 packed as JPEG of quality 75, with loss, and is named so in the description. ``targets`` of a problem are meant
    for the full data, so that a subset has none. Networks: ``fisherlens.training.networks`` says where each comes from.

    Examples
    --------
    >>> digits = problem("digits-mlp")
    >>> digits.train[0].shape, digits.test[1].shape
    (torch.Size([1437, 64]), torch.Size([360]))
    >>> problem("digits-cnn", num_train=100).train[1].bincount().tolist()
    [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    """
    options = {"data_dir": data_dir, "num_train": num_train, "num_test": num_test, "version": version}
    if isinstance(name, Problem):
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise InputError(_NOT_READY.format(given=given[0], name=name.name))
        return name
    if not isinstance(name, str):
        raise TypeError(f"A problem is a fl.Problem or the name of a ready one; got {type(name).__name__}.")
    if name not in _NAMES:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="problem", name=name, hint=errors.nearest(name, _NAMES))
            + " For your own network and data build fl.Problem(...)."
        )
    if version is not None and not name.startswith("cifar-"):
        raise InputError(_NO_VERSIONS.format(version=version, name=name))
    if name in SYNTHETIC:
        return SYNTHETIC[name].build(num_train, num_test)
    where = {"data_dir": data_dir, "version": version, "verify": verify}
    return READY[name].build(name, where, (num_train, num_test))


class Listing(dict[str, str]):
    """Names and descriptions of the ready problems. Prints as a table.

    Attributes
    ----------
    missing : dict
        Name → why its data are not available here; the problems that are not in it can be built.
    """

    def __init__(self, descriptions: Mapping[str, str], missing: Mapping[str, str]):
        super().__init__(descriptions)
        self.missing = dict(missing)

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        rows = [(name, "not here" if name in self.missing else "ready", text) for name, text in self.items()]
        return "\n".join(f"{name.ljust(width)}  {state.ljust(8)}  {text}" for name, state, text in rows)

    def reasons(self) -> list[str]:
        """Why data are not here, one line for the problems that share a reason."""
        shared: dict[str, list[str]] = {}
        for name, why in self.missing.items():
            shared.setdefault(why, []).append(name)
        return [f"{', '.join(names)}: {why}" for why, names in shared.items()]


def problems(*, data_dir: Where = None) -> Listing:
    """List the ready problems: their names, what they are, and whether their data are available here. No data are loaded.

    Parameters
    ----------
    data_dir
        As for :func:`problem`.

    Returns
    -------
    A dict name → description that prints as a table. Its ``missing`` is a dict name → reason for the problems whose data are
    not available here; the files of the others are there, but not looked into.

    Examples
    --------
    >>> listed = problems()
    >>> listed["digits-cnn"]
    'Handwritten digits 8 x 8 (scikit-learn), 1,437 to train on and 360 to test: two convolutions and two dense layers with ReLU, 5,530 parameters.'
    >>> "digits-cnn" in listed.missing
    False
    """
    descriptions, missing = {}, {}
    for name, ready in READY.items():
        form = None
        if ready.data is not None:
            try:
                form, _ = find(ready.data, data_dir)
            except InputError as error:
                missing[name] = str(error)
        descriptions[name] = ready.describe(form)
    return Listing(descriptions | {name: entry.describe() for name, entry in SYNTHETIC.items()}, missing)
