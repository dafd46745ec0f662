"""Every GPU kernel compiles for its architectures, without spills, and has the instructions that it promises."""

import re
from collections import Counter

import gpu_lower
import numpy as np
import pytest
from gpu_compile import (
    BY_NAME,
    assemble,
    compile_all,
    count_promised,
    faults,
    inspect,
    instructions,
    load_kernels,
    promised_blocks,
    resident_blocks,
    stamp,
    why_not,
)

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

from installation import run_python
from numba import cuda
from simt.small import small_kernel

from tilewise.kernels.cuda.launch import ELEMENTS, INT32
from tilewise.kernels.cuda.memory import lanes, load_vector, registers, shared, store_vector

SINGLE = np.dtype(np.float32)
HERE = ("sm_90",)  # the others: make gpu-compile, which takes as long for each


def test_kernels_have_names_of_their_own():
    names = Counter(kernel.name for kernel in load_kernels())
    assert [name for name, count in names.items() if count > 1] == []


def test_every_kernel_compiles_as_promised():
    reports = compile_all([BY_NAME[name] for name in HERE])
    reports += compile_all([BY_NAME["sm_90a"]], "wgmma")  # for nothing else
    assert {r.kernel for r in reports} == {k.name for k in load_kernels()}
    assert faults(reports) == []


def test_inner_loop_of_the_large_tile():
    """Sixteen k of 64 products to 4 loads a thread, and little else."""
    from tilewise.kernels.cuda.gemm_tile import BIG_COPIES

    for kernel in BIG_COPIES.values():
        _, code = assemble(kernel, SINGLE, BY_NAME["sm_90"])
        loop = _longest_loop(code)
        assert [count_promised(p, loop) for p in ("FFMA", "LDS.128")] == [1024, 64]
        assert sum(loop.values()) < 1280
        assert not any(name.startswith(("LDL", "STL")) for name in loop)


def test_loops_of_hopper():
    """A step's products, wgmma, to what the multipliers load of the left operand, without a wait in between where there
    need not be one; and no more registers than the block has got: the warps that take some would wait for ever."""
    from tilewise.kernels.cupy.gemm_wgmma import MATMULS, NARROW, SINGLES, WIDE

    for kernels, counts in (
        (MATMULS[WIDE], [4, 0, 0, 1]),
        (SINGLES["tf32", WIDE], [4, 16, 0, 1]),
        (SINGLES["split", NARROW], [12, 16, 128 + 2 * 16, 2]),  # 16 numbers are split in one of two ways
    ):
        kernel = kernels[True, False]
        said, code = assemble(kernel, kernel.dtypes[0], BY_NAME["sm_90a"])
        code = re.sub(r"^.*@!PT .*$", "", code, flags=re.M)  # never executed: what the assembler puts around a fence
        loop = _longest_loop(code, "HGMMA")
        assert [count_promised(p, loop) for p in ("HGMMA", "LDS", "FADD", "WARPGROUP.DEPBAR")] == counts
        registers = int(re.findall(r"Used (\d+) registers", said)[0])
        (kept,), (taken,) = (re.findall(rf"USETMAXREG\.{what}.* 0x(\w+) ;", code) for what in ("DEALLOC", "TRY_ALLOC"))
        assert 128 * int(kept, 16) + 256 * int(taken, 16) <= 384 * registers


def _longest_loop(code: str, of: str = "FFMA") -> Counter:
    """The instructions between a label and a branch back to it: of the loop that has most of one."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    branches = [(i, m[1]) for i, line in enumerate(lines) if (m := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line))]
    loops = [instructions("\n".join(lines[labels[name] : i + 1])) for i, name in branches if labels[name] < i]
    return max(loops, key=lambda loop: count_promised(of, loop))


# ---- the gate itself


@pytest.mark.parametrize("architecture", ["sm_75", "sm_120"])
def test_gate_compiles_what_a_launch_would(architecture):
    """IR is made once for all architectures; the text is the same as that of a launch, but for numbered names."""
    capability = BY_NAME[architecture].capability
    for kernel in [k for k in load_kernels() if k.name in ("activate_all", "sum_part")]:
        form = kernel.form(SINGLE)
        texts = [gpu_lower.ptx(form, capability), form.ptx(capability)]
        texts = [re.sub(r"shared_memory_\d+", "shared", text.replace(form.entry(text), "entry")) for text in texts]
        texts = [re.sub(r"\.common .* _ZN08NumbaEnv\S+;", "", text) for text in texts]
        assert texts[0] == texts[1]
        assert f".target {architecture}" in texts[0]


def spilling(x: ELEMENTS, y: ELEMENTS):
    """64 numbers at once, in 32 registers a thread (and not the same in all threads, for which there are others)."""
    t = cuda.threadIdx.x
    a, b = registers(x, 8), registers(x, 8)
    sums = registers(x, 64)
    for i in range(64):
        sums[i] = x[64 * t + i]
    for k in range(1000):
        for i in range(8):
            a[i], b[i] = x[8 * k + t + i], y[8 * k + t + i]
        for i in range(8):
            for j in range(8):
                sums[8 * i + j] += a[i] * b[j]
    for i in range(64):
        y[64 * t + i] = sums[i]


def indexed(x: ELEMENTS, y: ELEMENTS, n: INT32):
    values = registers(x, 300)
    for i in range(300):
        values[i] = x[i]
    y[0] = values[n]


@pytest.mark.parametrize(
    ("function", "options", "fault"),
    [
        (spilling, {"threads": 1024, "blocks": 2}, "registers spill"),
        (indexed, {"threads": 32}, "a stack frame of 1200 bytes"),
        (indexed, {"threads": 32, "promises": ("HMMA",)}, "no HMMA"),
        (indexed, {"threads": 32, "promises": {"float64": ("DFMA",)}}, "a stack frame"),
    ],
)
def test_gate_sees(function, options, fault):
    report = inspect(small_kernel(function, **options), SINGLE, BY_NAME["sm_90"])
    assert fault in " ".join(report.faults)
    assert ("no " in " ".join(report.faults)) == ("HMMA" in fault)


def test_gate_reports_what_does_not_compile():
    def wrong(x: ELEMENTS):
        x[0] = "text"

    (fault,) = inspect(small_kernel(wrong, threads=32), SINGLE, BY_NAME["sm_90"]).faults
    assert fault.startswith("does not compile")


def through_shared(x: ELEMENTS, y: ELEMENTS):
    room, values = shared(x, 32 * 16), registers(x, 16)
    load_vector(room, x, cuda.threadIdx.x * lanes(x))
    cuda.syncthreads()
    load_vector(values, room, (31 - cuda.threadIdx.x) * lanes(x))
    store_vector(y, cuda.threadIdx.x * lanes(x), values)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_100"])
def test_vectors_move_with_one_instruction(dtype, architecture):
    promises = ("LDG.128", "STS.128", "LDS.128", "STG.128")
    kernel = small_kernel(through_shared, threads=32, dtypes=(dtype,), promises=promises)
    assert inspect(kernel, np.dtype(dtype), BY_NAME[architecture]).faults == ()


def test_a_report_is_kept_until_what_it_depends_on_changes(monkeypatch):
    from tilewise.kernels.cupy import module

    kernel = next(k for k in load_kernels("cupy") if k.source == "batchnorm.cu")
    about = kernel, SINGLE, BY_NAME["sm_90"]
    before, texts = stamp(*about), module.sources()

    def stamp_after(name):
        with monkeypatch.context() as edited:
            edited.setattr(module, "sources", lambda: texts | {name: texts[name] + "\n"})
            return stamp(*about)

    assert stamp_after("product.cuh") == stamp_after("pool_average.cu") == before
    includes = ("batchnorm.cu", "activation.cuh", "instructions.cuh")  # the last one by others
    assert len({before, *map(stamp_after, includes)}) == 1 + len(includes)
    for name, value in (("_promises", ("HMMA",)), ("_blocks_on", {(9, 0): 7}), ("shared", 16)):
        with monkeypatch.context() as edited:
            edited.setattr(kernel, name, value)
            assert stamp(*about) != before, name
    assert stamp(kernel, np.dtype(np.float64), BY_NAME["sm_90"]) != before


def test_promises_are_matched_part_by_part():
    found = Counter({"LDG.E.128.CONSTANT": 2, "LDG.E": 5, "LDGSTS.E.BYPASS.128": 3, "FFMA": 64, "FFMA.FTZ": 1})
    assert [count_promised(p, found) for p in ("LDG.128", "LDG", "LDGSTS", "FFMA", "HFMA2")] == [2, 7, 3, 65, 0]


@pytest.mark.parametrize(
    ("architecture", "threads", "registers_", "shared_", "blocks"),
    [
        # by registers, threads, blocks and shared memory; the figures of NVIDIA's occupancy calculator
        ("sm_80", 256, 128, 0, 2),
        ("sm_80", 256, 32, 0, 8),
        ("sm_80", 32, 16, 0, 32),
        ("sm_80", 128, 32, 48 << 10, 3),
        ("sm_75", 256, 64, 32 << 10, 2),
        ("sm_90", 256, 33, 0, 6),
        ("sm_120", 1024, 64, 0, 1),
    ],
)
def test_blocks_that_fit(architecture, threads, registers_, shared_, blocks):
    assert resident_blocks(BY_NAME[architecture], threads, registers_, shared_) == blocks


def test_small_shared_memory_allows_fewer_blocks_than_promised():
    kernel = small_kernel(indexed, threads=128, blocks=3)
    shalls = [promised_blocks(kernel, BY_NAME[name], 34 << 10) for name in ("sm_75", "sm_80", "sm_120")]
    assert shalls == [1, 3, 2]
    assert promised_blocks(kernel, BY_NAME["sm_90"], 100 << 10) == 3, "what sm_90 cannot hold is a fault"
    assert promised_blocks(kernel, BY_NAME["sm_120"], 0) == 3
    assert promised_blocks(kernel, BY_NAME["sm_75"], 65 << 10) == 1, "what it cannot hold is a fault there too"


def test_kernel_refuses_a_dtype_it_is_not_for():
    kernel = small_kernel(indexed, threads=32, dtypes=("float32",))
    with pytest.raises(TypeError, match=r"kernel indexed is declared for \['float32'\], not for float64"):
        kernel.form(np.dtype(np.float64))


def test_numpy_without_row_stack(tmp_path):
    """As from NumPy 2.5 on."""
    code = """
import numpy as np
if vars(np).pop("row_stack", None):
    np.__all__.remove("row_stack")
import tilewise.kernels.cuda
from numba import cuda
text, _ = cuda.compile_ptx(lambda x: None, cuda.types.void(cuda.types.int32), cc=(9, 0))
print(".entry" in text, "row_stack" in vars(np))
"""
    assert run_python(code, tmp_path) == "True False"
