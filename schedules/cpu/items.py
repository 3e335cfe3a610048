"""The simple CPU schedule: work items in parallel."""

from __future__ import annotations

import tvm


def parallel_items(func: tvm.tirx.PrimFunc, block: str = "item") -> tvm.tirx.PrimFunc:
    """Run the loops around the block named `block` in parallel; an item's own loops stay.

    Work is split statically, so results do not depend on the number of threads.
    """
    sch = tvm.s_tir.Schedule(func)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock(block))))
    return sch.mod["main"]
