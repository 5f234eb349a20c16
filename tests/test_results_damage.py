"""Files that are missing, foreign, damaged or cut short, and saves that are killed."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from results_samples import check_same, full, rich, small

from fisherlens import errors
from fisherlens.errors import FileFormatError, InputError
from fisherlens.results import SCHEMA_VERSION, load, save, seal


def test_missing_file_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match=full(f"No such file: {tmp_path / 'run.nc'}. That folder holds no files.")):
        load(tmp_path / "run.nc")
    save(small(), tmp_path / "run.nc")
    save(small(), tmp_path / "other.nc")
    message = f"No such file: {tmp_path / 'rum.nc'}. Did you mean 'run.nc'? Known: 'other.nc', 'run.nc'."
    with pytest.raises(InputError, match=full(message)):
        load(tmp_path / "rum.nc")
    target = tmp_path / "missing" / "run.nc"
    message = f"No such file: {target}. There is no folder {target.parent} either; check the path."
    with pytest.raises(InputError, match=full(message)):
        load(target)


def test_unreadable_file(tmp_path, monkeypatch):
    path = save(small(), tmp_path / "a.nc")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        InputError, match=full(f"Cannot read {path}: Permission denied. Check its permissions and the disk.")
    ):
        load(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty (0 B)"),
        (b"a,b\n1,2\n", "neither starts nor ends as a fisherlens file (8 B)"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 200, "starts as netCDF-4 but does not end as a fisherlens file (208 B)"),
    ],
)
def test_foreign_files(tmp_path, content, found):
    path = tmp_path / "a.nc"
    path.write_bytes(content)
    message = (
        f"{path} {found}. It was cut short or damaged, or fisherlens.save did not write it. "
        "Save it again or restore a copy; a netCDF file of another program opens with xarray.open_dataset."
    )
    with pytest.raises(FileFormatError, match=full(message)):
        load(path)


def test_netcdf_of_another_program(tmp_path):
    rich().to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(FileFormatError, match="starts as netCDF-4 but does not end as a fisherlens file"):
        load(tmp_path / "a.nc")


def test_sealed_files_that_hold_no_netcdf(tmp_path):
    path = tmp_path / "a.nc"
    path.write_bytes(b"\x80\x04\x95 a pickle, say")
    seal.seal(path, "dataset")
    with pytest.raises(FileFormatError, match="is sealed as a fisherlens file, yet its content cannot be read: "):
        load(path)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, "one", 1.5])
def test_newer_schema(tmp_path, version):
    path = save(small().assign_attrs(schema_version=version), tmp_path / "a.nc")
    message = (
        f"{path} has schema_version {version!r} (at /); this fisherlens reads up to {SCHEMA_VERSION}. "
        "It was written by a newer release: upgrade fisherlens to read it."
    )
    with pytest.raises(FileFormatError, match=full(message)):
        load(path)
    tree = xr.DataTree.from_dict({"/late": small().assign_attrs(schema_version=version)})
    with pytest.raises(FileFormatError, match=r"\(at /late\)"):
        load(save(tree, tmp_path / "b.nc"))


def test_newer_file_format(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "FORMAT", 2)
    path = save(small(), tmp_path / "a.nc")
    monkeypatch.undo()
    message = (
        f"{path} has file format 2; this fisherlens reads up to 1. "
        "It was written by a newer release: upgrade fisherlens to read it."
    )
    with pytest.raises(FileFormatError, match=full(message)):
        load(path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> bytes:
    return save(rich(), tmp_path_factory.mktemp("sealed") / "run.nc").read_bytes()


def test_truncated_files_are_refused(tmp_path, sealed):
    path = tmp_path / "a.nc"
    rng = np.random.default_rng(1)
    lengths = {0, 1, 8, len(sealed) - 1, len(sealed) // 2, *rng.integers(0, len(sealed), 95).tolist()}
    for length in lengths:
        path.write_bytes(sealed[:length])
        with pytest.raises(FileFormatError, match=re.escape(str(path))):
            load(path)


def test_flipped_bits_are_refused(tmp_path, sealed):
    path = tmp_path / "a.nc"
    rng = np.random.default_rng(2)
    tail = [8 * len(sealed) - 1 - offset for offset in range(0, 8 * 120, 37)]  # the seal itself
    for bit in {0, *tail, *rng.integers(0, 8 * len(sealed), 80).tolist()}:
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=re.escape(str(path))):
            load(path)


def test_added_bytes_are_refused(tmp_path, sealed):
    path = tmp_path / "a.nc"
    for content in (sealed + b"\0", b"\0" + sealed, sealed[:100] + b"\0" + sealed[100:], sealed + sealed):
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            load(path)


def test_message_of_a_damaged_file(tmp_path, sealed):
    path = tmp_path / "a.nc"
    path.write_bytes(sealed[:50] + b"x" + sealed[51:])
    message = (
        f"{path} is damaged: its content does not have the sha256 that was recorded when it was saved. A disk or transfer "
        "error changed it, or another program wrote into it. Save it again or restore a copy."
    )
    with pytest.raises(FileFormatError, match=full(message)):
        load(path)


# --- killed while saving --------------------------------------------------------------------------

KILLS = """
    import os, signal, sys, time
    import numpy as np, xarray as xr
    from pathlib import Path
    from fisherlens.results import load, save

    folder, kills, size = Path(sys.argv[1]), int(sys.argv[2]), 50_000
    make = lambda value: xr.Dataset({"x": ("i", np.full(size, float(value)))}, attrs={"value": float(value)})
    rng = np.random.default_rng(3)
    save(make(0), folder / "run.nc")
    strays, replaced, last = 0, 0, 0.0
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            for value in range(kill * 1000 + 1, kill * 1000 + 1000):
                save(make(value), folder / "run.nc")
            os._exit(1)
        time.sleep(float(rng.uniform(0.0, 0.2)))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        strays += len(list(folder.glob(".*fisherlens-tmp")))
        back = load(folder / "run.nc")
        assert (back["x"] == back.attrs["value"]).all() and back.attrs["value"] >= last
        replaced += back.attrs["value"] > last
        last = back.attrs["value"]
    save(make(-1), folder / "run.nc")
    assert [entry.name for entry in folder.iterdir()] == ["run.nc"], list(folder.iterdir())
    print(strays, replaced)
"""


def run_kills(folder: Path, kills: int) -> tuple[int, int]:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(KILLS), str(folder), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    strays, replaced = map(int, done.stdout.split())
    return strays, replaced


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_saves_leave_a_readable_file(tmp_path, kills):
    strays, replaced = run_kills(tmp_path, kills)
    # Otherwise the kills met no save at work, or always the same one, and nothing was tested.
    assert strays >= kills / 4
    assert replaced >= kills / 10


def test_sweep_leaves_what_is_alive(tmp_path):
    def name(host: str, pid: int) -> Path:
        return tmp_path / f".run.nc.{host}-{pid}-0123abcd.fisherlens-tmp"

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, parent, elsewhere, old, own = (
        name(seal._host(), gone.pid),
        name(seal._host(), os.getppid()),
        name("00000000", 1),
        name("00000001", 1),
        name(seal._host(), os.getpid()),
    )
    foreign = tmp_path / ".notes.fisherlens-tmp"
    for path in (here, parent, elsewhere, old, own, foreign):
        path.touch()
    os.utime(old, (0, 0))
    assert sorted(seal.sweep(tmp_path)) == sorted([here, old, own])
    assert sorted(tmp_path.iterdir()) == sorted([parent, elsewhere, foreign])


def test_process_of_another_user_is_alive(monkeypatch):
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert seal._alive(1)


def test_threads_do_not_sweep_each_other(tmp_path):
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for value in range(3):
                save(small(number + value / 10), tmp_path / f"run{number}.nc")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"run{number}.nc" for number in range(4)]
    for number in range(4):
        check_same(small(number + 0.2), load(tmp_path / f"run{number}.nc"))


def test_errors_are_of_the_house():
    assert issubclass(FileFormatError, errors.FisherLensError)
    assert issubclass(InputError, ValueError)
