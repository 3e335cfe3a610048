"""compile-model, and the same command as `mxforge compile`: a checkpoint in, an artifact out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from mxforge.cli import run_command
from mxforge.errors import needs_compiler

from . import MAX_BATCH, MAX_PREFILL_CHUNK, compile_model

PROG = "compile-model"

_DESCRIPTION = """\
Compile a gpt-oss checkpoint ahead of time. This reads its folder, generates machine code for
TARGET, packs the weights, and writes all of it into one folder, the artifact, which `mxforge
generate` and `mxforge chat` run."""

_TARGETS = """\
targets:
  cpu              the CPU of this machine, with the best instructions it has
  cpu:LEVEL        CPUs with at least these instructions
                   x86-64: avx512bf16, avx512vnni, avx512, avx2, x86-64-v2, x86-64
                   aarch64: neon-i8mm, neon-dotprod, neon
  cpu:portable     every CPU of this architecture: a library for each level, chosen at load
  cuda             NVIDIA GPUs of sm_80 (Ampere) and later; compiling needs nvcc
  cuda:sm_XX       one architecture, such as sm_75, sm_90a or sm_120a
  vulkan[:PROFILE] GPUs with Vulkan 1.2: desktop (default), mobile, minimum
  metal            Apple GPUs"""


class _FormatOptions:
    """The formats of one option, read when they are needed: loading their tables takes a second."""

    def __init__(self, option: str) -> None:
        self.option = option

    def _names(self) -> tuple[str, ...]:
        from .formats import TABLES

        return TABLES[self.option].options()

    def __iter__(self) -> Iterator[str]:
        """What the help text lists."""
        try:
            return iter(self._names())
        except ImportError:  # help is for those too who have not installed everything yet
            return iter(["listed where mxforge[compile] is installed"])

    def __contains__(self, name: object) -> bool:
        with needs_compiler("Choosing a number format"):
            return name in self._names()


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_TARGETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder with config.json and the .safetensors weights; "
        "with --random-weights a config.json alone is enough",
    )
    parser.add_argument(
        "--target", default="cpu", help="what to compile for, see below (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        metavar="SYSTEM",
        help="system that runs it, for CPUs: linux-x86_64, linux-aarch64, android-aarch64, "
        "darwin-aarch64, darwin-x86_64 or windows-x86_64 (default: this one, or Linux for a CPU of "
        "another architecture)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder to write (default: artifacts/<name of the checkpoint>-<target>)",
    )
    parser.add_argument(
        "--numerics",
        choices=("exact", "fast"),
        default="fast",
        help="exact: float32 throughout; fast: the number formats chosen for speed on the target "
        "(default: %(default)s)",
    )
    formats = parser.add_argument_group(
        "number formats", "Each replaces the one that fast numerics use on the target."
    )
    for option, what in (
        ("kv", "the cache of keys and values"),
        ("activations", "vectors that the experts' weights are multiplied with"),
        ("dense", "weights of attention and of the output layer"),
    ):
        formats.add_argument(
            f"--{option}",
            choices=_FormatOptions(option),
            metavar="FORMAT",
            help=f"{what}: %(choices)s (default: that of --numerics)",
        )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=16,
        metavar="N",
        help=f"most sequences answered at once, 1 to {MAX_BATCH} (default: %(default)s)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="N",
        help=f"most prompt tokens computed in one step, 1 to {MAX_PREFILL_CHUNK} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="leave the weights out; random ones are made at load, to measure speed",
    )
    parser.add_argument(
        "--debug-dump",
        metavar="DIR",
        help="also write the program after every phase of the compiler, and the generated code",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    def run() -> None:
        args = parser(prog).parse_args(argv)
        folder = compile_model(
            args.checkpoint,
            target=args.target,
            host=args.host,
            output=args.output,
            numerics=args.numerics,
            kv=args.kv,
            activations=args.activations,
            dense=args.dense,
            max_batch=args.max_batch,
            prefill_chunk=args.prefill_chunk,
            random_weights=args.random_weights,
            debug_dump=args.debug_dump,
            force=args.force,
            announce=lambda text: print(f"{prog}: {text}", file=sys.stderr, flush=True),
            progress=sys.stderr.isatty(),
        )
        print(folder)

    return run_command(prog, run)


if __name__ == "__main__":
    sys.exit(main())
