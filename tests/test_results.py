"""Results: what a Dataset is stamped with, and files that give it back identical or refuse to be written."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from results_samples import WORDS, check_same, full, rich, small

from fisherlens.errors import InputError
from fisherlens.results import build, files, load, make_dataset, require_writable, save, seal

# --- building -------------------------------------------------------------------------------------


def test_stamp_of_an_operator():
    operator = SimpleNamespace(
        kind="mc",
        likelihood=SimpleNamespace(name="categorical"),
        n_data=7,
        n_params=np.int64(11),
        dtype=torch.float64,
        device=torch.device("cpu"),
        seed=3,
        plan=SimpleNamespace(to_json=lambda: '{"0": "factors"}'),
    )
    ds = make_dataset(
        {"x": ("rank", [1.0], WORDS)},
        {"rank": [0]},
        operator=operator,
        method="gram",
        num_matvecs=5,
        settings={
            "by": "layer",
            "k": np.int64(3),
            "grid": np.arange(2),
            "vectors": False,
            "tol": None,
            "d": torch.float32,
        },
        damping=np.float64(1e-3),
        left_out=None,
    )
    created = ds.attrs.pop("created_at")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", created)
    settings = json.loads(ds.attrs.pop("settings"))
    assert settings == {"by": "layer", "k": 3, "grid": [0, 1], "vectors": False, "tol": None, "d": "torch.float32"}
    from fisherlens import __version__

    assert ds.attrs == {
        "schema_version": 1,
        "fisherlens_version": __version__,
        "torch_version": torch.__version__,
        "kind": "mc",
        "n_data": 7,
        "n_params": 11,
        "seed": 3,
        "likelihood": "categorical",
        "dtype": "float64",
        "device": "cpu",
        "plan": '{"0": "factors"}',
        "method": "gram",
        "num_matvecs": 5,
        "damping": 1e-3,
    }
    assert type(ds.attrs["n_params"]) is int
    assert type(ds.attrs["damping"]) is float


def test_stamp_without_operator_and_plain_words():
    ds = make_dataset({"x": ((), 1.0, WORDS)}, {}, method="m")
    expected = ["created_at", "fisherlens_version", "method", "schema_version", "torch_version"]
    assert sorted(ds.attrs) == expected
    operator = SimpleNamespace(likelihood="gaussian", plan=["a"], dtype="float32")
    ds = make_dataset({"x": ((), 1.0, WORDS)}, {}, operator=operator, method="m")
    assert (ds.attrs["likelihood"], ds.attrs["plan"], ds.attrs["dtype"]) == ("gaussian", json.dumps("['a']"), "float32")
    assert "seed" not in ds.attrs


def test_torch_version_without_metadata(monkeypatch):
    def missing(name: str) -> str:
        raise build.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build.metadata, "version", missing)
    assert make_dataset({}, {}, method="m").attrs["torch_version"] == "unknown"


def test_tensors_become_arrays_of_their_own():
    tensor = torch.arange(3, dtype=torch.float32, requires_grad=True)
    half = torch.tensor([1.5, 2.0], dtype=torch.bfloat16)
    flags = torch.tensor([True, False])
    conjugate = torch.tensor([1 + 2j, 3j]).conj()
    ds = make_dataset(
        {
            "a": ("i", tensor, WORDS),
            "b": ("j", half, WORDS),
            "c": (("j",), flags, WORDS),
            "d": ("j", conjugate, WORDS),
        },
        {"name": ("i", ["x", "yy", "z"]), "j": torch.arange(2), "value": ("i", [1, 2, 3], {"units": "1"})},
        method="m",
    )
    assert [ds[name].dtype for name in "abcd"] == [np.float32, np.float32, bool, np.complex64]
    np.testing.assert_array_equal(ds["b"], [1.5, 2.0])
    np.testing.assert_array_equal(ds["d"], [1 - 2j, -3j])
    assert ds["value"].attrs == {"units": "1"}
    assert ds["name"].dtype == np.dtype("<U2")
    assert "name" in ds.coords
    with torch.no_grad():
        tensor += 1
    np.testing.assert_array_equal(ds["a"], [0, 1, 2])


def test_words_of_objects_become_text():
    ds = make_dataset({"x": ("i", np.array(["a", "bcd"], dtype=object), WORDS)}, {}, method="m")
    assert ds["x"].dtype == np.dtype("<U3")


@pytest.mark.parametrize("missing", ["long_name", "units"])
def test_variables_need_labels(missing):
    words = {name: text for name, text in WORDS.items() if name != missing}
    message = f"Variable 'x' needs the attribute '{missing}', a string: plots take labels from it."
    with pytest.raises(InputError, match=full(message)):
        make_dataset({"x": ((), 1.0, words)}, {}, method="m")


def test_repeated_dims_are_refused():
    message = "Variable 'x' repeats a dim in ('b', 'b'); give the two axes two names (block_i, block_j)."
    with pytest.raises(InputError, match=full(message)):
        make_dataset({"x": (("b", "b"), np.eye(2), WORDS)}, {}, method="m")


@pytest.mark.parametrize(
    "value",
    [True, {"a": 1}, np.bool_(True), object, [1], ["a"], [], [1, "a"], [True, False], np.eye(2), 1 + 2j, (None,)],
)
def test_attributes_that_no_file_holds(value, tmp_path):
    # a list of one entry would come back as a scalar
    shown = value.item() if isinstance(value, np.generic) else value
    message = (
        f"Attribute 'note' of the result must be a string, a number, or a one-dimensional array of at least two of them; "
        f"got {type(shown).__name__} {shown!r}. netCDF holds nothing else: put a flag into a data variable, "
        "anything nested into a JSON string, and leave None out."
    )
    with pytest.raises(TypeError, match=full(message)):
        make_dataset({}, {}, method="m", note=value)
    with pytest.raises(TypeError, match="Attribute 'note' of variable 'x' must be"):
        save(xr.Dataset({"x": ((), 1.0, {"note": value})}), tmp_path / "a.nc")
    with pytest.raises(TypeError, match="Attribute 'note' of the result of /part must be"):
        save(xr.DataTree.from_dict({"/part": xr.Dataset(attrs={"note": value})}), tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []


# --- the round trip -------------------------------------------------------------------------------


def test_dataset_comes_back_identical(tmp_path):
    ds, before = rich(), rich()
    path = save(ds, tmp_path / "run.nc")
    assert path == tmp_path / "run.nc"
    xr.testing.assert_identical(ds, before)
    back = load(path)
    assert isinstance(back, xr.Dataset)
    check_same(ds, back)
    assert not any(variable.encoding for variable in back.variables.values())
    assert type(back.attrs["seed"]) is int
    assert type(back.attrs["damping"]) is float
    check_same(back, load(save(back, str(tmp_path / "again.nc"))))


def test_result_of_make_dataset_comes_back(tmp_path):
    ds = make_dataset(
        {"x": (("a", "b"), torch.eye(2, dtype=torch.bfloat16), WORDS), "done": ((), True, WORDS)},
        {"a": ["u", "v"], "layer": ("b", ["0", "1"])},
        method="m",
        settings={"k": None},
    )
    check_same(ds, load(save(ds, tmp_path / "a.nc")))


@pytest.mark.parametrize("name", [None, "report"])
def test_tree_comes_back_identical(tmp_path, name):
    parts = {
        "/": xr.Dataset(coords={"layer": ["0", "1"]}, attrs={"title": "digits"}),
        "/start/spectrum": rich().drop_vars(["layer", "kind"]).rename(layer="part"),
        "/end": xr.Dataset({"share": ("layer", [0.25, 0.75], WORDS)}, attrs={"schema_version": 1}),
        "/empty": xr.Dataset(),
    }
    tree = xr.DataTree.from_dict(parts, name=name)
    back = load(save(tree, tmp_path / "report.nc"))
    assert isinstance(back, xr.DataTree)
    assert back.name == name
    assert "fisherlens_tree_name" not in back.attrs
    xr.testing.assert_identical(tree, back)
    check_same(tree["start/spectrum"].to_dataset(), back["start/spectrum"].to_dataset())
    branch = load(save(tree["start"], tmp_path / "branch.nc"))
    check_same(tree["start/spectrum"].to_dataset(), branch["spectrum"].to_dataset())
    np.testing.assert_array_equal(branch["layer"], ["0", "1"])  # inherited from the root it was taken from


def test_encodings_of_an_earlier_file_do_not_change_a_result(tmp_path):
    ds = small(0.123456789)
    ds["x"].encoding = {"dtype": "int16", "scale_factor": 0.5, "_FillValue": -1}
    check_same(ds, load(save(ds, tmp_path / "a.nc")))


def test_the_file_is_netcdf_with_checksums(tmp_path):
    import h5py

    path = save(rich(), tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False) as ds:
        np.testing.assert_array_equal(ds["f64"], rich()["f64"])
    with h5py.File(path) as file:
        kept = {name for name, item in file.items() if isinstance(item, h5py.Dataset) and item.fletcher32}
    assert kept == {"f64", "f32", "f16", "i64", "i32", "u8", "dead", "flag"}  # scalars and text cannot carry one
    assert path.read_bytes()[-130:].count(b"fisherlens-file format=0001 container=dataset  sha256=") == 1


def test_load_leaves_no_file_open(tmp_path):
    path = save(rich(), tmp_path / "run.nc")
    ds = load(path)
    path.unlink()
    assert float(ds["trace"]) == 3.25
    if Path("/proc/self/fd").is_dir():
        handles = [os.readlink(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd") if _open(entry)]
        assert not any("run.nc" in handle for handle in handles)


def _open(entry: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{entry}")


def test_save_follows_links(tmp_path):
    save(small(1.0), tmp_path / "real.nc")
    (tmp_path / "link.nc").symlink_to(tmp_path / "real.nc")
    assert save(small(2.0), tmp_path / "link.nc") == tmp_path / "real.nc"
    assert (tmp_path / "link.nc").is_symlink()
    assert float(load(tmp_path / "real.nc")["x"][0]) == 2.0


# --- what cannot be saved -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, {"x": 1}, xr.DataArray([1.0]), np.zeros(3)])
def test_only_results_are_saved(value, tmp_path):
    message = (
        f"save takes an xarray Dataset or DataTree, as every analysis returns it; got {type(value).__name__}. "
        "A DataArray becomes one by .to_dataset(name=...)."
    )
    with pytest.raises(TypeError, match=full(message)):
        save(value, tmp_path / "missing" / "a.nc")


@pytest.mark.parametrize(
    "values", [np.array(["2020-01-01"], "M8[ns]"), np.array([1], "m8[ns]"), np.array([None]), np.array([{}])]
)
def test_dtypes_that_a_file_would_change(values, tmp_path):
    ds = xr.Dataset({"x": ("i", values)})
    message = (
        f"Variable 'x' has dtype {ds['x'].dtype}, which a file cannot hold without change. "
        "Numbers, booleans and text can be saved; write times as text or as seconds."
    )
    with pytest.raises(InputError, match=full(message)):
        save(ds, tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []


def test_multi_index_is_refused(tmp_path):
    ds = xr.Dataset({"x": (("a", "b"), np.eye(2))}, {"a": [1, 2], "b": [3, 4]}).stack(pair=["a", "b"])
    message = (
        "Coordinate 'pair' is a MultiIndex, which a file cannot hold. "
        "Make it plain coordinates first: result.reset_index('pair')."
    )
    with pytest.raises(InputError, match=full(message)):
        save(ds, tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []
    check_same(ds.reset_index("pair"), load(save(ds.reset_index("pair"), tmp_path / "a.nc")))


def test_text_that_netcdf_cannot_hold(tmp_path):
    message = "This result cannot be written as netCDF: VLEN strings do not support embedded NULLs"
    with pytest.raises(InputError, match=full(message)):
        save(xr.Dataset({"x": ("i", np.array(["a\0b", "c"]))}), tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_differently_is_not_published(tmp_path):
    save(small(), tmp_path / "a.nc")
    ds = xr.Dataset({"x": ("i", np.array([0, 1], np.int8), {"dtype": "bool"})})  # the mark of a stored boolean
    with pytest.raises(InputError, match=r"(?s)^netCDF would not give this result back unchanged, so a\.nc was not"):
        save(ds, tmp_path / "a.nc")
    check_same(small(), load(tmp_path / "a.nc"))
    assert len(list(tmp_path.iterdir())) == 1


def test_dtype_read_back_differently_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_read", lambda path, container: small().astype(np.float32))
    with pytest.raises(InputError, match="Variable 'x' of dtype float64 comes back as float32"):
        save(small(), tmp_path / "a.nc")


def test_missing_folder_and_folder_as_file(tmp_path):
    target = tmp_path / "missing" / "a.nc"
    message = f"Cannot write {target}: there is no folder {target.parent}. Create it first, or correct the path."
    with pytest.raises(InputError, match=full(message)):
        save(small(), target)
    message = f"{tmp_path} is a folder; name a file in it, such as {tmp_path / 'run.nc'}."
    with pytest.raises(InputError, match=full(message)):
        save(small(), tmp_path)
    message = message.replace("name a file", "name the file")
    with pytest.raises(InputError, match=full(message)):
        load(tmp_path)


def test_unwritable_folder_is_found_before_any_work(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(files, "write_netcdf", None)  # calling it would be work
    target = tmp_path / "a.nc"
    message = (
        f"Cannot write {target}: the folder {tmp_path} refuses a new file (Permission denied). "
        "Choose another folder, or change its permissions."
    )
    with pytest.raises(InputError, match=full(message)):
        save(small(), target)
    with pytest.raises(InputError, match=full(message)):
        require_writable(target)


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    save(small(1.0), tmp_path / "a.nc")

    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "seal", fill)
    message = (
        f"Writing {tmp_path / 'a.nc'} failed: [Errno 28] No space left on device. An earlier file of that name is untouched. "
        "Is the disk full, or the folder gone?"
    )
    with pytest.raises(InputError, match=full(message)):
        save(small(2.0), tmp_path / "a.nc")
    monkeypatch.undo()
    check_same(small(1.0), load(tmp_path / "a.nc"))
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small(), tmp_path / "a.nc")
    assert list(tmp_path.iterdir()) == []
    assert not seal._writing
