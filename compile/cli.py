"""compile-model: a checkpoint in, an artifact out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from mxforge.cli import run_command

from . import MAX_BATCH, MAX_PREFILL_CHUNK, compile_model

_DESCRIPTION = """\
Compile a gpt-oss checkpoint ahead of time: read its folder, generate machine code for TARGET,
pack the weights, and write it all as one artifact folder that `mxforge generate` runs."""

_TARGETS = """\
targets:
  cpu              this machine's CPU, with the best instructions it has (default)
  cpu:LEVEL        x86-64: avx512bf16, avx512vnni, avx512, avx2, x86-64-v2, x86-64
                   aarch64: neon-i8mm, neon-dotprod, neon; on any machine, for Linux
  cpu:portable     every CPU of this architecture: a library for each level, chosen at load
  cuda[:sm_XX]     NVIDIA GPUs; building needs nvcc
  vulkan           GPUs with Vulkan 1.2, of any maker; vulkan:desktop, vulkan:mobile, vulkan:minimum
  metal            Apple GPUs"""


class _FormatOptions:
    """The formats of one option, read when they are needed: loading their tables takes a second."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __iter__(self) -> Iterator[str]:
        from .formats import TABLES

        return iter(TABLES[self.option].options())

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile-model",
        description=_DESCRIPTION,
        epilog=_TARGETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder with config.json and the .safetensors weights; or a bare config.json",
    )
    parser.add_argument("--target", default="cpu", help="what to compile for; see below")
    parser.add_argument(
        "--output", metavar="DIR", help="artifact folder (default: artifacts/<name>-<target>)"
    )
    parser.add_argument(
        "--numerics",
        choices=("exact", "fast"),
        default="fast",
        help="fast: what the target does best (default); exact: float32 throughout",
    )
    formats = parser.add_argument_group("number formats in place of what fast numerics take")
    for option, what in (
        ("kv", "the cache of keys and values"),
        ("activations", "what the experts' weights are multiplied with; int8 has a scale for 32"),
        ("dense", "weights of attention and of the output layer"),
    ):
        formats.add_argument(
            f"--{option}",
            choices=_FormatOptions(option),
            metavar="FORMAT",
            help=f"{what}: %(choices)s (default: as the target does best)",
        )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=16,
        metavar="N",
        help=f"most sequences answered at once, up to {MAX_BATCH} (default: 16)",
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="N",
        help=f"most prompt tokens in one step, up to {MAX_PREFILL_CHUNK} (default: 512)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="leave the weights out; the runtime makes random ones, to measure speed",
    )
    parser.add_argument(
        "--debug-dump", metavar="DIR", help="write the IR after every phase, and the code, here"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def run() -> None:
        folder = compile_model(
            args.checkpoint,
            target=args.target,
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
            announce=lambda text: print(f"compile-model: {text}", file=sys.stderr, flush=True),
            progress=sys.stderr.isatty(),
        )
        print(folder)

    return run_command("compile-model", run)


if __name__ == "__main__":
    sys.exit(main())
