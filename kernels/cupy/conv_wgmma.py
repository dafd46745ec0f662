"""Convolution on Hopper's tensor cores; src/conv_wgmma.cu says how, and conv_tensor.py launches it."""

from tilewise.kernels import gemm_plan
from tilewise.kernels.cupy.conv_direct import CORRELATION
from tilewise.kernels.cupy.gemm_plan import TOO_LITTLE
from tilewise.kernels.cupy.gemm_tensor import LITTLE
from tilewise.kernels.cupy.gemm_wgmma import HOPPER, NARROW, WIDE, WgmmaTile
from tilewise.kernels.cupy.launch import Kernel

_THREADS = 384
DTYPES = "float16", "bfloat16"


def _make(tile: WgmmaTile, last: bool) -> Kernel:
    return Kernel(
        "conv_wgmma.cu", f"conv_wgmma<{{T}}, {tile.columns}, {str(last).lower()}>", f"{CORRELATION} q q",
        threads=_THREADS, dtypes=DTYPES, least=HOPPER, target="sm_90a", shared=tile.shared_bytes,
        promises=("HGMMA", "LDGSTS", "STG.128", "USETMAXREG"),
    )  # fmt: skip


# (tile, whether channels are last) -> kernel; the tile is pixels x outputs in both layouts
CONVOLUTIONS = {(tile, last): _make(tile, last) for tile in (WIDE, NARROW) for last in (False, True)}


def choose_tile(rows: int, columns: int, groups: int, engine) -> WgmmaTile | str:
    """The largest tile that the product of a group fills by more than half, where they occupy the device; or why there
    is none."""
    tile = gemm_plan.choose_tile(rows, columns, 1, groups, engine.multiprocessors, (WIDE, NARROW, LITTLE))
    return tile if isinstance(tile, WgmmaTile) else TOO_LITTLE
