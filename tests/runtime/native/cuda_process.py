"""A process of its own for test_core_cuda.py: libmxforge on the fake driver, or on the CPU.

    python cuda_process.py SCENARIO FOLDER [cpu]

prints what the scenario saw, as JSON. FOLDER holds what the fixture `built` made.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (NumPy's names of dtypes)
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.simt.driver import Driver

from mxforge import SamplingParams
from mxforge.artifact import open_artifact
from mxforge.core import CoreLibrary, CoreSequences
from mxforge.errors import MxforgeError
from mxforge.plan import Constant, Plan
from mxforge.steps import Draw, Part

FOLDER = Path(sys.argv[2])
ON_CPU = sys.argv[3:] == ["cpu"]
OUT_OF_MEMORY, NO_BINARY = 2, 209
GREEDY = Draw(SamplingParams(temperature=0, logprobs=3), 0)
RANDOM = Draw(SamplingParams(temperature=0.9, logprobs=3), 5)
PENALIZED = Draw(SamplingParams(temperature=0.9, repetition_penalty=1.5, logprobs=3), 5)
PROMPTS = ([1, 2, 3, 4, 5], [9, 8, 7])


def fake() -> Driver:
    return Driver(FOLDER / "driver", FOLDER / "sources", FOLDER / "objects")


class Model(CoreSequences):
    """One of the two artifacts; it answers `PROMPTS`."""

    def __init__(self) -> None:
        artifact = open_artifact(FOLDER / ("cpu" if ON_CPU else "cuda"))
        super().__init__(artifact, threads=1, context=64, max_batch=4, prefill_chunk=32)

    def drawn(self) -> list[tuple[int, float]]:
        """(token, its log-probability) of each part of the step that is awaited."""
        return [(result.token, result.logprob.logprob) for result in self.wait() if result.logprob]

    def begin(self, draw: Draw) -> list[int]:
        sequences = [self.create([])[0] for _ in PROMPTS]
        prompts = zip(sequences, PROMPTS, strict=True)
        self.submit([Part(sequence, prompt, 0, draw) for sequence, prompt in prompts])
        return sequences

    def answer(self, draw: Draw, steps: int, *, ahead: bool, other: bool = False) -> list[Any]:
        """What `PROMPTS` are answered with; each step is submitted before the one before it is
        awaited, or after that. In one of them a third sequence begins."""
        sequences = self.begin(draw)
        seen = []
        for step in range(steps):
            if not ahead:
                seen.append(self.drawn())
            parts = [Part(sequence, None, 0, draw) for sequence in sequences]
            if other and step == 2:
                parts.append(Part(self.create([])[0], [4, 4, 6]))
            self.submit(parts)
            if ahead:
                seen.append(self.drawn())
        seen.append(self.drawn())
        for sequence in sequences:
            self.free(sequence)
        return seen


def functions() -> Any:
    """Calls the functions whose arguments lie in FOLDER, and leaves what came of them there."""
    driver = fake()
    library = CoreLibrary("cuda", FOLDER / "cuda/model.plan", FOLDER / "cuda/model.fatbin", 1)
    for path in sorted(FOLDER.glob("call-*.npz")):
        with np.load(path) as stored:
            given = {name: stored[name] for name in stored.files}
        name = str(given.pop("function"))
        arguments = [
            np.array(given[tensor.name]).view(tensor.dtype) for tensor in library[name].arguments
        ]
        outputs = library.call(name, arguments)
        names = [tensor.name for tensor in library[name].arguments]
        named = dict(zip(names, arguments, strict=True))
        caches = {key: value for key, value in named.items() if key.startswith("kv_")}
        np.savez(FOLDER / f"result-{path.name}", output=outputs[0], **caches)
    library.close()
    return driver.live


def nothing(model: Model, driver: Driver) -> Any:
    """What is drawn where all logits are NaN, by a step and by one ahead that goes on with it; and
    by one that comes when that is known."""
    weights = {each.name: each for each in open_artifact(FOLDER / "cuda").manifest.weights}
    driver.spoil(math.prod(weights["lm_head.weight"].shape) * 2)
    sequence, _ = model.create([])
    model.submit([Part(sequence, PROMPTS[0], 0, GREEDY)])
    model.submit([Part(sequence, None, 0, GREEDY)])
    drawn = [model.wait()[0].token, model.wait()[0].token]
    return [*drawn, outcome(lambda: model.submit([Part(sequence, None, 0, GREEDY)]))]


def kept(model: Model) -> Any:
    """How much of what was answered ahead is known to be computed, and is reused."""
    prompt = list(range(20, 32))
    sequence, _ = model.create([])
    model.submit([Part(sequence, prompt, 0, GREEDY)])
    drawn = []
    for _step in range(6):
        model.submit([Part(sequence, None, 0, GREEDY)])
        drawn.append(model.wait()[0].token)
    model.wait()
    model.keep(sequence)
    return model.create([*prompt, *drawn])[1]


def grown(model: Model, driver: Driver | None) -> Any:
    """What a step draws while the next one, which is submitted before, takes new memory in place of
    the logits that the first draws from; the logits of the next one; and how often its submission
    waits."""
    sequences = model.begin(GREEDY)
    before = driver.count("waits") if driver else 0
    model.submit([Part(sequences[0], None), Part(model.create([])[0], [3, 1, 4, 1, 5, 9], 6)])
    waits = driver.count("waits") - before if driver else 0
    return [model.drawn(), logits(model, 1), waits]


def logits(model: Model, part: int) -> Any:
    """Those of a part of the step that is awaited."""
    found = model.wait()[part].logits
    assert found is not None
    return found.tolist()


def answers() -> Any:
    driver = None if ON_CPU else fake()
    model = Model()
    seen = {
        "greedy": model.answer(GREEDY, 6, ahead=True),
        "random": model.answer(RANDOM, 6, ahead=True),
        "random, in turn": model.answer(RANDOM, 6, ahead=False),
        "another begins": model.answer(RANDOM, 4, ahead=True, other=True),
        "penalized": model.answer(PENALIZED, 4, ahead=True),
        "grown": grown(model, driver),
    }
    model.submit([Part(model.create([])[0], [5, 6, 7], 2)])
    seen["logits"] = logits(model, 0)
    if driver is not None:
        seen["reused"] = kept(model)
        seen["nothing"] = nothing(model, driver)
    model.close()
    return {**seen, "live": driver.live if driver else 0}


def ahead() -> Any:
    """What a step's submission, and then its predecessor's awaiting, count; one after the other."""
    driver = fake()
    model = Model()
    sequences = model.begin(GREEDY)
    names = ("waits", "kernels", "overlapping", "cuLaunchKernelEx", "cuGraphLaunch")

    def counts() -> np.ndarray:
        return np.array([driver.count(name) for name in names])

    seen = []
    for _ in range(6):
        before = counts()
        model.submit([Part(sequence, None, 0, GREEDY) for sequence in sequences])
        between = counts()
        model.wait()
        for more in (between - before, counts() - between):
            seen.append(dict(zip(names, more.tolist(), strict=True)))
    model.close()
    return seen


def columns() -> Any:
    """How many graphs an answer makes that fills the context, four pages."""
    driver = fake()
    model = Model()
    model.answer(GREEDY, 55, ahead=True)
    model.close()
    return driver.count("cuGraphInstantiate")


def graphs() -> Any:
    """How many graphs are made and launched in each round of calls of `head` with other shapes, and
    whether each gives what the first gave."""
    driver = fake()
    library = CoreLibrary("cuda", FOLDER / "cuda/model.plan", FOLDER / "cuda/model.fatbin", 1)
    random = np.random.default_rng(0)
    hidden, *weights = library["head"].arguments
    values = library["head"].values
    size = values[hidden.shape[1]].number
    made = []
    for weight in weights:
        shape = [values[extent].number for extent in weight.shape]
        made.append(random.standard_normal(shape).astype(weight.dtype))
    inputs = [random.standard_normal((n, size)).astype(np.float32) for n in range(1, 21)]
    # The outputs' memory grows no more, and that of arguments alternates between two places.
    library.call("head", [inputs[-1], *made])
    first: dict[int, np.ndarray] = {}
    seen = []
    for shapes in (10, 10, 10, 20, 20):
        before = [driver.count(name) for name in ("cuGraphInstantiate", "cuGraphLaunch")]
        same = True
        for x in inputs[:shapes]:
            (logits,) = library.call("head", [x, *made])
            same = same and np.array_equal(logits, first.setdefault(len(x), logits))
        after = [driver.count(name) for name in ("cuGraphInstantiate", "cuGraphLaunch")]
        seen.append([*(b - a for a, b in zip(before, after, strict=True)), same])
    library.close()
    return [*seen, driver.live]


def outcome(ask: Callable[[], Any]) -> str:
    try:
        ask()
    except MxforgeError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def loss() -> Any:
    """A device that is lost while it works: each later call fails, and nothing crashes."""
    driver = fake()
    model, idle = Model(), Model()
    sequences = model.begin(GREEDY)
    driver.set("lost_after", 5)
    said = [
        outcome(model.wait),
        outcome(lambda: model.submit([Part(sequences[0], [1], 0, GREEDY)])),
        outcome(model.synchronize),
        outcome(lambda: idle.begin(GREEDY)),
        outcome(Model),
    ]
    model.close()
    idle.close()
    return said


def refusals() -> Any:
    """What a device lacks or refuses, and that all is given back afterwards."""
    driver = fake()
    said = {}

    def with_setting(name: str, value: int, back: int, ask: Callable[[], Any] = Model) -> str:
        driver.set(name, value)
        seen = outcome(ask)
        driver.set(name, back)
        return f"{seen} ({driver.live})"

    def broken(change: Callable[[bytes], bytes], plan: str = "cuda/model.plan") -> str:
        """Of the library whose code was changed; an artifact's is compared with its hash before."""
        code = FOLDER / "broken.so"
        code.write_bytes(change((FOLDER / "cuda/model.fatbin").read_bytes()))

        def ask() -> None:
            library = CoreLibrary("cuda", FOLDER / plan, code, 1)
            try:
                library.call("next_tokens", [np.zeros(1, np.int32)] * 3)
            finally:
                library.close()

        return f"{outcome(ask)} ({driver.live})"

    said["memory"] = with_setting("memory", 1 << 16, 1 << 30)
    said["host memory"] = with_setting("fail cuMemHostAlloc", OUT_OF_MEMORY, 0)
    said["older"] = with_setting("major", 8, 9)
    said["code"] = with_setting("fail cuModuleLoadData", NO_BINARY, 0)
    said["cut off"] = broken(lambda code: code[:-1])
    said["no code"] = broken(lambda code: b"text" + code[4:])
    said["kernel"] = broken(lambda code: code.replace(b"next_tokens", b"last_tokens"))
    said["whole"] = broken(lambda code: code)
    # A launch that has more dynamic shared memory than any kernel is given unasked.
    plan = Plan.from_bytes((FOLDER / "cuda/model.plan").read_bytes())
    (step,) = plan["next_tokens"].steps
    assert step.launch is not None
    values = (*plan["next_tokens"].values, Constant(60_000))
    launch = replace(step.launch, shared=len(values) - 1)
    more = replace(plan["next_tokens"], values=values, steps=(replace(step, launch=launch),))
    (FOLDER / "shared.plan").write_bytes(Plan((more,), plan.workspace).to_bytes())
    said["shared"] = broken(lambda code: code, "shared.plan")
    driver.set("shared", 50_000)
    said["less shared"] = broken(lambda code: code, "shared.plan")
    driver.set("pools", 0)
    model = Model()
    first = model.answer(GREEDY, 2, ahead=True)
    # No memory for graphs: launches go on without.
    driver.set("fail cuGraphInstantiate", OUT_OF_MEMORY)
    other = Model()
    said["no graphs"] = other.answer(GREEDY, 2, ahead=True) == first
    other.close()
    model.close()
    return said


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
