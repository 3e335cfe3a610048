"""The command `mxforge` as its users call it: output, exit codes, never a traceback."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mxforge import __version__
from mxforge.cli import main, run_command
from mxforge.errors import ArtifactError, UsageError

MXFORGE = [sys.executable, "-c", "import sys; from mxforge.cli import main; sys.exit(main())"]


def mxforge(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*MXFORGE, *map(os.fsdecode, map(_plain, arguments))]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    done = subprocess.run(command, timeout=120, **options)
    assert "Traceback" not in (done.stderr or "")
    return done


def _plain(argument: object) -> str | bytes:
    return argument if isinstance(argument, bytes) else str(argument)


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command run in this process."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def one_object(text: str) -> dict:
    """The JSON object that is all of `text`; NaN and the like are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    value = json.loads(text, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


# ------------------------------------------------------------------------------------ generate


def test_generate_prints_the_answer_and_nothing_else(text_artifact: Path) -> None:
    done = mxforge("generate", text_artifact, "--prompt", "hello", "--raw", "--max-tokens", 5)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert "[1 prompt tokens in " in done.stderr
    assert "ended by " in done.stderr


def test_generate_json_is_one_object(text_artifact: Path) -> None:
    arguments = ("generate", text_artifact, "--prompt", "hello", "--raw", "--json", "--seed", 3)
    done = mxforge(*arguments, "--max-tokens", 8, "--top-k", 50, "--top-p", 0.9)
    assert (done.returncode, done.stderr) == (0, "")
    answer = one_object(done.stdout)
    assert answer.keys() >= {"text", "token_ids", "finish_reason", "usage", "timings", "target"}
    assert 1 <= len(answer["token_ids"]) <= 8
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert answer["usage"]["prompt_tokens"] == 1
    again = one_object(mxforge(*arguments, "--max-tokens", 8, "--top-k", 50, "--top-p", 0.9).stdout)
    assert (again["text"], again["token_ids"]) == (answer["text"], answer["token_ids"])


def test_the_answer_is_the_engines(text_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("generate", text_artifact, "--prompt", "hello", "--temperature", 0, "--max-tokens", 6)
    _, raw, _ = here(capsys, *common, "--raw", "--json")
    _, plain, _ = here(capsys, *common, "--raw")
    from mxforge import Engine, SamplingParams

    with Engine.load(text_artifact) as engine:
        params = SamplingParams(max_tokens=6, temperature=0)
        assert one_object(raw)["token_ids"] == list(engine.generate("hello", params).token_ids)
    assert plain == one_object(raw)["text"] + "\n"


def test_without_raw_the_prompt_is_a_message(
    chat_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("generate", chat_artifact, "--prompt", "hello", "--temperature", 0, "--max-tokens", 6)
    _, out, _ = here(capsys, *common, "--json", "--reasoning", "high")
    _, plain, _ = here(capsys, *common, "--reasoning", "high")
    from mxforge import Engine, SamplingParams

    with Engine.load(chat_artifact) as engine:
        params = SamplingParams(max_tokens=6, temperature=0)
        message = {"role": "user", "content": "hello"}
        answer = engine.chat([message], params, reasoning_effort="high")
    found = one_object(out)
    assert found["token_ids"] == list(answer.token_ids)
    assert (found["text"], found["thinking"]) == (answer.content, answer.thinking)
    assert found["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert plain == answer.content + "\n"


def test_a_model_without_harmony_needs_raw(
    text_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = here(capsys, "generate", text_artifact, "--prompt", "hello")
    assert (code, out) == (1, "")
    assert "--raw" in err


def test_text_that_stdout_cannot_show_is_no_error(text_artifact: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    arguments = ("--prompt", "x", "--raw", "--max-tokens", 60, "--seed", 1, "--temperature", 5)
    done = mxforge("generate", text_artifact, *arguments, env=environment)
    assert done.returncode == 0
    assert "\\ufffd" in done.stdout


def test_a_prompt_that_is_no_utf8_is_taken(text_artifact: Path) -> None:
    done = mxforge(
        "generate", text_artifact, "--prompt", b"\xff\xfeab", "--raw", "--max-tokens", 2, "--json"
    )
    assert done.returncode == 0
    assert one_object(done.stdout)["usage"]["prompt_tokens"] > 1


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "0"),
        ("--max-tokens", "-1"),
        ("--max-tokens", "1e9"),
        ("--max-tokens", "99999999999999999999"),
        ("--max-tokens", "9" * 5000),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "-1"),
        ("--temperature", "warm"),
        ("--top-p", "2"),
        ("--top-p", "-0.1"),
        ("--top-k", "-5"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--context-length", "0"),
        ("--context-length", "-8"),
        ("--context-length", "many"),
        ("--threads", "0"),
        ("--threads", "100000"),
        ("--unknown",),
        ("--json", "extra"),
    ],
    ids=lambda options: " ".join(options)[:30],
)
def test_absurd_options_exit_with_2(
    text_artifact: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str]
) -> None:
    code, out, err = here(capsys, "generate", text_artifact, "--prompt", "x", "--raw", *options)
    assert (code, out) == (2, "")
    assert err.startswith(("usage:", "mxforge generate:"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--prompt", "", "--raw"), 2, "at least one token"),
        (("--prompt", "x", "--raw", "--context-length", 10**12), 2, "at most 131072"),
        (("--prompt", "ab" * 100, "--raw", "--context-length", 20), 1, "fewer than 20 tokens"),
    ],
)
def test_prompts_that_cannot_be_answered(
    text_artifact: Path,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[object],
    code: int,
    message: str,
) -> None:
    for more in ((), ("--json",)):
        found, out, err = here(capsys, "generate", text_artifact, *options, *more)
        assert (found, out) == (code, "")
        assert message in err
        assert err.count("\n") == 1


def test_a_model_without_a_tokenizer_takes_no_text(
    odd_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), ("--raw",)):
        code, out, err = here(capsys, "generate", odd_artifact, "--prompt", "hello", *more)
        assert (code, out) == (1, "")
        assert "compiled without a tokenizer" in err


def test_a_reader_that_goes_away_is_no_error(text_artifact: Path) -> None:
    command = [*MXFORGE, "generate", str(text_artifact), "--prompt", "x", "--raw", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=60) == 0
    assert errors == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(text_artifact: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = mxforge("inspect", text_artifact, stdout=full)
    assert (done.returncode, done.stderr) == (1, "mxforge inspect: No space left on device\n")


def test_ctrl_c_ends_within_a_step(text_artifact: Path) -> None:
    command = [*MXFORGE, "generate", str(text_artifact), "--prompt", "x", "--raw"]
    command += ["--context-length", "131072", "--top-k", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode()) == (130, "mxforge generate: interrupted\n")


# -------------------------------------------------------------------------- bench, inspect, verify


def test_bench_json_has_what_is_promised(text_artifact: Path) -> None:
    done = mxforge(
        "bench", text_artifact, "--prompt-tokens", 10, "--new-tokens", 4, "--batch", 2, "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = one_object(done.stdout)
    numbers = {"prefill_tok_s", "decode_tok_s", "first_token_s", "load_s", "peak_rss_bytes"}
    assert result.keys() >= {*numbers, "threads", "target"}
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in numbers)
    assert 0.01 < result["first_token_s"] < 60
    assert result["load_s"] < result["first_token_s"]
    assert 20e6 < result["peak_rss_bytes"] < 4e9


def test_bench_prints_a_table(text_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = here(capsys, "bench", text_artifact, "--prompt-tokens", 8, "--new-tokens", 2)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "prefill", "decode", "first", "load", "memory", "on",
    ]  # fmt: skip


def test_a_sweep_names_the_options_to_compile_with(
    text_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--sweep", "--new-tokens", 2, "--prompt-tokens", 40, "--batch", 2)
    code, out, err = here(capsys, "bench", text_artifact, *options)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if len(row) == 3] == ["32", "1", "2"]
    assert "--prefill-chunk" in out
    assert "--max-batch" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--sweep", "--depth", "64"),
        ("--sweep", "--batch", "0"),
        ("--batch", "0"),
        ("--batch", "17"),
        ("--prompt-tokens", "0"),
        ("--new-tokens", "-3"),
        ("--prompt-tokens", "10000", "--context-length", "64"),
    ],
    ids=lambda options: " ".join(options)[:30],
)
def test_absurd_measurements_exit_with_2(
    text_artifact: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str]
) -> None:
    code, out, err = here(capsys, "bench", text_artifact, "--json", *options)
    assert (code, out) == (2, "")
    assert err.startswith("mxforge bench: ")


def test_inspect_json_lists_the_kernels(
    text_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = here(capsys, "inspect", text_artifact, "--json")
    assert (code, err) == (0, "")
    description = one_object(out)
    assert description["kind"] == "artifact"
    for kernel in description["kernels"]:
        assert {"name", "target", "schedule", "tile"} <= kernel.keys()


def test_inspect_shows_artifacts_and_checkpoints(
    text_artifact: Path, text_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = here(capsys, "inspect", text_artifact)
    assert code == 0
    assert "kernels:" in out
    code, out, _ = here(capsys, "inspect", text_checkpoint)
    assert code == 0
    assert "model.safetensors" in out
    code, out, _ = here(capsys, "inspect", text_checkpoint, "--json")
    assert one_object(out)["kind"] == "checkpoint"


def test_verify_finds_what_changed(
    text_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = here(capsys, "verify", text_artifact)
    assert (code, err) == (0, "")
    assert "all as written" in out
    changed = Path(shutil.copytree(text_artifact, tmp_path / "changed"))
    (weights,) = changed.glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    code, out, err = here(capsys, "verify", changed)
    assert (code, out) == (1, "")
    assert f"changed: {weights.name!r}" in err
    (changed / "stray").write_text("")
    weights.unlink()
    code, _, err = here(capsys, "verify", changed)
    assert code == 1
    assert f"missing: {weights.name!r}" in err
    assert "not part of it: 'stray'" in err


@pytest.mark.parametrize("command", ["generate", "bench", "inspect", "verify"])
def test_what_is_no_artifact_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    more = ("--prompt", "x") if command == "generate" else ()
    for path in (tmp_path / "absent", tmp_path, file, file / "below", ""):
        code, out, err = here(capsys, command, path, *more)
        assert (code, out) == (1, "")
        assert err.startswith(f"mxforge {command}: ")
        assert err.count("\n") == 1


def test_paths_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    done = mxforge("inspect", os.fsencode(tmp_path) + b"/\xff")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/\\udcff should be the folder of an artifact" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("generate",), ("inspect",), ("inspect", "a", "b"), ("verify", "--force", "x")],
)
def test_wrong_calls_exit_with_2(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    code, out, err = here(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: mxforge")


def test_diff_needs_both(text_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(capsys, "diff", text_artifact)[0] == 2
    code, out, _ = here(capsys, "diff", text_artifact, text_artifact / "absent", "--json")
    assert (code, out) == (1, "")


# ---------------------------------------------------------------------------------- the command


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert here(capsys, "--version") == (0, f"mxforge {__version__}\n", "")


@pytest.mark.parametrize(
    "statement",
    [
        "import mxforge",
        "import mxforge.cli; mxforge.cli.parser().format_help()",
        "import mxforge.compile",
        "import mxforge.compile.cli; mxforge.compile.cli.parser().parse_args(['x'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    heavy = ("numpy", "tvm", "tvm_ffi", "tiktoken", "tokenizers", "torch")
    code = f"import sys\n{statement}\nprint([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("option", ["--help", "generate --help", "bench --help", "diff --help"])
def test_help_is_given(capsys: pytest.CaptureFixture[str], option: str) -> None:
    code, out, err = here(capsys, *option.split())
    assert (code, err) == (0, "")
    assert out.startswith("usage: mxforge")


def raising(error: BaseException):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("a and b"), 2, "a and b"),
        (ArtifactError("is none"), 1, "is none"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: /x"),
        (OSError("odd"), 1, "odd"),
        (ValueError("first\nsecond"), 1, "this should not happen: ValueError: first; set"),
        (RuntimeError(), 1, "this should not happen: RuntimeError: ; set"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    assert run_command("mxforge test", raising(error)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mxforge test: {message}")
    assert captured.err.count("\n") == 1


def test_a_traceback_comes_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFORGE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="first"):
        run_command("mxforge test", raising(ValueError("first")))
    assert run_command("mxforge test", raising(UsageError("a"))) == 2
