"""The command `mxforge`: run, measure, look at and check a compiled model."""

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
Run gpt-oss models that compile-model has compiled. An ARTIFACT is the folder it wrote."""


def run_command(name: str, run: Callable[[], None]) -> int:
    """Run a command's body; errors become one line on stderr and an exit code, never a traceback.

    (With MXFORGE_TRACEBACK set, those that are nobody's fault but ours bring one.)
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal's encoding lacks is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    code, message = 0, ""
    try:
        run()
        print(end="", flush=True)
    except MxforgeError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        _discard_output()
    except MemoryError:
        code, message = 1, "out of memory; free some, or lower --context-length."
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        code, message = 1, f"{error.strerror or error}{where}"
        if error.errno == errno.ENOSPC:  # perhaps of our output, which would fail again
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
    """Let what is still to be written to stdout vanish, instead of failing at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mxforge", description=_DESCRIPTION)
    top.add_argument("--version", action="version", version=f"mxforge {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    generate = commands.add_parser("generate", help="answer one prompt")
    generate.add_argument("artifact", metavar="ARTIFACT")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer")
    generate.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    generate.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token"
    )
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--seed", type=int, metavar="S", help="the same seed, the same answer")
    _reasoning_option(generate)
    generate.add_argument(
        "--raw", action="store_true", help="continue TEXT as it stands, instead of answering it"
    )
    _engine_options(generate)
    _json_option(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with the model in this terminal")
    chat.add_argument("artifact", metavar="ARTIFACT")
    _reasoning_option(chat)
    chat.add_argument("--hide-thinking", action="store_true", help="show answers only")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    chat.add_argument("--temperature", type=float, default=1.0, metavar="T")
    chat.add_argument("--seed", type=int, metavar="S", help="the same seed, the same answers")
    chat.add_argument("--date", metavar="YYYY-MM-DD", help="the day that the model is told")
    _engine_options(chat)
    chat.set_defaults(run=_chat)

    bench = commands.add_parser("bench", help="measure speed, memory and start-up")
    bench.add_argument("artifact", metavar="ARTIFACT")
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    bench.add_argument("--new-tokens", type=int, default=32, metavar="N")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once")
    bench.add_argument(
        "--depth", type=int, default=0, metavar="N",
        help="tokens in the context before each prompt, made up rather than computed",
    )  # fmt: skip
    _engine_options(bench)
    _json_option(bench)
    bench.set_defaults(run=_bench)

    inspect = commands.add_parser("inspect", help="show what an artifact or checkpoint is")
    inspect.add_argument("path", metavar="PATH")
    _json_option(inspect)
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="hash every file of an artifact")
    verify.add_argument("artifact", metavar="ARTIFACT")
    verify.set_defaults(run=_verify)

    devices = commands.add_parser("devices", help="list what this machine can run models on")
    _json_option(devices)
    devices.set_defaults(run=_devices)

    diff = commands.add_parser(
        "diff", help="compare an artifact with its checkpoint, layer by layer"
    )
    diff.add_argument("artifact", metavar="ARTIFACT")
    diff.add_argument("checkpoint", metavar="CHECKPOINT")
    diff.add_argument("--tokens", type=int, default=64, metavar="N", help="length of the input")
    diff.add_argument("--seed", type=int, default=0, metavar="S", help="of the input's token ids")
    _json_option(diff)
    diff.set_defaults(run=_diff)

    export = commands.add_parser(
        "export-onnx", help="write a checkpoint as an ONNX graph, for other runtimes"
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT")
    export.add_argument("out", metavar="OUT", help="the graph; the weights go to OUT.data")
    export.add_argument("--opset", type=int, default=18, metavar="N", help="18 to 24 (default: 18)")
    export.add_argument("--force", action="store_true", help="replace what is there")
    export.set_defaults(run=_export_onnx)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command(f"mxforge {args.command}", lambda: args.run(args))


def _engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--context-length",
        type=int,
        default=8192,
        metavar="N",
        help="most tokens of prompt and answer together (default: 8192)",
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")


def _reasoning_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reasoning",
        choices=("low", "medium", "high"),
        default="medium",
        help="how long the model thinks before it answers (default: medium)",
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

    result = measure(
        args.artifact,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        batch=args.batch,
        depth=args.depth,
        context_length=args.context_length,
        threads=args.threads,
    )
    if args.json:
        _print_json(result)
        return
    print(f"prefill      {result['prefill_tok_s']:10.1f} tok/s  ({args.prompt_tokens} tokens)")
    print(f"decode       {result['decode_tok_s']:10.1f} tok/s  (batch {args.batch})")
    print(f"first token  {result['first_token_s']:10.2f} s      (from process start)")
    print(f"load         {result['load_s']:10.2f} s")
    print(f"memory       {result['peak_rss_bytes'] / 2**30:10.2f} GiB    (peak resident)")
    print(f"on           {result['target']}, {result['threads']} threads")


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import describe

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
                words = (" ".join(v) if isinstance(v, tuple) else str(v) for v in entry.values())
                print("  " + "  ".join(word for word in words if word))
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
