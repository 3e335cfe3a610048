"""What sm_90a alone has, counted in its machine code: wgmma (HGMMA) and bulk copies (UBLKCP)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .sass import Instruction, main_loop

WGMMA, BULK_COPY, WAIT = "HGMMA", "UBLKCP", "WARPGROUP.DEPBAR"
_SHAPE = re.compile(r"^HGMMA\.64x(\d+)x16\.")  # of bfloat16
# Multiplications and additions of bfloat16 in a cycle by the tensor cores of an SM (NVIDIA H100
# Tensor Core GPU Architecture: 989 TFLOPS dense, 132 SMs, 1.83 GHz).
A_CYCLE = 2048


def statistics(code: Sequence[Instruction]) -> dict[str, Any]:
    """Of a kernel with wgmma:

    wgmma, bulk_copies: how many there are
    empty_groups: that ptxas added. A wait for all groups but some of the newest counts them.
    waits_a_wgmma: in the main loop, of its widest. ptxas makes it 1 where it cannot let several be
        under way.
    slots_a_cycle: instructions of the main loop, of a warp, for each cycle that its widest wgmma
        take of the tensor cores; less wide ones stand in their place. Below 1 the tensor cores set
        the pace, whatever the number of warps.
    """
    count = sum(one.opcode.startswith(WGMMA) for one in code)
    if not count:
        return {}
    opcodes = [code[i].opcode for i in main_loop(code, (WGMMA,))]
    shapes = [match for opcode in opcodes if (match := _SHAPE.match(opcode))]
    widest = max((int(shape[1]) for shape in shapes), default=0)
    wide = sum(int(shape[1]) == widest for shape in shapes)
    slots = len(opcodes) - (len(shapes) - wide)
    cycles = wide * 64 * widest * 16 / A_CYCLE
    waits = sum(opcode.startswith(WAIT) for opcode in opcodes)
    return {
        "wgmma": count,
        "bulk_copies": sum(one.opcode.startswith(BULK_COPY) for one in code),
        "empty_groups": sum(
            one.opcode.startswith(WGMMA) and one.operands[:1] == ("RZ",) for one in code
        ),
        "waits_a_wgmma": round(waits / max(wide, 1), 3),
        "slots_a_cycle": round(slots / cycles, 3) if cycles else 0.0,
    }
