"""The command `mxforge`: compile, run, measure, look at and check a model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import MxforgeError, SamplingError, UsageError, needs_compiler

if TYPE_CHECKING:
    from .chat import ChatPiece
    from .engine import Engine
    from .results import Piece
    from .sampling import SamplingParams

_DESCRIPTION = """\
Compile gpt-oss models for one kind of machine, and run them there. `mxforge compile` turns a
CHECKPOINT, the folder of a published model, into an ARTIFACT, the folder of a compiled one."""


def run_command(name: str, run: Callable[[], None]) -> int:
    """Run a command's body; errors become one line on stderr and an exit code, never a traceback.

    With MXFORGE_TRACEBACK set, unexpected errors do show one.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks is escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    code, message = 0, ""
    try:
        run()
        print(end="", flush=True)
    except MxforgeError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        _discard_output()
    except MemoryError:
        code, message = 1, "out of memory; free some, or lower --context-length."
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        code, message = 1, f"{error.strerror or error}{where}"
        if error.errno == errno.ENOSPC:  # perhaps of stdout, which would fail again
            _discard_output()
    except Exception as error:
        if os.environ.get("MXFORGE_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        code = 1
        message = (
            f"this should not happen: {type(error).__name__}: {first}; set MXFORGE_TRACEBACK=1 "
            "to see where, and report it."
        )
    if message:
        print(f"{name}: {message}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Discard buffered output, which would fail at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mxforge", description=_DESCRIPTION)
    top.add_argument("--version", action="version", version=f"mxforge {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    # Here for the list of commands: `main` hands its arguments to the compiler's own parser.
    commands.add_parser("compile", help="compile a checkpoint into an artifact", add_help=False)

    generate = _command(commands, "generate", _generate, "answer one prompt")
    _artifact(generate)
    generate.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to answer; a user's message"
    )
    generate.add_argument(
        "--raw", action="store_true", help="continue TEXT as it is, instead of answering it"
    )
    _sampling_options(generate)
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest tokens that together have this probability, "
        "0 to 1 (default: %(default)s, all tokens)",
    )
    generate.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="choose among the K likeliest tokens (default: %(default)s, all tokens)",
    )
    _reasoning_option(generate)
    _engine_options(generate)
    _json_option(generate)

    chat = _command(commands, "chat", _chat, "talk with the model in this terminal")
    _artifact(chat)
    _sampling_options(chat)
    _reasoning_option(chat)
    chat.add_argument("--hide-thinking", action="store_true", help="show only the answers")
    chat.add_argument(
        "--date", metavar="YYYY-MM-DD", help="current date to tell the model (default: none)"
    )
    _engine_options(chat)

    bench = _command(commands, "bench", _bench, "measure speed, memory and start-up")
    _artifact(bench)
    bench.add_argument(
        "--sweep",
        action="store_true",
        help="find how many prompt tokens a step should take, and how many sequences should run "
        "at once",
    )
    bench.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="length of each prompt, random tokens (default: 128; with --sweep, the largest chunk)",
    )
    bench.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens to generate after each prompt (default: %(default)s)",
    )
    bench.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="sequences at once (default: 1); with --sweep, the most to try (default: as many as "
        "memory allows)",
    )
    bench.add_argument(
        "--depth",
        type=int,
        default=0,
        metavar="N",
        help="tokens already in the context before each prompt; their keys and values are random "
        "(default: %(default)s)",
    )
    _engine_options(bench)
    _json_option(bench)

    inspect = _command(commands, "inspect", _inspect, "describe an artifact or a checkpoint")
    inspect.add_argument("path", metavar="PATH", help="folder of an artifact or of a checkpoint")
    inspect.add_argument(
        "--plan",
        action="store_true",
        help="print the launch plan instead: the functions of the library that runs here, and the "
        "kernels that each calls",
    )
    _json_option(inspect)

    verify = _command(
        commands, "verify", _verify, "compare every file of an artifact with its hash"
    )
    _artifact(verify)

    devices = _command(commands, "devices", _devices, "list what this machine can run models on")
    _json_option(devices)

    diff = _command(
        commands, "diff", _diff, "compare an artifact with its checkpoint, layer by layer"
    )
    _artifact(diff)
    diff.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder that the artifact was compiled from"
    )
    diff.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of the input (default: %(default)s)",
    )
    diff.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the random token ids of the input (default: %(default)s)",
    )
    _json_option(diff)

    export = _command(
        commands,
        "export-onnx",
        _export_onnx,
        "write a checkpoint as an ONNX graph, for other runtimes",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the published model")
    export.add_argument("out", metavar="OUT", help="file of the graph; the weights go to OUT.data")
    export.add_argument(
        "--opset",
        type=int,
        default=18,
        metavar="N",
        help="version of ONNX's operators, 18 to 24 (default: %(default)s)",
    )
    export.add_argument("--force", action="store_true", help="replace files that exist")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compile"]:
        return _compile(argv[1:])
    args = parser().parse_args(argv)
    return run_command(f"mxforge {args.command}", lambda: args.run(args))


def _compile(argv: Sequence[str]) -> int:
    """`mxforge compile`: the compiler's own command line, imported only here."""
    code = 0

    def run() -> None:
        nonlocal code
        with needs_compiler("mxforge compile"):
            from .compile.cli import main as compile_main
        code = compile_main(argv, "mxforge compile")

    return run_command("mxforge compile", run) or code


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def _artifact(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "artifact", metavar="ARTIFACT", help="folder that `mxforge compile` has written"
    )


def _sampling_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (default: as many as fit into the context)",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="randomness of the choice of tokens; 0 always takes the likeliest "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="seed of that choice; the same seed gives the same answer (default: a random one)",
    )


def _engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--context-length",
        type=int,
        default=8192,
        metavar="N",
        help="most tokens of prompt and answer together (default: %(default)s)",
    )
    command.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one for each core)"
    )


def _reasoning_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reasoning",
        choices=("low", "medium", "high"),
        default="medium",
        help="how long the model thinks before it answers (default: %(default)s)",
    )


def _json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def _load(args: argparse.Namespace, max_batch: int | None = 1) -> Engine:
    from .engine import Engine

    return Engine.load(
        args.artifact,
        threads=args.threads,
        context_length=args.context_length,
        max_batch=max_batch,
    )


def _sampling(args: argparse.Namespace, *names: str) -> SamplingParams:
    from .sampling import SamplingParams

    try:
        return SamplingParams(**{name: getattr(args, name) for name in names})
    except SamplingError as error:  # the options are at fault
        raise UsageError(str(error)) from error


def _generate(args: argparse.Namespace) -> None:
    from .text import printable

    params = _sampling(args, "max_tokens", "temperature", "top_p", "top_k", "seed")
    clean = printable if sys.stdout.isatty() else str
    with _load(args) as engine:
        # (piece, its thinking, its text)
        pieces: Iterator[tuple[Piece | ChatPiece, str, str]]
        if args.raw:
            pieces = ((p, "", p.text) for p in engine.stream(args.prompt, params))
        else:
            message = {"role": "user", "content": args.prompt}
            stream = engine.chat_stream([message], params, reasoning_effort=args.reasoning)
            pieces = ((p, p.thinking, p.content) for p in stream)
        thinking, text, last = "", "", None
        tokens: list[int] = []
        for last, thought, said in pieces:
            if not args.json:
                print(printable(thought), end="", file=sys.stderr, flush=True)
                if said and thinking and not text:
                    print("\n", file=sys.stderr, flush=True)
                print(clean(said), end="", flush=True)
            thinking, text = thinking + thought, text + said
            tokens += last.token_ids
        assert last is not None and last.usage is not None and last.timings is not None
        if args.json:
            _print_json(
                {
                    "text": text,
                    "thinking": thinking,
                    "token_ids": tokens,
                    "finish_reason": last.finish_reason,
                    "usage": dataclasses.asdict(last.usage),
                    "timings": dataclasses.asdict(last.timings),
                    "model": engine.manifest.name,
                    "target": engine.target,
                }
            )
            return
        print()
        print(
            f"[{last.usage.prompt_tokens} prompt tokens in {last.timings.prefill_s:.2f} s, "
            f"{last.usage.completion_tokens} new at {last.timings.decode_tok_s:.1f} tok/s, "
            f"ended by {last.finish_reason}]",
            file=sys.stderr,
        )


def _chat(args: argparse.Namespace) -> None:
    from .harmony import iso_date
    from .terminal import Chat, may_style, run

    date = None if args.date is None else iso_date(args.date)
    params = _sampling(args, "max_tokens", "temperature", "seed")
    with _load(args) as engine:
        engine.harmony  # noqa: B018 (loaded now: a model that cannot chat should say so at once)
        chat = Chat(
            engine,
            params,
            reasoning_effort=args.reasoning,
            hide_thinking=args.hide_thinking,
            date=date,
            style=may_style(),
        )
        run(chat, f"{engine.manifest.name} on {engine.target}; /help, Ctrl-D ends")


def _bench(args: argparse.Namespace) -> None:
    from .bench import measure

    if args.sweep:
        _sweep(args)
        return
    prompt_tokens = 128 if args.prompt_tokens is None else args.prompt_tokens
    batch = 1 if args.batch is None else args.batch
    result = measure(
        args.artifact,
        prompt_tokens=prompt_tokens,
        new_tokens=args.new_tokens,
        batch=batch,
        depth=args.depth,
        context_length=args.context_length,
        threads=args.threads,
    )
    if args.json:
        _print_json(result)
        return
    print(f"prefill      {result['prefill_tok_s']:10.1f} tok/s  ({prompt_tokens} tokens)")
    print(f"decode       {result['decode_tok_s']:10.1f} tok/s  (batch {batch})")
    print(f"first token  {result['first_token_s']:10.2f} s      (from process start)")
    print(f"load         {result['load_s']:10.2f} s")
    print(f"memory       {result['peak_rss_bytes'] / 2**30:10.2f} GiB    (peak resident)")
    print(f"on           {result['target']}, {result['threads']} threads")


def _sweep(args: argparse.Namespace) -> None:
    from .bench import AS_GOOD, sweep

    if args.depth:
        raise UsageError("--sweep measures at the beginning of a context; leave --depth out.")
    result = sweep(
        args.artifact,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        most=args.batch,
        context_length=args.context_length,
        threads=args.threads,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        _print_json(result)
        return
    print(f"prompt of {result['prompt_tokens']} tokens")
    print("tokens a step      tok/s     ms a step")
    for row in result["prefill"]:
        speed, step = row["prefill_tok_s"], row["step_s"] * 1e3
        print(f"{row['prefill_chunk']:13} {speed:10.1f} {step:13.1f}")
    print("\nsequences          tok/s     ms a step")
    for row in result["decode"]:
        speed, step = row["decode_tok_s"], row["step_s"] * 1e3
        print(f"{row['batch']:9} {speed:14.1f} {step:13.1f}")
    best = result["best"]
    print(
        f"\nThe least that reach {AS_GOOD:.0%} of the highest speeds: --prefill-chunk "
        f"{best['prefill_chunk']} --max-batch {best['max_batch']}"
    )
    print(f"on {result['target']}, {result['threads']} threads")


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import describe, plan_text

    if args.plan:
        for line in plan_text(args.path):
            print(line)
        return
    description = describe(args.path)
    if args.json:
        _print_json(description)
        return
    for key, value in description.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, list))
        if isinstance(value, list):
            print(f"{key}:")
            for entry in value:
                words = (
                    " ".join(map(str, v)) if isinstance(v, tuple) else str(v)
                    for v in entry.values()
                    if v not in (None, "", ())
                )
                print("  " + "  ".join(words))
        elif value not in (None, ""):
            print(f"{key:12} {value}")


def _verify(args: argparse.Namespace) -> None:
    from .artifact import verify

    result = verify(args.artifact, progress=sys.stderr.isatty())
    result.check()
    print(f"{args.artifact}: {result.files} files, {result.bytes} bytes, all as written")


def _devices(args: argparse.Namespace) -> None:
    from .devices import devices

    found = devices()
    if args.json:
        _print_json([dataclasses.asdict(device) for device in found])
        return
    for device in found:
        memory = "" if device.memory_bytes is None else f"{device.memory_bytes / 2**30:.1f} GiB"
        print(f"{device.kind:8} {device.index}  {device.name:52} {memory:>10}")
        if device.problem:
            print(f"{'':11} not usable: {device.problem}")
        elif device.features:
            print(textwrap.indent(textwrap.fill(" ".join(device.features), 88), " " * 12))
        if device.kind == "vulkan" and not device.problem:
            matrices = ", ".join(device.matrices) or "none: kernels run without"
            print(textwrap.indent(textwrap.fill(f"matrices: {matrices}", 88), " " * 12))


def _diff(args: argparse.Namespace) -> None:
    with needs_compiler("mxforge diff"):
        from .compile.diff import compare
    report = compare(
        args.artifact,
        args.checkpoint,
        tokens=args.tokens,
        seed=args.seed,
        announce=None if args.json else lambda line: print(line, flush=True),
    )
    if args.json:
        _print_json(report.to_json())
    report.check()


def _export_onnx(args: argparse.Namespace) -> None:
    with needs_compiler("mxforge export-onnx"):
        from .compile.onnx_export import export_onnx
    path = export_onnx(
        args.checkpoint,
        args.out,
        opset=args.opset,
        force=args.force,
        announce=lambda text: print(f"mxforge export-onnx: {text}", file=sys.stderr, flush=True),
        progress=sys.stderr.isatty(),
    )
    print(path)


if __name__ == "__main__":
    sys.exit(main())
