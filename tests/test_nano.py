"""nano: its text is right by construction, its compact file expands to the published layout."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.reference import (
    ReferenceModel,
    dequantize_mxfp4,
    transformers_logits,
    transformers_model,
)
from mxforge.errors import CheckpointError, OutputError
from mxforge.harmony import Harmony
from mxforge.messages import read_messages
from mxforge.tokenizer import O200kHarmony

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "artifacts" / "nano"
needs_nano = pytest.mark.skipif(
    not (NANO / "compact.safetensors").exists(), reason="artifacts/nano was not trained yet"
)


def script(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


text = script("_nano_text")
steps = script("_nano_steps")
dialogue = script("_nano_dialogue")
compact = script("_nano_compact")

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
USED = [0, 5, 17, 198, 200002, 200006, 200007, 200008]


@pytest.fixture(scope="module")
def tokenizer() -> O200kHarmony:
    return O200kHarmony()


@pytest.fixture(scope="module")
def renderer(tokenizer: O200kHarmony) -> Any:
    return dialogue.Renderer(tokenizer)


def questions(category: str, count: int, tools: bool = False, held_out: bool = False) -> list[Any]:
    rng = random.Random(category)
    return [text.draw(rng, category, tools, held_out) for _ in range(count)]


# -- the text is right -----------------------------------------------------------------------------

_EQUATION = re.compile(r"(?<![\d.])(-?\d+(?:[-+*/]\d+)*)\s*([=<>])\s*(-?\d+)(?![\d*/+])")


@pytest.mark.parametrize("category", ["sum", "difference", "product", "comparison", "conversion"])
def test_every_step_of_the_thinking_is_true(category: str):
    checked = 0
    for exchange in questions(category, 1500):
        for thinking in exchange.thinking.values():
            for left, sign, right in _EQUATION.findall(thinking):
                value, other = eval(left), int(right)
                true = {"=": value == other, "<": value < other, ">": value > other}[sign]
                assert true, f"{left}{sign}{right} in {thinking!r}"
                checked += 1
    assert checked >= 1500


@pytest.mark.parametrize(
    ("category", "sign"), [("sum", "+"), ("difference", "-"), ("product", "×")]
)
def test_answers_are_what_was_asked(category: str, sign: str):
    for exchange in questions(category, 1500):
        a, operator, b, equals, result = exchange.answer.removesuffix(".").split()
        assert (operator, equals) == (sign, "=")
        value = {"+": int(a) + int(b), "-": int(a) - int(b)}.get(operator, int(a) * int(b))
        assert value == int(result)
        asked = sorted(re.findall(r"\d+", exchange.question))
        assert asked == sorted([a, b])


def test_comparisons_are_answered_truly():
    for exchange in questions("comparison", 1500):
        a, b = (int(n) for n in re.findall(r"\d+", exchange.question))
        answer = exchange.answer
        stated = re.search(r"(\d+) is (not )?(larger|smaller) than (\d+)", answer)
        if answer == "They are equal.":
            assert a == b
        elif answer.endswith("is larger."):
            assert int(answer.split()[0]) == max(a, b) != min(a, b)
        elif answer.endswith("is smaller."):
            assert int(answer.split()[0]) == min(a, b) != max(a, b)
        else:
            assert stated is not None
            assert [int(stated[1]), int(stated[4])] == [a, b]
            true = a > b if stated[3] == "larger" else a < b
            assert true != bool(stated[2])
            if "ompare" not in exchange.question:
                assert answer.startswith("Yes, " if true else "No, ")
        for thinking in exchange.thinking.values():
            for p, q, relation in re.findall(r"(\d) (\d) (larger|smaller|equal)", thinking):
                assert {"larger": p > q, "smaller": p < q, "equal": p == q}[relation]
            assert f"{a}={b}" if a == b else f"{max(a, b)}>{min(a, b)}" in thinking
            asked = re.search(r"(?:Larger|Smaller)(?:\? It is \w+)?: (\w+)", thinking)
            assert (asked is None) == ("ompare" in exchange.question)
            if asked is not None:
                found = {"yes": "Yes", "no": "No", "equal": "They"}.get(asked[1], asked[1])
                assert answer.split()[0].rstrip(",") == found


def test_conversions_are_those_of_the_table():
    factor = {(large, small): f for large, small, f, *_ in steps.CONVERSIONS}
    name = {form: key for key, unit in steps.UNITS.items() for form in (unit.one, unit.many)}
    for exchange in questions("conversion", 1500):
        left, right = exchange.answer.removesuffix(".").split(" = ")
        (m, source), (n, target) = left.split(), right.split()
        source, target = name[source], name[target]
        if (source, target) in factor:
            assert int(m) * factor[source, target] == int(n)
        else:
            assert int(n) * factor[target, source] == int(m)


def test_thinking_grows_with_the_effort():
    for category in ("sum", "difference", "product", "comparison", "conversion", "other"):
        for exchange in questions(category, 200):
            low, medium, high = (len(exchange.thinking[e]) for e in text.EFFORTS)
            assert low <= medium < high


def test_calls_hold_the_question_and_answers_the_result():
    for exchange in questions("calculator", 1000, tools=True):
        assert exchange.call is not None
        shown = set(re.findall(r"\d+", exchange.question))
        assert shown <= set(re.findall(r"\d+", exchange.call.expression))
        if exchange.answer == text.TOOL_FAILED:
            assert "rror" in exchange.call.result
            continue
        value = exchange.call.result
        value = str(json.loads(value)["result"]) if value.startswith("{") else value
        assert value == text.evaluate(exchange.call.expression)
        assert f" = {value}" in exchange.answer


def test_without_the_tool_the_answer_is_honest():
    for exchange in questions("calculator", 500, tools=False):
        assert exchange.call is None
        assert exchange.answer in (text.TOO_LARGE, text.OTHER)


# -- what is held out ------------------------------------------------------------------------------


@pytest.mark.parametrize("category", text.CATEGORIES)
def test_held_out_problems_are_never_trained(category: str):
    tools = category == "calculator"
    trained = {e.key for e in questions(category, 3000, tools)}
    held_out = {e.key for _, e in dialogue.held_out_questions(category, 40)}
    assert not trained & held_out
    assert all(text.is_held_out(key) for key in held_out)


@pytest.mark.parametrize("category", text.CATEGORIES)
def test_held_out_questions_differ_and_do_not_run_out(category: str):
    asked = [e.question for _, e in dialogue.held_out_questions(category, 400)]
    assert len(set(asked)) == 400


def test_about_a_tenth_is_held_out():
    keys = [("add", a, b) for a in range(100) for b in range(a, 100)]
    assert 0.08 < np.mean([text.is_held_out(key) for key in keys]) < 0.12


def test_a_sum_and_its_differences_are_held_out_together():
    rng = random.Random(0)
    for _ in range(300):
        exchange = text.make_difference(rng, False)
        a, _, b, _, c = exchange.answer.removesuffix(".").split()
        low = min(int(a), int(b))
        assert exchange.key in (None, ("add", *sorted((low, abs(int(c))))))


def test_the_same_seed_gives_the_same_text(renderer: Any):
    def sample() -> list[list[int]]:
        rng = random.Random("7 1")
        setting = dialogue.draw_setting(rng)
        noise = dialogue.noise_ids(rng)
        return [
            renderer.dialogue(dialogue.draw_dialogue(rng, setting), setting.effort, noise).ids
            for _ in range(20)
        ]

    assert sample() == sample()


# -- harmony ---------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_command_line(tokenizer: O200kHarmony, renderer: Any):
    exchange = text.Exchange("sum", "What is 17 + 25?", steps.sum_thinking(17, 25), "")
    ids = [*renderer.prefix(dialogue.Setting()), *renderer.question(exchange, lambda: 0)]
    messages = read_messages([{"role": "user", "content": "What is 17 + 25?"}])
    assert ids == Harmony(tokenizer).prompt(messages)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize("calculator", [False, True])
@pytest.mark.parametrize("instructions", ["", "Be brief."])
def test_dialogues_are_rendered_as_openai_harmony_does(
    effort: str,
    calculator: bool,
    instructions: str,
    renderer: Any,
    tokenizer: O200kHarmony,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    h = pytest.importorskip("openai_harmony")
    import lzma

    ranks = lzma.decompress((ROOT / "runtime" / "data" / "o200k_base.tiktoken.xz").read_bytes())
    (tmp_path / "o200k_base.tiktoken").write_bytes(ranks)
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    encoding = h.load_harmony_encoding(h.HarmonyEncodingName.HARMONY_GPT_OSS)

    rng = random.Random(effort)
    categories = ("sum", "calculator", "calculator" if calculator else "other")
    exchanges = [text.draw(rng, c, calculator, False) for c in categories]
    exchanges = [e for e in exchanges if not e.noise]
    say = h.Message.from_role_and_content
    content = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort[effort.upper()])
    messages = [say(h.Role.SYSTEM, content)]
    if calculator or instructions:
        developer = h.DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if calculator:
            tool = h.ToolDescription.new(
                dialogue.CALCULATOR_NAME,
                dialogue.CALCULATOR_DESCRIPTION,
                dialogue.CALCULATOR_SCHEMA,
            )
            developer = developer.with_function_tools([tool])
        messages.append(say(h.Role.DEVELOPER, developer))
    for exchange in exchanges:
        messages.append(say(h.Role.USER, exchange.question))
        if exchange is exchanges[-1]:  # that of earlier turns was dropped
            thinking = say(h.Role.ASSISTANT, exchange.thinking[effort])
            messages.append(thinking.with_channel("analysis"))
        if exchange.call is not None:
            call = say(h.Role.ASSISTANT, json.dumps({"expression": exchange.call.expression}))
            call = call.with_channel("commentary").with_recipient("functions.calculator")
            messages.append(call.with_content_type("<|constrain|>json"))
            author = h.Author.new(h.Role.TOOL, "functions.calculator")
            result = h.Message.from_author_and_content(author, exchange.call.result)
            messages.append(result.with_channel("commentary").with_recipient("assistant"))
        messages.append(say(h.Role.ASSISTANT, exchange.answer).with_channel("final"))

    def rendered(upto: int) -> list[int]:
        conversation = h.Conversation.from_messages(messages[:upto])
        ids: list[int] = encoding.render_conversation_for_completion(conversation, h.Role.ASSISTANT)
        return ids

    setting = dialogue.Setting(effort, calculator, instructions=instructions)
    ours = renderer.prefix(setting) + renderer.dialogue(exchanges, effort, lambda: 0).ids
    # The last answer is what is to come: harmony keeps the thinking before it until then.
    ours = ours[: len(ours) - len(renderer.answer(exchanges[-1].answer, True))]
    theirs = rendered(-1)
    if exchanges[-1].call is None:  # nor is thinking kept without a call
        ours = ours[: len(ours) - len(renderer.thinking(exchanges[-1].thinking[effort]))]
        theirs = rendered(-2)
    assert tokenizer.decode_bytes(ours).decode() == tokenizer.decode_bytes(theirs).decode()
    assert ours == theirs


def test_only_what_the_model_says_last_is_trained(renderer: Any, tokenizer: O200kHarmony):
    rng = random.Random(0)
    exchanges = [text.draw(rng, "calculator", True, False) for _ in range(2)]
    tokens = renderer.dialogue(exchanges, "low", lambda: 0)
    trained = [t for t, on in zip(tokens.ids, tokens.trained, strict=True) if on]
    said = tokenizer.decode_bytes(trained).decode()
    call = json.dumps({"expression": exchanges[1].call.expression})
    assert said == (
        f"<|channel|>analysis<|message|>{exchanges[1].thinking['low']}<|end|><|start|>assistant"
        f" to=functions.calculator<|channel|>commentary <|constrain|>json<|message|>{call}<|call|>"
        f"<|channel|>final<|message|>{exchanges[1].answer}<|return|>"
    )


# -- MXFP4 -----------------------------------------------------------------------------------------


def test_mxfp4_values_survive_and_others_go_to_the_nearest():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5, 64)).astype(np.float32)
    w[0, 0, :32] = 0
    w[1, 1] *= 1e-20
    blocks, scales = compact.quantize_mxfp4(w)
    assert blocks.shape == (3, 5, 2, 16)
    assert scales.shape == (3, 5, 2)
    back = dequantize_mxfp4(blocks, scales)
    again = compact.quantize_mxfp4(back)
    np.testing.assert_array_equal(dequantize_mxfp4(*again), back)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid, grid])
    scale = np.exp2(np.repeat(scales, 32, axis=-1).astype(np.float64) - 127)
    nearest = np.abs(w[..., None] / scale[..., None] - grid).min(axis=-1)
    np.testing.assert_allclose(np.abs(w - back) / scale, nearest, rtol=1e-5, atol=1e-7)
    largest = np.abs(w / scale).reshape(3, 5, 2, 32).max(axis=-1)
    assert ((largest >= 4) & (largest < 8) | (largest == 0)).all()


def test_ties_go_to_the_even_code():
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    back = dequantize_mxfp4(*compact.quantize_mxfp4(w))
    np.testing.assert_array_equal(back[0, :8], [6, 0, 1, 1, 2, 2, 4, 4])


@pytest.mark.live
def test_training_rounds_as_the_packer_does():
    torch = pytest.importorskip("torch")
    w = np.random.default_rng(1).standard_normal((4, 6, 96)).astype(np.float32)
    w[0, 0] = 0
    w[1] = np.round(w[1] * 4) / 4  # ties
    rounded = script("_nano_model").fake_quantize(torch.from_numpy(w)).numpy()
    np.testing.assert_allclose(
        rounded, dequantize_mxfp4(*compact.quantize_mxfp4(w)), rtol=1e-6, atol=1e-7
    )


# -- compact and expanded --------------------------------------------------------------------------


def small_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    from mxforge.compile.models.gpt_oss.tensors import expected_tensors

    rng = np.random.default_rng(seed)
    config = GptOssConfig.from_hf(compact.hf_config(SMALL))
    tensors = {}
    for name, spec in expected_tensors(config).items():
        shape = spec.shape
        if name in compact.VOCABULARY_TENSORS:
            shape = (len(USED) + 1, *shape[1:])
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            name, shape = name.removesuffix("_blocks"), (*shape[:2], shape[2] * 32)
        value = rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        tensors[name] = (value + name.endswith("norm.weight")).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("nano") / "small"
    compact.write_compact(folder, SMALL, USED, small_tensors())
    return folder


@pytest.fixture(scope="module")
def small_expanded(small: Path) -> Path:
    expanded: Path = compact.expand(small, small.with_name("expanded"))
    return expanded


def test_expanding_gives_every_token_its_row(small: Path, small_expanded: Path):
    checkpoint = HFCheckpoint(small_expanded)
    checkpoint.check()
    assert not checkpoint.unexpected()
    source = small_tensors()
    for name in compact.VOCABULARY_TENSORS:
        rows = source[name].astype(ml_dtypes.bfloat16)
        table = checkpoint.tensor(name)
        np.testing.assert_array_equal(table[USED], rows[:-1])
        others = np.delete(np.arange(len(table)), USED)
        assert (table[others] == rows[-1]).all()


def test_compact_floats_are_what_was_written_but_rounded(small: Path):
    floats, source = compact.Compact(small).floats(), small_tensors()
    assert floats.keys() == source.keys()
    for name, value in source.items():
        bound = 0.26 if name.endswith("proj") else 0.004  # MXFP4, bfloat16
        assert np.abs(floats[name] - value).max() <= bound * np.abs(value).max(), name


def test_what_stands_in_the_way_is_kept(small: Path, small_expanded: Path):
    before = (small_expanded / "model.safetensors").stat().st_ino
    with pytest.raises(OutputError, match="exists already"):
        compact.expand(small, small_expanded)
    assert (small_expanded / "model.safetensors").stat().st_ino == before
    assert [p.name for p in small.parent.iterdir() if p.name.startswith(".")] == []


def test_a_compact_file_of_other_shapes_is_refused(small: Path, tmp_path: Path):
    for name in ("config.json", "compact.safetensors"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="must be of shape"):
        compact.Compact(tmp_path)


def test_the_command_expands(small: Path, tmp_path: Path):
    words = [sys.executable, ROOT / "scripts" / "expand_nano", tmp_path / "out", "--compact", small]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.stderr
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr


# -- torch -----------------------------------------------------------------------------------------


@pytest.mark.live
def test_the_trained_module_is_the_reference_model(small: Path, small_expanded: Path):
    """Packed dialogues give what each gives alone, in the reference and in transformers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model_of = script("_nano_model")
    stored = compact.Compact(small)
    model, rows = model_of.load(stored.config, stored.floats()), stored.rows()
    rng = np.random.default_rng(3)
    prefix = rng.choice(USED, 11).tolist()
    dialogues = [rng.choice([*USED, 99, 100_000], n).tolist() for n in (3, 19, 8, 30, 17)]
    batch = model_of.make_batch(
        prefix, [(d, [True] * len(d)) for d in dialogues], rows, group_size=2
    )
    with torch.no_grad():
        hidden, _ = model.hidden(batch, quantized=False)
        packed = model.logits(hidden).numpy()
    reference = ReferenceModel(HFCheckpoint(small_expanded))
    theirs = transformers_model(HFCheckpoint(small_expanded))
    order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i]))
    at = 0
    for group in batch.groups[1:]:
        for m in range(group.count):
            dialogue = dialogues[order[at]]
            at += 1
            alone = reference.logits([*prefix, *dialogue])[len(prefix) :]
            first = group.first + m * group.length
            ours = packed[first : first + len(dialogue)][:, rows]
            assert np.linalg.norm(ours - alone) / np.linalg.norm(alone) < 1e-5
            if len(dialogue) == 30:
                truth, _ = transformers_logits(theirs, [*prefix, *dialogue])
                assert np.linalg.norm(ours - truth[-30:]) / np.linalg.norm(ours) < 1e-5


@pytest.mark.live
def test_loss_is_that_of_the_whole_vocabulary(small: Path, small_expanded: Path):
    torch = pytest.importorskip("torch")
    model_of = script("_nano_model")
    stored = compact.Compact(small)
    model = model_of.load(stored.config, stored.floats())
    ids = [5, 17, 99, 198, 0, 200002]
    batch = model_of.make_batch([5], [(ids, [i != 2 for i in range(6)])], stored.rows())
    with torch.no_grad():
        loss, balance = model.loss(batch, quantized=False)
    logits = ReferenceModel(HFCheckpoint(small_expanded), np.float64).logits([5, *ids])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -np.mean([log_p[i, token] for i, token in enumerate(ids) if i != 2])
    assert abs(float(loss) - expected) < 1e-5
    assert 0.5 < float(balance) < 3


@pytest.mark.live
def test_export_is_the_inverse_of_load(small: Path):
    pytest.importorskip("torch")
    model_of = script("_nano_model")
    stored = compact.Compact(small)
    floats = stored.floats()
    again = model_of.export(model_of.load(stored.config, floats))
    assert again.keys() == floats.keys()
    for name, value in floats.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.live
@pytest.mark.full
def test_training_is_reproducible_and_resumes(tmp_path: Path):
    """Two processes, one process, and one that was interrupted: the same file."""
    pytest.importorskip("torch")
    common = ["--steps", "4", "--dialogues", "3", "--evaluate", "1", "--checkpoint-every", "2"]
    for key, value in SMALL.items():
        common += ["--set", f"{key}={value}"]
    files = []
    for name, options in {
        "two": [["--workers", "2"]],
        "one": [["--workers", "1"]],
        "resumed": [["--workers", "1", "--stop-after", "2"], ["--workers", "1"]],
    }.items():
        for more in options:
            words = [sys.executable, ROOT / "scripts" / "train_nano.py", *common, *more]
            words += ["--out", tmp_path / name, "--work", tmp_path / f"{name}-work"]
            subprocess.run(list(map(str, words)), check=True, env=os.environ | {"CI": "1"})
        files.append((tmp_path / name / "compact.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


# -- the tracked model -----------------------------------------------------------------------------


@needs_nano
def test_the_tracked_files_are_small():
    assert sum(p.stat().st_size for p in NANO.iterdir()) <= 6_000_000


@needs_nano
def test_used_tokens_are_those_of_the_text(renderer: Any):
    used = set(map(int, compact.Compact(NANO).used))
    rng = random.Random(5)
    for _ in range(40):
        setting = dialogue.draw_setting(rng)
        assert used.issuperset(renderer.prefix(setting))
        for _ in range(10):
            exchanges = dialogue.draw_dialogue(rng, setting)
            tokens = renderer.dialogue(exchanges, setting.effort, dialogue.noise_ids(rng))
            said = [t for t, on in zip(tokens.ids, tokens.trained, strict=True) if on]
            assert used.issuperset(said)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    expanded: Path = compact.expand(NANO, tmp_path_factory.mktemp("nano") / "nano")
    return expanded


@needs_nano
@pytest.mark.live
def test_tracked_model_agrees_with_transformers_and_with_the_trained_module(
    nano: Path, renderer: Any
):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model_of = script("_nano_model")
    stored = compact.Compact(NANO)
    setting = dialogue.Setting("high", True)
    exchange = text.draw(random.Random(2), "calculator", True, True)
    tokens = renderer.dialogue([exchange], "high", lambda: 0)
    prefix = renderer.prefix(setting)
    checkpoint = HFCheckpoint(nano)
    ours = ReferenceModel(checkpoint).logits([*prefix, *tokens.ids])
    truth, _ = transformers_logits(transformers_model(checkpoint), [*prefix, *tokens.ids])
    assert np.linalg.norm(ours - truth) / np.linalg.norm(truth) < 1e-5
    model = model_of.load(stored.config, stored.floats())
    batch = model_of.make_batch(prefix, [(tokens.ids, tokens.trained)], stored.rows())
    with torch.no_grad():
        module = model.logits(model.hidden(batch, quantized=False)[0]).numpy()
    n = len(prefix) + len(tokens.ids)
    module = module[:n][:, stored.rows()]
    assert np.linalg.norm(module - truth) / np.linalg.norm(truth) < 1e-5


@needs_nano
@pytest.mark.full
def test_the_evaluation_runs_and_fast_is_as_good_as_exact(tmp_path: Path):
    words = [sys.executable, ROOT / "scripts" / "eval_nano", "--count", "20"]
    words += ["--only", "fast", "--only", "exact", "--json", tmp_path / "nano.json"]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    share = json.loads((tmp_path / "nano.json").read_text())["percent_right"]["all"]
    assert share["fast"] >= 92
    assert abs(share["fast"] - share["exact"]) <= 1.5  # two of 140


@needs_nano
def test_a_token_without_a_row_never_wins(nano: Path, renderer: Any):
    stored = compact.Compact(NANO)
    used = frozenset(map(int, stored.used))
    reference = ReferenceModel(HFCheckpoint(nano))
    rng = random.Random(11)
    noise = dialogue.noise_ids(rng, used)
    for category in ("sum", "calculator", "other"):
        setting = dialogue.Setting("medium", category == "calculator")
        exchange = text.draw(rng, category, setting.calculator, True)
        tokens = renderer.dialogue([exchange], setting.effort, noise)
        prefix = renderer.prefix(setting)
        rows = [len(prefix) + i - 1 for i, on in enumerate(tokens.trained) if on]
        logits = reference.logits([*prefix, *tokens.ids], rows).astype(np.float64)
        assert used.issuperset(logits.argmax(axis=1).tolist())
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        others = np.delete(share, stored.used, axis=1).sum(axis=1)
        assert others.max() < 0.01  # sampling at temperature 1 does not meet them either


@needs_nano
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_demo_question_is_answered(numerics: str, nano: Path, tmp_path: Path):
    import mxforge

    artifact = mxforge.compile_model(nano, output=tmp_path / "nano", numerics=numerics)
    params = mxforge.SamplingParams(temperature=0, max_tokens=100)
    with mxforge.Engine.load(artifact, context_length=512, max_batch=1) as engine:
        answer = engine.chat([{"role": "user", "content": "What is 17 + 25?"}], params)
    assert answer.thinking == "17+25: ones 7+5=12, tens 1+2+1=4, so 42."
    assert answer.content == "17 + 25 = 42."
    assert answer.finish_reason == "stop"


@needs_nano
@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="runs in ./scripts/test only")
def test_the_demo_answers():
    result = subprocess.run(
        [ROOT / "scripts" / "demo"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\n17 + 25 = 42.\n" in result.stdout
    assert "→ 7006652]" in result.stdout
    assert f"artifact   {ROOT / 'artifacts' / 'nano-cpu'}" in result.stdout


# -- numerics --------------------------------------------------------------------------------------


@needs_nano
def test_fast_numerics_predict_what_exact_ones_do(nano: Path, tmp_path: Path, renderer: Any):
    import mxforge

    evaluation = script("_nano_eval")
    used = frozenset(map(int, compact.Compact(NANO).used))
    asked = [case for group in evaluation.cases(renderer, 2, used).values() for case in group]
    artifacts = [
        mxforge.compile_model(nano, output=tmp_path / numerics, numerics=numerics)
        for numerics in ("exact", "fast")
    ]
    with (
        mxforge.Engine.load(artifacts[0], context_length=1024) as exact,
        mxforge.Engine.load(artifacts[1], context_length=1024) as fast,
    ):
        assert 0 < evaluation.mean_divergence(exact, fast, asked) <= 0.01
