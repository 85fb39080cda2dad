"""The kernels of the fused ops and of the choice, as they are launched."""

from tests.gpu_targets.targets import Case

OPS = "dovetail.platforms.gpu.ops"
KERNELS = f"{OPS}.choice_kernels"
VOCAB, BITS, CHUNKS, CHUNK, BLOCK, LIST, TILE = 151_936, 18, 75, 2048, 64, 4096, 1024
UNITS = 2.0**34
SIZES = {"VOCAB": VOCAB, "ID_BITS": BITS}
TILES = {"PIVOTS": 4, "TILE": TILE}


def cases(target):
    """A few widths of each fused op, and the choice of a large vocabulary."""
    return {
        "peaks": _choice("peaks", "x tops", "row_step", CHUNKS=CHUNKS, CHUNK=CHUNK, BLOCK=BLOCK),
        "plan": _choice(
            "plan",
            "tops temperature top_k top_p tokens finite peak bound state listed",
            TOPS=2400,
            BLOCKS=2374,
            FEW=512,
            LIST=LIST,
            **TILES,
        ),
        "sift": _choice(
            "sift",
            "x temperature floor peak bound state masses numbers listed ranks weights",
            "row_step",
            UNITS=UNITS,
            CHUNKS=CHUNKS,
            CHUNK=CHUNK,
            LIST=LIST,
        ),
        "settle": _choice(
            "settle",
            "top_k top_p uniform tokens peak bound state masses numbers listed ranks weights",
            CHUNKS=CHUNKS,
            COLUMNS=128,
            LIST=LIST,
            **TILES,
        ),
        "search": _choice(
            "search",
            "x temperature floor top_k top_p peak bound state masses",
            "row_step",
            UNITS=UNITS,
            CHUNKS=CHUNKS,
            CHUNK=CHUNK,
            PIVOTS=8,
            TILE=TILE,
            num_warps=8,
        ),
        "draw": _choice(
            "draw",
            "x temperature floor uniform tokens peak bound state masses",
            "row_step",
            UNITS=UNITS,
            CHUNKS=CHUNKS,
            COLUMNS=128,
            CHUNK=CHUNK,
        ),
    }


TYPES = {
    "x": "*fp32",
    "tops": "*i64",
    "tokens": "*i64",
    "finite": "*i1",
    "bound": "*i64",
    "state": "*i32",
    "listed": "*i32",
    "masses": "*i64",
    "numbers": "*i32",
    "ranks": "*i64",
    "weights": "*i64",
}


def _choice(kernel, pointers, numbers="", num_warps=4, **constants):
    signature = {f"{name}_ptr": TYPES.get(name, "*fp32") for name in pointers.split()}
    signature |= dict.fromkeys(numbers.split(), "i32")
    return Case(
        kernel=f"{KERNELS}:{kernel}",
        signature=signature,
        constants={**SIZES, **constants},
        num_warps=num_warps,
    )
