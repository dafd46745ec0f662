"""CUDA C++ compiled by NVRTC: for which architecture, from the cache or not, and what an error says."""

import re
import sys

import numpy as np
import pytest
from gpu_compile import load_kernels, why_not
from installation import run_python

from tilewise.kernels.cupy import module

KNOWN = (75, 80, 86, 89, 90, 100, 103, 120)
AVERAGE = "pool_average.cu", "avg_pool<float, 4, 2, int>"


@pytest.mark.parametrize(
    ("capability", "known", "target"),
    [
        ((7, 5), KNOWN, "sm_75"),
        ((8, 0), KNOWN, "sm_80"),
        ((8, 7), KNOWN, "sm_86"),
        ((9, 0), KNOWN, "sm_90"),
        ((10, 1), KNOWN, "sm_100"),
        ((12, 1), KNOWN, "sm_120"),
        ((13, 0), KNOWN, "compute_120"),  # later than the compiler: the driver compiles PTX for it
        ((11, 0), KNOWN, "compute_103"),
    ],
)
def test_architecture_of_a_device(capability, known, target):
    assert module.architecture(capability, known) == target


@pytest.mark.parametrize(
    ("capability", "known", "message"),
    [
        ((7, 0), KNOWN, "compute capability 7.0 is too old, the kernels need 7.5"),
        ((7, 5), (80, 90), "the installed NVRTC does not know compute capability 7.5 any more"),
    ],
)
def test_devices_that_are_too_old(capability, known, message):
    with pytest.raises(module.CompileError, match=message):
        module.architecture(capability, known)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache folder of the test's own, and the programs that NVRTC compiled."""
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setattr(module, "_folder", lambda: tmp_path / "cubin")
    return tmp_path / "cubin"


@pytest.fixture
def compilations(monkeypatch):
    done, compiled = [], module.compiled

    def counting(source, expression, target, options=()):
        done.append((source, expression, target))
        return compiled(source, expression, target, options)

    monkeypatch.setattr(module, "compiled", counting)
    return done


def test_machine_code_is_kept(folder, compilations):
    first = module.code(*AVERAGE, "sm_90")
    assert first.binary.startswith(b"\x7fELF")
    assert first.entry.startswith("_ZN8tilewise8avg_pool")
    assert module.code(*AVERAGE, "sm_90") == first
    assert compilations == [(*AVERAGE, "sm_90")]
    module.code(*AVERAGE, "sm_80")
    assert len(list(folder.iterdir())) == len(compilations) == 2


def test_a_file_that_was_cut_off_is_compiled_anew(folder, compilations):
    first = module.code(*AVERAGE, "sm_90")
    (file,) = folder.iterdir()
    for length in (0, 10, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:length])
        again = module.code(*AVERAGE, "sm_90")
        assert (again.entry, len(again.binary)) == (first.entry, len(first.binary))
    assert len(compilations) == 4


def test_changed_sources_are_compiled_anew(folder, compilations, monkeypatch):
    module.code(*AVERAGE, "sm_90")
    monkeypatch.setattr(module, "source_stamp", lambda backend: "another")
    module.code(*AVERAGE, "sm_90")
    assert len(compilations) == 2


def test_stamp_covers_the_sources(tmp_path, monkeypatch):
    from tilewise.kernels import disk_cache

    source = tmp_path / "cupy" / "src" / "a.cu"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    monkeypatch.setattr(disk_cache, "_package_folder", lambda: tmp_path)
    before = disk_cache.source_stamp.__wrapped__("cupy")
    source.write_text("two")
    assert disk_cache.source_stamp.__wrapped__("cupy") != before


def test_what_a_source_is_compiled_of():
    texts = {
        "a.cu": '// "d.cuh"\n#include "b.cuh"\n#include "c.cuh"   // why\n', "b.cuh": '#include "c.cuh"\n',
        "c.cuh": '#include "b.cuh"\n#include "none.cuh"\n', "d.cuh": "", "e.cu": '#include "d.cuh"\n',
    }  # fmt: skip
    assert list(module.included("a.cu", texts)) == ["a.cu", "b.cuh", "c.cuh"]
    assert module.included("e.cu", texts) == {"d.cuh": "", "e.cu": texts["e.cu"]}


def test_works_where_nothing_can_be_kept(compilations, monkeypatch):
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setattr(module, "_folder", lambda: None)
    assert module.code(*AVERAGE, "sm_90").entry == module.code(*AVERAGE, "sm_90").entry
    assert len(compilations) == 2


def test_ptx_for_devices_later_than_the_compiler(folder):
    code = module.code(*AVERAGE, "compute_120")
    assert b".target sm_120" in code.binary
    assert f".entry {code.entry}(".encode() in code.binary


def test_an_error_has_the_log(folder, monkeypatch):
    monkeypatch.setattr(module, "sources", lambda: {"wrong.cu": "namespace tilewise { int f() { return x; } }"})
    with pytest.raises(module.CompileError, match=r'wrong.cu: f<1> for sm_90: .*\n(.*\n)*.*"x" is undefined'):
        module.compiled("wrong.cu", "f<1>", "sm_90")


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    module._nvrtc.cache_clear()
    with pytest.raises(module.CompileError, match=r"CuPy cannot be imported \(extra: cuda13 or cuda12\)"):
        module.compiled(*AVERAGE, "sm_90")
    module._nvrtc.cache_clear()


def test_without_nvrtc(monkeypatch):
    if why_not():
        pytest.skip(why_not())
    from cupy.cuda import nvrtc  # pyright: ignore[reportMissingImports]

    def missing():
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    module._nvrtc.cache_clear()
    with pytest.raises(module.CompileError, match=r"NVRTC, CUDA's compiler, is not there .*: libnvrtc.so.13"):
        module.compiled(*AVERAGE, "sm_90")
    module._nvrtc.cache_clear()


def test_every_kernel_of_the_sources_is_declared():
    """A __global__ function that launch.py does not know would be compiled and run by nobody."""
    declared = {(k.source, k.template.partition("<")[0]) for k in load_kernels("cupy")}
    found = set()
    for name, text in module.sources().items():
        for kernel in re.finditer(r"__global__ void __launch_bounds__\(.*\)\s+(\w+)\(", text):
            found.add((name, kernel[1]))
        assert text.count("__global__") == sum(source == name for source, _ in found)
    assert declared == found


def test_constants_of_the_sources_are_those_of_python():
    from tilewise.kernels import activation_plan, copying_plan, softmax_plan
    from tilewise.kernels.cupy import activation_softmax, launch

    def constant(source, name):
        (value,) = re.findall(rf"constexpr int {name} = (\d+);", module.sources()[source])
        return int(value)

    assert constant("element.cuh", "THREADS") == launch.THREADS == softmax_plan.THREADS
    assert constant("activation_softmax.cu", "SHORT") == softmax_plan.SHORT
    assert constant("activation_softmax_gradient.cu", "SHORT") == activation_softmax.GRADIENT_SHORT
    assert constant("copying.cu", "AXES") == copying_plan.MAX_AXES
    (names,) = re.findall(r"enum Activation : int \{ (.*) \}", module.sources()["activation.cuh"])
    codes = names.split(", ")
    assert [getattr(activation_plan, name) for name in codes] == list(range(len(codes)))
    assert max(activation_plan.ACTIVATION_CODES.values()) < len(codes)


def test_nothing_of_the_backend_needs_numba(tmp_path):
    """Every module of kernels/cupy, and a call on the way to it."""
    code = """
        import sys
        sys.modules["numba"] = sys.modules["numba_cuda"] = None  # importing either raises
        from importlib import import_module
        from pathlib import Path
        import numpy as np
        import tilewise
        from tilewise.kernels import dispatch, machine
        import tilewise.kernels.cupy as package

        names = sorted(p.stem for p in Path(package.__path__[0]).glob("*.py") if p.stem != "__init__")
        for name in names:
            import_module(f"tilewise.kernels.cupy.{name}")
        machine.unavailable_backends = lambda: {"cuda": "not here"}
        dispatch.choose_backend.cache_clear()

        from tilewise.kernels.cupy import driver
        from tilewise.kernels.device_arrays import HostPlace
        started = []

        class Memory:
            pointer = 256

        class Engine:
            def allocate(self, nbytes): return Memory()
            def write(self, memory, array): pass
            def read(self, memory, array): array.fill(7)
            def start(self, form, grid, shared, stream, slots): started.append((form.expression, grid))

        driver.engine = lambda ordinal: Engine()
        for choice in ({"backend": "cupy"}, {"device": "gpu"}):
            with tilewise.using(**choice):
                y = tilewise.avg_pool2d(np.ones((1, 2, 6, 8), np.float32), 2)
        print(y.shape, y.max(), set(started), "pool" in names)
    """
    printed = run_python(code, tmp_path)
    assert printed == "(1, 2, 3, 4) 7.0 {('avg_pool_columns<float, 2, 0>', (1, 1, 1))} True"


def test_parameters_are_packed_as_c_does():
    """Pointers, numbers and structures from multiples of eight bytes on; r is a number of what is summed in."""
    from tilewise.kernels.cupy.launch import KERNELS, Kernel

    kernel = Kernel("none.cu", "none<{T}, {N}>", "P r i 2q3i")
    KERNELS.remove(kernel)
    for name, real, expression in (("float16", "f4", "none<tilewise::Half, 8>"), ("float64", "f8", "none<double, 2>")):
        form = kernel.form(np.dtype(name))
        assert form.expression == expression
        assert form.sizes == [8, np.dtype(real).itemsize, 4, 32]
        slots = form.pack((None, 1.5, -3, 1 << 40, 2, 3, 4, 5))
        offsets = np.array(slots.addresses) - slots.addresses[0]
        assert offsets.tolist() == [0, 8, 16, 24]
        assert len(slots) == 56
        assert np.frombuffer(slots, real, 1, 8) == 1.5
        assert np.frombuffer(slots, np.int32, 1, 16) == -3
        assert np.frombuffer(slots, np.int64, 2, 24).tolist() == [1 << 40, 2]
        assert np.frombuffer(slots, np.int32, 3, 40).tolist() == [3, 4, 5]
        assert form.pack((256, 0, 0, 0, 0, 0, 0, 0)) is slots
    with pytest.raises(TypeError, match=r"declared for .*, not for int8"):
        kernel.form(np.dtype(np.int8))
