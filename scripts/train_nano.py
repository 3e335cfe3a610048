#!/usr/bin/env python3
"""Train nano and write artifacts/nano: scripts/train_nano.py [--steps N] [--out DIR]

Each step is two batches, each one prefix and many dialogues, by one process each (or by one, after
each other: the result is the same). The text of a step depends on the seed and the number of the
step only, torch runs on one thread and in deterministic mode: the same machine, seed and number of
steps give the same file. What was computed is kept in --work; a killed run goes on from there.

Needs torch (dependency group `reference`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Before torch: as many kernels as a run meets shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

try:
    import numpy as np
    import torch
    from _nano_compact import SHAPE, hf_config, write_compact
    from _nano_dialogue import (
        Renderer,
        draw_dialogue,
        draw_setting,
        held_out_questions,
        noise_ids,
        used_tokens,
    )
    from _nano_model import Batch, Nano, Optimizer, export, make_batch
    from _nano_text import CATEGORIES
    from tqdm import tqdm

    from mxforge.compile.models.gpt_oss import HARMONY
    from mxforge.compile.models.gpt_oss.config import GptOssConfig
    from mxforge.tokenizer import O200kHarmony
except ModuleNotFoundError as error:
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == python.parents[1]:
        sys.exit(f"train_nano: {error}; install the dependency group `reference` first.")
    os.execv(python, [str(python), *sys.argv])

BATCHES = 2  # a step
EVALUATE_EVERY = 500  # steps


class Text:
    """Batches of a step, and held-out ones, as tensors."""

    def __init__(self, seed: int, dialogues: int) -> None:
        self.seed, self.dialogues = seed, dialogues
        self.renderer = Renderer(O200kHarmony())
        self.used = used_tokens(self.renderer)
        self.compact = np.full(HARMONY.vocab_size, len(self.used), np.int64)
        self.compact[self.used] = np.arange(len(self.used))
        self._set = frozenset(self.used)

    def features(self) -> torch.Tensor:
        """f32 [U + 1, 33]: of numbers, which digit stands at each place, and how many there are."""
        table = torch.zeros(len(self.used) + 1, 33)
        for row, token in enumerate(self.used):
            spelled = self.renderer.spelling(token)
            if re.fullmatch(r"[0-9]{1,3}", spelled):
                table[row, 29 + len(spelled)] = 1
                for place, digit in enumerate(reversed(spelled)):
                    table[row, 10 * place + int(digit)] = 1
        return table

    def batch(self, step: int, part: int) -> Batch:
        rng = random.Random(f"{self.seed} {step} {part}")
        noise = noise_ids(rng, self._set)
        setting = draw_setting(rng)
        dialogues = []
        while len(dialogues) < self.dialogues:
            tokens = self.renderer.dialogue(draw_dialogue(rng, setting), setting.effort, noise)
            trained = [t for t, on in zip(tokens.ids, tokens.trained, strict=True) if on]
            if self._set.issuperset(trained):  # a rare number format can lie outside
                dialogues.append((tokens.ids, tokens.trained))
        return make_batch(self.renderer.prefix(setting), dialogues, self.compact)

    def held_out(self, category: str, count: int) -> list[tuple[Batch, int]]:
        """Batches of held-out questions, and how many each has."""
        rng = random.Random(f"noise {category}")
        noise = noise_ids(rng, self._set)
        by_setting: dict[Any, list[Any]] = {}
        for setting, exchange in held_out_questions(category, count):
            tokens = self.renderer.dialogue([exchange], setting.effort, noise)
            by_setting.setdefault(setting, []).append((tokens.ids, tokens.trained))
        return [
            (make_batch(self.renderer.prefix(setting), dialogues, self.compact), len(dialogues))
            for setting, dialogues in by_setting.items()
        ]


def evaluate(model: Nano, text: Text, count: int) -> dict[str, float]:
    """Share of held-out answers that are as expected token for token, thinking included."""
    shares = {}
    for category in CATEGORIES:
        right = 0
        for batch, dialogues in text.held_out(category, count):
            right += int(model.right(batch, dialogues).sum())
        shares[category] = right / count
    return shares


def schedule(step: int, steps: int) -> float:
    """Learning rate: up over 50 steps, then linearly down to 0."""
    return min((step + 1) / 50, (steps - step) / steps)


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
        self.text = Text(options.seed, options.dialogues)
        self.config = GptOssConfig.from_hf(hf_config(options.shape))
        self.model = Nano(self.config, len(self.text.used), torch.bfloat16, self.text.features())
        self.optimizer = Optimizer(self.model, options.matrix_rate, options.rate)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.file = options.work / "state.pt"

    def compute(self, part: int) -> float:
        """Gradients of one batch are added to what is there."""
        options = self.options
        batch = self.text.batch(self.step, part)
        quantized = self.step >= options.quantize_from * options.steps
        loss, balance = self.model.loss(batch, quantized)
        ((loss + 0.01 * balance) / BATCHES).backward()
        return float(loss.detach())

    def one_step(self) -> float:
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        if self.options.workers == 1:
            losses = sum(self.compute(part) for part in range(BATCHES))
        else:
            losses = self._shared_step()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        assert torch.isfinite(norm)
        self.optimizer.step(schedule(self.step, self.options.steps))
        self.step += 1
        return losses / BATCHES

    def _shared_step(self) -> float:
        loss = self.compute(self.options.rank)
        parameters = list(self.model.parameters())
        flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([loss])])
        torch.distributed.all_reduce(flat)  # of two: the order does not matter
        at = 0
        for p in parameters:
            p.grad = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        return float(flat[-1])

    def save(self) -> None:
        work = self.file.with_suffix(".tmp")
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state(),
            "step": self.step, "seconds": self.seconds, "log": self.log,
            "recipe": recipe(self.options),
        }  # fmt: skip
        torch.save(state, work)
        work.replace(self.file)

    def resume(self) -> None:
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=False)
        if state["recipe"] != recipe(self.options):
            sys.exit(f"train_nano: {self.file} is of another recipe; remove it or use --work.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def run(self) -> None:
        options = self.options
        chief = options.rank == 0
        average = None
        bar = tqdm(
            total=options.steps, initial=self.step, disable=not (chief and sys.stderr.isatty())
        )
        began = time.monotonic()
        until = min(options.steps, options.stop_after or options.steps)
        while self.step < until:
            loss = self.one_step()
            average = loss if average is None else average + 0.02 * (loss - average)
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            now = time.monotonic()
            self.seconds, began = self.seconds + now - began, now
            if not chief:
                continue
            if self.step % 50 == 0 and not sys.stderr.isatty():
                print(f"{self.step} loss {average:.4f} {self.seconds:.0f} s", flush=True)
            if self.step % EVALUATE_EVERY == 0 or self.step == options.steps:
                shares = evaluate(self.model, self.text, options.evaluate)
                self.log.append({"step": self.step, "loss": round(average, 4), **shares})
                shown = " ".join(f"{k} {v:.2f}" for k, v in shares.items())
                tqdm.write(f"{self.step}: loss {average:.4f} {shown}")
                sys.stdout.flush()
            if self.step % options.checkpoint_every == 0 or self.step == options.steps:
                self.save()


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "seed", "steps", "dialogues", "rate", "matrix_rate", "quantize_from", "shape",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(prog="train_nano", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts" / "nano")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "nano")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--dialogues", type=int, default=16, help="in a batch (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.005, help="of Adam, at its peak")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="of Muon, at its peak")
    parser.add_argument("--quantize-from", type=float, default=0.3, metavar="SHARE")
    parser.add_argument("--evaluate", type=int, default=30, metavar="N", help="of each category")
    parser.add_argument("--checkpoint-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="as if it were killed")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pairs = [pair.partition("=") for pair in options.set]
    options.shape = SHAPE | {key: json.loads(value) for key, _, value in pairs}
    options.work.mkdir(parents=True, exist_ok=True)
    second = None
    if options.workers == 2:
        store = options.work / "store"
        if options.rank == 0:
            store.unlink(missing_ok=True)
            second = subprocess.Popen([sys.executable, *sys.argv, "--rank", "1"])
        torch.distributed.init_process_group(
            "gloo", init_method=store.absolute().as_uri(), rank=options.rank, world_size=2
        )
    try:
        trainer = Trainer(options)
        trainer.resume()
        trainer.run()
        if options.rank == 0 and trainer.step == options.steps:
            about = {
                **recipe(options), "seconds": round(trainer.seconds), "log": trainer.log,
                "torch": torch.__version__, "numpy": np.__version__,
                "python": ".".join(map(str, sys.version_info[:3])),
            }  # fmt: skip
            write_compact(options.out, options.shape, trainer.text.used, export(trainer.model))
            (options.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
            print(options.out)
    finally:
        if second is not None:
            if sys.exc_info()[0] is not None:
                second.terminate()
            second.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
