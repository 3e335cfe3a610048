"""Run kernels of the registry on the CPU as CUDA or Metal, and print what their memory costs.

    PYTHONPATH=tests .venv/bin/python -m support.simt [KERNEL …] [--kind cuda] [--case NAME]

A line a case: whether it agrees with the reference, or what went wrong; then for each kind of
access its passes (32-byte sectors of global memory, or passes over the banks of shared memory)
divided by the fewest that could do. docs/simt.md explains the reports.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.kernels import compare, made_inputs, run_name, runs

from mxforge.schedules.kernel import Case, Kernel, Schedule

from .harness import ORDERS, Cost, Fault, Simt
from .kernels import TARGETS, program_of, run_case
from .toolchain import build_runtime

LARGE = 10**8  # operations of a case that only runs when it is named


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="mxforge-simt-") as folder:
        build_runtime(Path(folder))
        simt = Simt(Path(folder))
        for kind in options.kind or TARGETS:
            for run in _chosen(options, kind):
                print(f"{kind}  {run_name(*run)}  {_outcome(simt, kind, *run)}")
                print("".join(map(_shown, simt.costs().items())), flush=True)
                if options.text:
                    print(program_of(simt, kind, *run).text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m support.simt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="which (default: all)")
    parser.add_argument(
        "--kind", action="append", choices=tuple(TARGETS), help="as which text (default: both)"
    )
    parser.add_argument("--case", help="part of a case's name (default: all but large ones)")
    parser.add_argument("--text", action="store_true", help="print the device's text too")
    return parser.parse_args()


def _chosen(options: argparse.Namespace, kind: str) -> Iterator[tuple[Kernel, Case, Schedule]]:
    for kernel, case, schedule in runs(TARGETS[kind]):
        wanted = options.case in case.name if options.case else case.flops < LARGE
        if wanted and (not options.kernels or kernel.name in options.kernels):
            yield kernel, case, schedule


def _outcome(simt: Simt, kind: str, kernel: Kernel, case: Case, schedule: Schedule) -> str:
    for order in ORDERS:
        try:
            program = program_of(simt, kind, kernel, case, schedule)
            last = order == ORDERS[-1]  # to count takes long
            results = run_case(simt, program, kernel, case, schedule, order, counting=last)
            compare(kernel, case, made_inputs(case), results)
        except (Fault, AssertionError) as error:
            return f"{order} order: {error}"
    return "agrees in every order"


def _shown(cost: tuple[str, Cost]) -> str:
    what, of = cost
    if not of.requests:
        return ""
    return (
        f"    {what:12}  {of.requests:9,} requests  {of.bytes:12,} bytes  {of.passes:10,} passes"
        f"  {of.passes / of.ideal:5.2f} × the fewest\n"
    )


if __name__ == "__main__":
    main()
