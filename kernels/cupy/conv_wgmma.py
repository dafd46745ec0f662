"""Convolution on Hopper's tensor cores; src/conv_wgmma.cu and conv_wgmma_weight.cu say how, conv_tensor.py and
conv_tensor_weight.py launch it."""

from tilewise.kernels import gemm_plan
from tilewise.kernels.cupy.conv_direct import CORRELATION
from tilewise.kernels.cupy.conv_sums import WEIGHT
from tilewise.kernels.cupy.gemm_plan import TOO_LITTLE
from tilewise.kernels.cupy.gemm_tensor import LITTLE
from tilewise.kernels.cupy.gemm_wgmma import HOPPER, NARROW, THREADS, WIDE, WgmmaTile
from tilewise.kernels.cupy.launch import Kernel

DTYPES = "float16", "bfloat16"


def _make(name: str, tile: WgmmaTile, last: str, parameters: str) -> Kernel:
    return Kernel(
        f"{name}.cu", f"{name}<{{T}}, {tile.columns}{last}>", parameters, threads=THREADS, dtypes=DTYPES, least=HOPPER,
        target="sm_90a", shared=tile.shared_bytes(), promises=("HGMMA", "LDGSTS", "STG.128", "USETMAXREG"),
    )  # fmt: skip


# (tile, whether channels are last) -> kernel; the tile is pixels x outputs in both layouts
CONVOLUTIONS = {
    (tile, last): _make("conv_wgmma", tile, f", {str(last).lower()}", f"{CORRELATION} q q")
    for tile in (WIDE, NARROW) for last in (False, True)
}  # fmt: skip
WEIGHT_GRADIENTS = {tile: _make("conv_wgmma_weight", tile, "", f"{WEIGHT} q q q") for tile in (WIDE, NARROW)}


def choose_tile(rows: int, columns: int, groups: int, engine, most_parts: int = 1) -> WgmmaTile | str:
    """The largest tile that the product of a group fills by more than half, where they occupy the device; or why there
    is none. most_parts: of the sums, that blocks may share."""
    depth = most_parts * gemm_plan.PART_DEPTH
    tile = gemm_plan.choose_tile(rows, columns, depth, groups, engine.multiprocessors, (WIDE, NARROW, LITTLE))
    return tile if isinstance(tile, WgmmaTile) else TOO_LITTLE
