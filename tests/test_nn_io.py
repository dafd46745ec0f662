"""Weights in files: what is written comes back, PyTorch's files load, and nothing is lost when anything is wrong."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from tilewise import nn

STATE = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "half": np.array([1.5, np.inf, np.nan], np.float16),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "bytes": np.array([0, 255], np.uint8),
    "empty": np.zeros((0, 3), np.float32),
    "file": np.ones(1),
    "größe": np.ones(2, np.float32),
}


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed (extra: io)")
    return tmp_path / f"weights{request.param}"


def network(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        {"hidden": nn.Linear(2, 4, rng=seed), "norm": nn.BatchNorm1d(4), "fc": nn.Linear(4, 3, rng=seed)}
    )


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)


def test_what_was_saved_is_loaded(path):
    nn.save(STATE, str(path))
    assert_same(nn.load(path), STATE)


def test_a_model_goes_through_a_file(path):
    model, other = network(0), network(1)
    model(np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32))
    nn.save(model.state_dict(), path)
    assert other.load_state_dict(nn.load(path)) == ([], [])
    assert_same(other.state_dict(), model.state_dict())


def test_other_libraries_read_and_write_the_same_files(path):
    if path.suffix == ".npz":
        np.savez_compressed(path, **{name: value for name, value in STATE.items() if name != "file"})
        assert_same(nn.load(path), {name: value for name, value in STATE.items() if name != "file"})
        nn.save(STATE, path)
        with np.load(path) as archive:
            assert_same(dict(archive), STATE)
        return
    from safetensors.numpy import load_file, save_file

    save_file({name: np.asarray(value, order="C") for name, value in STATE.items()}, path, {"format": "pt"})
    assert_same(nn.load(path), STATE)
    nn.save(STATE, path)
    assert_same(load_file(path), STATE)


@pytest.mark.parametrize("part", [0, 1, 20, 0.5, 0.99], ids=str)
def test_a_file_that_is_cut_off(path, part):
    model = network()
    nn.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    with pytest.raises(ValueError, match=rf"load: '.*weights{path.suffix}' is damaged or not "):
        nn.load(path)


def test_a_bit_that_has_changed(path):
    """npz has checksums; safetensors has none over its data, but the length of its header must make sense."""
    nn.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["layer.weight"].tobytes()) + 9 if path.suffix == ".npz" else 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or not"):
        nn.load(path)


def test_no_changed_bit_of_an_npz_file_gives_other_values(tmp_path):
    """Each byte in turn: an error of ours, or (in dates, say) the same arrays; entries lie under their names twice."""
    path, state = tmp_path / "a.npz", {"w": np.arange(6, dtype=np.float32)}
    nn.save(state, path)
    content, errors = path.read_bytes(), 0
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            assert_same(nn.load(path), state)
        except ValueError:
            errors += 1
    assert errors > len(content) / 2


def test_files_of_something_else(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    os.replace(tmp_path / "array.npy", tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    for name in ("array.npz", "objects.npz"):
        with pytest.raises(ValueError, match=rf"load: '.*{name}' is damaged or not an npz file of arrays: "):
            nn.load(tmp_path / name)


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    nn.save({"a": np.ones(2)}, path)
    with pytest.raises(TypeError, match="save: b is object, not an array of numbers"):
        nn.save({"a": np.zeros(2), "b": None}, path)

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        nn.save({"a": np.zeros(2)}, path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert_same(nn.load(path), {"a": np.ones(2)})


def test_saving_over_a_link_keeps_the_link(path):
    target = path.with_name(f"target{path.suffix}")
    nn.save({"a": np.ones(2)}, target)
    path.symlink_to(target)
    nn.save({"a": np.zeros(2)}, path)
    assert path.is_symlink()
    assert_same(nn.load(target), {"a": np.zeros(2)})


@pytest.mark.skipif(os.name == "nt", reason="files have no modes there")
def test_a_saved_file_has_the_usual_mode(path):
    nn.save(STATE, path)
    (path.parent / "usual").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path.parent / "usual").stat().st_mode)


class TestPyTorchsFiles:
    def test_load(self, torch, tmp_path):
        layers, model = torch.nn, network()
        theirs = layers.Sequential()
        for name, layer in (
            ("hidden", layers.Linear(2, 4)),
            ("norm", layers.BatchNorm1d(4)),
            ("fc", layers.Linear(4, 3)),
        ):
            theirs.add_module(name, layer)
        theirs(torch.randn(8, 2))
        for name in ("weights.pt", "weights.PTH"):
            torch.save(theirs.state_dict(), tmp_path / name)
            assert model.load_state_dict(nn.load(tmp_path / name)) == ([], [])
            assert_same(model.state_dict(), {name: value.numpy() for name, value in theirs.state_dict().items()})

    def test_bfloat16_comes_as_float32(self, torch, tmp_path):
        values = torch.tensor([1.0, -3.140625, float("inf"), 1e-39]).bfloat16()
        expected = {"a": values.float().numpy()}
        torch.save({"a": torch.nn.Parameter(values)}, tmp_path / "a.pt")
        assert_same(nn.load(tmp_path / "a.pt"), expected)
        pytest.importorskip("safetensors", reason="safetensors is not installed (extra: io)")
        from safetensors.torch import save_file

        save_file({"a": values}, tmp_path / "a.safetensors")
        assert_same(nn.load(tmp_path / "a.safetensors"), expected)
        save_file({"a": values.to(torch.float8_e5m2)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="load: a is F8_E5M2, which NumPy does not have"):
            nn.load(tmp_path / "a.safetensors")

    def test_wrong_content(self, torch, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"epoch": 3, "state_dict": {"a": torch.ones(2)}, "b": torch.ones(1)}, path)
        with pytest.raises(
            ValueError, match=r"holds more than tensors: 'epoch' \(int\), 'state_dict' \(dict\); if one"
        ):
            nn.load(path)
        torch.save([torch.ones(2)], path)
        with pytest.raises(ValueError, match=r"a\.pt' holds a list, not tensors by name"):
            nn.load(path)
        torch.save(torch.nn.Linear(2, 2), path)  # a pickled class, which loading would execute
        with pytest.raises(ValueError, match=r"a\.pt' is damaged or not a file of tensors only"):
            nn.load(path)
        path.write_bytes(b"PK nonsense")
        with pytest.raises(ValueError, match=r"a\.pt' is damaged or not a file of tensors only"):
            nn.load(path)


def test_no_such_file(path):
    for missing in (path, path.with_suffix(".pt")) if "torch" in sys.modules else (path,):
        with pytest.raises(FileNotFoundError):
            nn.load(missing)
    with pytest.raises(FileNotFoundError):
        nn.save(STATE, path.parent / "no folder" / path.name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.load("a.onnx"), r"load: 'a\.onnx' must end in one of \.npz, \.safetensors, \.pt, \.pth"),
        (lambda: nn.save(STATE, "a.pt"), r"save: 'a\.pt' must end in one of \.npz, \.safetensors"),
        (lambda: nn.save(STATE, "weights"), "save: 'weights' must end in"),
    ],
)
def test_other_endings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("safetensors", "nn.load('a.safetensors')", "ImportError .safetensors files need safetensors: pip install"),
        ("safetensors", "nn.save({}, 'a.safetensors')", "ImportError .safetensors files need safetensors: pip install"),
        ("torch", "nn.load('a.pt')", "ImportError load: .pt and .pth files need PyTorch"),
    ],
)
def test_without_the_library(module, call, message, tmp_path):
    code = f"""
import sys
sys.modules[{module!r}] = None
from tilewise import nn
try:
    {call}
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith(message)
    assert list(tmp_path.iterdir()) == []


class TestLoadingIntoAModule:
    def test_old_files_without_batch_counts(self):
        """PyTorch before 0.4.1 did not count; its modules take such a state as complete."""
        model, state = network(0), network(1).state_dict()
        del state["norm.num_batches_tracked"]
        model.norm.num_batches_tracked[...] = 5
        assert model.load_state_dict(state) == ([], [])
        assert model.norm.num_batches_tracked == 5

    def test_everything_that_is_wrong_is_named_and_nothing_changed(self):
        model = network()
        before = model.state_dict()
        state = {name: value + 1 for name, value in before.items()}
        state["head.weight"] = state.pop("hidden.weight")
        state |= {"fc.weight": np.zeros((5, 4)), "fc.bias": np.zeros(5)}
        shapes = r"fc\.weight has shape \(5, 4\), expected \(3, 4\); fc\.bias has shape \(5,\), expected \(3,\)"
        names = r"missing \['hidden\.weight'\], unexpected \['head\.weight'\]; strict=False passes them over"
        with pytest.raises(ValueError, match=f"^load_state_dict: names do not match Sequential's: {names}; {shapes}$"):
            model.load_state_dict(state)
        with pytest.raises(ValueError, match=f"^load_state_dict: {shapes}$"):
            model.load_state_dict(state, strict=False)
        assert_same(model.state_dict(), before)

    def test_own_arrays_that_cannot_be_written(self):
        model = network()
        model.fc.bias.data.flags.writeable = False
        before = model.state_dict()
        with pytest.raises(ValueError, match=r"load_state_dict: the module's own fc\.bias is read-only"):
            model.load_state_dict({name: value + 1 for name, value in before.items()})
        assert_same(model.state_dict(), before)
