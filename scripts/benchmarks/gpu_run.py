"""Run a kit of scripts/bench_gpu on the device at hand: checks first, then speed.

Each step is a process of its own, most valuable first. What a step tells is written to the JSON
file at once, so that a run that is killed, or whose minutes are over, leaves all that it has found.
"""

from __future__ import annotations

import argparse
import json
import lzma
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import markdown
from benchmarks.machine import installed, machine
from benchmarks.results import write_json, write_text

PACKAGES = ("numpy",)
STARTS = 3  # fresh processes
GOOD, NEUTRAL = ("done",), ("skipped", "cut")


def say(text: str) -> None:
    print(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def steps_of(about: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is to do with a kit, in order: `name`, `kind` (see gpu_steps.STEPS), and the
    arguments of that kind in `of`."""
    steps: list[dict[str, Any]] = [{"name": "machine", "kind": "machine"}]
    steps += [{"name": kind, "kind": kind} for kind in ("cases", "nano") if about.get(kind)]
    for model, told in about["models"].items():
        first, *others = told["figures"]

        def step(kind: str, what: str, figure: dict[str, Any], model: str = model) -> Any:
            of = {"model": model, "figure": figure}
            return {"name": f"{model}: {what}", "kind": kind, "of": of}

        steps.append(step("decode", first["name"], first))
        steps.append(step("kernels", "kernels of a token", first))
        steps += [step("decode", figure["name"], figure) for figure in others]
        steps.append({**step("start", "start-up", first), "times": STARTS})
    return steps


@dataclass
class Run:
    """One run of a kit.

    file       where the result goes, after every message of a step
    deadline   of time.monotonic()
    silence_s  a step that says nothing for so long is taken to hang
    """

    kit: Path
    file: Path
    deadline: float
    silence_s: float
    result: dict[str, Any]
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def write(self) -> None:
        write_json(self.file, self.result)

    def step(self, step: dict[str, Any]) -> None:
        """Do one step; its state is in the result afterwards."""
        name = step["name"]
        found: dict[str, Any] = {"state": "running", **step.get("of", {})}
        self.result["steps"][name] = found
        device = self.result["steps"]["machine"]
        if device is not found and device["state"] not in (*GOOD, *NEUTRAL):
            found |= {"state": "skipped", "problem": "the device does not work, see machine"}
        elif time.monotonic() >= self.deadline:
            found |= {"state": "skipped", "problem": "the minutes were over"}
        if found["state"] == "skipped":
            say(f"{name}: skipped, {found['problem']}")
        else:
            say(name)
            self.write()
            began = time.monotonic()
            try:
                if "of" in step or step["kind"] == "machine":
                    self._several(step, found)
                else:
                    self._checks(step, found)
            except BaseException:
                found["state"] = "interrupted"
                raise
            finally:
                found["seconds"] = round(time.monotonic() - began, 1)
                found.pop("at", None)
                self.write()
            problem = found.get("problem", "")
            say(f"{name}: {found['state']}{': ' if problem else ''}{problem}")
        self.write()

    def _several(self, step: dict[str, Any], found: dict[str, Any]) -> None:
        for _ in range(step.get("times", 1)):
            state, problem = self._child(step, found, 0)
            found["state"] = state
            if state != "done":
                found.setdefault("problem", problem)
                return

    def _checks(self, step: dict[str, Any], found: dict[str, Any]) -> None:
        """Case after case; one that ends its process is noted, and another process goes on."""
        kind = step["kind"]
        told = self.result["kit"]
        count = len(told["cases"]) if kind == "cases" else told["nano"]
        found |= {"count": count, "results": []}
        first = 0
        while first < count:
            found.pop("at", None)
            known = len(found["results"])
            state, problem = self._child(step, found, first)
            if state == "done":
                break
            if state == "cut" or kind == "nano" or "at" not in found:
                found["state"], found["problem"] = state, problem
                return
            if not any(result["case"] == found["at"] for result in found["results"][known:]):
                found["results"].append({"case": found["at"], "state": state, "problem": problem})
            first = found["at"] + 1
        wrong = sum(result["state"] != "right" for result in found["results"])
        missing = count - len(found["results"])
        found["state"] = "wrong" if wrong or missing else "done"
        if found["state"] == "wrong":
            found["problem"] = f"{wrong + missing} of {count}"

    def _child(self, step: dict[str, Any], found: dict[str, Any], first: int) -> tuple[str, str]:
        """Run the step's process to its end: how it ended, and what was wrong."""
        words = [sys.executable, str(self.kit / "run.py"), "--step", json.dumps(step)]
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            process = self._process = subprocess.Popen(
                [*words, "--first", str(first)], stdout=subprocess.PIPE, stderr=said, text=True
            )
            try:
                state = self._listen(process, found)
            finally:
                process.kill()
                code = process.wait()
                self._process = None
            said.seek(0)
            lines = [line.strip() for line in said.read().splitlines() if line.strip()]
        last = lines[-1][:300] if lines else ""
        if state != "ended":
            return state, {"hung": f"nothing was heard of it for {self.silence_s:g} s"}.get(
                state, "the minutes were over"
            )
        if code < 0:
            name = signal.Signals(-code).name
            return "crashed", f"{name}{': ' if last else ''}{last}"
        if code:
            return "failed", found.get("problem") or last or f"exit code {code}"
        return "done", ""

    def _listen(self, process: subprocess.Popen[str], found: dict[str, Any]) -> str:
        """Take in what the process tells until it ends, hangs, or the minutes are over."""
        for line in _lines(process, self.deadline, self.silence_s):
            if not line.startswith("{"):
                return line
            message = json.loads(line)
            found |= message.get("put", {})
            for key, value in message.get("append", {}).items():
                found.setdefault(key, []).append(value)
            self.write()
        return "ended"


def _lines(process: subprocess.Popen[str], deadline: float, silence_s: float) -> Iterator[str]:
    """The lines of a process as they come; "hung" or "cut" where no more is waited for."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        left = deadline - time.monotonic()
        try:
            line = lines.get(timeout=max(0.0, min(left, silence_s)))
        except queue.Empty:
            yield "cut" if left <= silence_s else "hung"
            return
        if line is None:
            process.wait()
            return
        yield line


def unpack(kit: Path) -> None:
    """Files that a kit carries compressed, but for the cases'."""
    for packed in kit.glob("*/*.xz"):
        path = packed.with_suffix("")
        if packed.parent.name != "cases" and not path.exists():
            work = path.with_name(f".{path.name}.part")
            with lzma.open(packed) as source, work.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            work.replace(path)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=30, metavar="M",
        help="end after so long, whatever is left (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, default=Path("bench-gpu.json"), metavar="FILE",
        help="where the result goes; the tables go beside it, as .md (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="STEP",
        help="do this step beside `machine`; may be given again (default: all, see --list)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument(
        "--silence", type=float, default=300, metavar="S",
        help="a step that tells nothing for so many seconds hangs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main(kit: Path) -> int:
    options = parser().parse_args()
    if options.step is not None:
        from benchmarks import gpu_steps

        return gpu_steps.main(kit, options.step, options.first)
    about = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
    steps = steps_of(about)
    names = [step["name"] for step in steps]
    if options.list:
        print("\n".join(names))
        return 0
    if unknown := [name for name in options.only or () if name not in names]:
        print(f"run.py: --only takes steps of --list, found {', '.join(unknown)}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {
        "kind": "gpu",
        "kit": summary(about),
        "machine": machine(),
        "versions": {name: installed(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "minutes": options.minutes,
        "steps": {},
    }
    run = Run(kit, options.json, deadline, options.silence, result)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.write()
    interrupted = False
    try:
        unpack(kit)
        for step in steps:
            # On which device, and whether it works at all, belongs to every result.
            if options.only is None or step["name"] in ("machine", *options.only):
                run.step(step)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted")
    text = markdown(result)
    write_text(options.json.with_suffix(".md"), text)
    print(text)
    say(f"written: {options.json} and {options.json.with_suffix('.md')}")
    states = [step["state"] for step in result["steps"].values()]
    if interrupted:
        return 130
    return int(any(state not in (*GOOD, *NEUTRAL) for state in states) or _wrong(result))


def _wrong(result: dict[str, Any]) -> bool:
    """Whether a case is wrong, also where the minutes were over before the last one."""
    return any(
        found["state"] != "right"
        for step in result["steps"].values()
        for found in step.get("results", ())
    )


def summary(about: dict[str, Any]) -> dict[str, Any]:
    """What of a kit's description belongs to a result."""
    keys = ("target", "commit", "made", "versions", "left_out")
    cases = [[case["kernel"], case["case"], case["schedule"]] for case in about.get("cases", ())]
    nano = len(about["nano"]["prompts"]) if about.get("nano") else 0
    return {**{key: about[key] for key in keys}, "cases": cases, "nano": nano}
