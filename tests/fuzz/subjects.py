"""What reads foreign files: each subject damages one input in a folder, and uses it.

`damage` leaves the folder as it was but for one damaged file; `use` may return or raise
MxforgeError, and nothing else.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import hf_config
from fuzz.mutations import damage_bytes, damage_safetensors, damage_text
from support.small import SMALL_SHAPE, make_artifact, small_checkpoint

from mxforge.artifact import open_artifact, verify
from mxforge.compile.checkpoint import open_checkpoint
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.tensors import expected_tensors
from mxforge.compile.models.registry import read_config
from mxforge.inspect import describe
from mxforge.manifest import MANIFEST, Manifest
from mxforge.safetensors import SafetensorsWriter, dtype_name, open_safetensors
from mxforge.tokenizer import HARMONY_SPECIAL_TOKENS, load_tokenizer, tokenizer_files


class Subject(ABC):
    """`folder` is its own; `artifact` a compiled model with a tokenizer, not to be changed."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        self.folder = folder

    @abstractmethod
    def damage(self, rng: random.Random) -> None: ...

    @abstractmethod
    def use(self) -> None: ...


class SafetensorsFiles(Subject):
    def __init__(self, folder: Path, artifact: Path) -> None:
        super().__init__(folder, artifact)
        self._file = folder / "x.safetensors"
        self._sources = [
            self._written({"a": np.arange(8, dtype=np.uint8)}),
            self._written({}),
            self._written(
                {
                    "a.bytes": np.arange(15, dtype=np.uint8).reshape(3, 5),
                    "b.bf16": np.ones((7, 3), ml_dtypes.bfloat16),
                    "c.scalar": np.array(3.5, np.float32),
                    "d.empty": np.empty((0, 4), np.int64),
                    "é.f16": np.ones(9, np.float16),
                },
                metadata={"format": "pt"},
                tensor_alignment=64,
            ),
        ]

    def _written(self, arrays: dict[str, np.ndarray], **options: Any) -> bytes:
        infos = [(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]
        with SafetensorsWriter(self._file, infos, **options) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        return self._file.read_bytes()

    def damage(self, rng: random.Random) -> None:
        source = rng.choices(self._sources, (2, 1, 4))[0]
        damaged = damage_safetensors(rng, source) if len(source) > 32 else damage_bytes(rng, source)
        self._file.write_bytes(damaged)

    def use(self) -> None:
        file = open_safetensors(self._file)
        for name, info in file.tensors.items():
            file.will_need(name)
            array = file.array(name)
            assert (array.shape, array.nbytes) == (info.shape, info.nbytes)
            array.tobytes()
            file.drop(name)


class Configs(Subject):
    """config.json mostly, now and then the other JSON files of a checkpoint."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        super().__init__(folder, artifact)
        checkpoint = small_checkpoint(folder)
        self._single = checkpoint
        self._sharded = shutil.copytree(checkpoint, folder / "sharded")
        (self._sharded / "model.safetensors").rename(self._sharded / "model-1.safetensors")
        names = open_safetensors(self._sharded / "model-1.safetensors").tensors
        self._index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
        self._write_index(json.dumps(self._index).encode())
        self._generation = {"eos_token_id": [2, 5, 200], "pad_token_id": 1}
        self._original = write_checkpoint(
            folder / "original", "tiny", layout="openai", overrides=SMALL_SHAPE
        )
        self._original_config = json.loads((self._original / "config.json").read_bytes())

        small = hf_config("tiny", SMALL_SHAPE)
        newer = copy.deepcopy(small)
        newer["rope_parameters"] = newer.pop("rope_scaling") | {"rope_theta": 150000}
        plain = copy.deepcopy(small)
        for key in ("rope_scaling", "layer_types", "head_dim"):
            plain[key] = None
        scaled = copy.deepcopy(small)
        scaled["rope_scaling"] |= {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.3}
        self._configs = [small, small, newer, plain, scaled, hf_config("tiny")]
        self._opened = self._single

    def _write_index(self, text: bytes) -> None:
        (self._sharded / "model.safetensors.index.json").write_bytes(text)

    def damage(self, rng: random.Random) -> None:
        generation = self._single / "generation_config.json"
        generation.unlink(missing_ok=True)
        config = json.dumps(self._configs[0]).encode()
        self._opened = self._single
        draw = rng.random()
        if draw < 0.2:
            self._opened = self._original
            config = damage_text(rng, self._original_config)
        elif draw < 0.8:
            config = damage_text(rng, rng.choice(self._configs))
        elif draw < 0.9:
            generation.write_bytes(damage_text(rng, self._generation))
        else:
            self._opened = self._sharded
            self._write_index(damage_text(rng, self._index))
        (self._opened / "config.json").write_bytes(config)

    def use(self) -> None:
        config = read_config(self._opened / "config.json").config
        assert GptOssConfig.from_dict(config.to_dict()) == config
        assert np.isfinite(config.rope_inv_freq()).all()
        assert config.rope_attention_factor > 0
        assert 0 < config.active_parameter_count <= config.parameter_count
        assert config.decode_bytes(1000) < 1 << 63
        expected_tensors(config)
        checkpoint = open_checkpoint(self._opened)
        checkpoint.check()
        checkpoint.unexpected()
        assert all(0 <= v < config.vocab_size for v in checkpoint.generation_config.eos_token_ids)


TEXTS = ("", "a", "Hello, world! 12345\r\n\t", "Grüße 漢字 🙂\u0301\0", "<|end|> [UNK]", "a" * 3000)


def tokenizers_of_all_kinds() -> list[dict[str, Any]]:
    """Contents of tokenizer.json: each model and most of what can stand around one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {"[UNK]": 0, "[CLS]": 1, "a": 2, "##a": 3, "hello": 4, "\u2581": 5, "\u2581a": 6}
    spoken = words | {f"<0x{byte:02X}>": 7 + byte for byte in range(256)}

    bytewise = Tokenizer(models.BPE(letters | {"he": 256, "ll": 257}, [("h", "e"), ("l", "l")]))
    bytewise.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ?[a-z]+|\\s+(?!\\S)|.", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<|start|>", "<|end|>"])
    bytewise.add_tokens(["    "])
    bytewise.enable_truncation(64, stride=2)

    merges = [("\u2581", "a")]
    sentences = Tokenizer(models.BPE(spoken, merges, unk_token="[UNK]", byte_fallback=True))
    sentences.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKC()]
    )
    sentences.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip

    pieces = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 1)])
    pieces.add_special_tokens(["[CLS]"])

    spaced = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    spaced.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spaced.enable_padding(length=8, pad_token="[UNK]")

    scored = Tokenizer(models.Unigram([(word, -float(i)) for word, i in words.items()], 0))
    scored.pre_tokenizer = pre_tokenizers.Metaspace()
    scored.decoder = decoders.Metaspace()

    contents = [json.loads(t.to_str()) for t in (bytewise, sentences, pieces, spaced, scored)]
    mapped = copy.deepcopy(contents[-1])
    mapped["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAAAAA="}
    return [*contents, mapped]


class Tokenizers(Subject):
    """tokenizer.json of all kinds of models, and harmony's special_tokens.json."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        super().__init__(folder, artifact)
        self._contents = tokenizers_of_all_kinds()
        self._kind = "tokenizers"
        self._file = folder / "tokenizer.json"
        self._listed = folder / "special_tokens.json"

    def damage(self, rng: random.Random) -> None:
        if rng.random() < 0.15:
            self._kind = "o200k_harmony"
            self._listed.write_bytes(damage_text(rng, dict(HARMONY_SPECIAL_TOKENS)))
        else:
            self._kind = "tokenizers"
            self._file.write_bytes(damage_text(rng, rng.choice(self._contents)))

    def use(self) -> None:
        if self._kind == "tokenizers":
            tokenizer_files(self._file, 300)
        tokenizer = load_tokenizer(self.folder, self._kind)
        for special in (*tokenizer.special_tokens.values(), tokenizer.vocab_size - 1):
            tokenizer.token_bytes(special)
        tokenizer.decode_bytes((-1, 0, 1, 1 << 31, 1 << 64, tokenizer.vocab_size))
        for text in TEXTS:
            tokens = tokenizer.encode(text)
            assert len(tokens) <= 32 * len(text) + 32
            tokenizer.decode_bytes(tokens)
            tokenizer.decode_bytes(tokens, special=False)


class Manifests(Subject):
    def __init__(self, folder: Path, artifact: Path) -> None:
        super().__init__(folder, artifact)
        self._made = make_artifact(folder / "made")
        self._compiled = shutil.copytree(artifact, folder / "compiled")
        self._contents = {
            made: json.loads((made / MANIFEST).read_bytes())
            for made in (self._made, self._compiled)
        }
        self._opened = self._made

    def damage(self, rng: random.Random) -> None:
        self._opened = rng.choices((self._made, self._compiled), (4, 1))[0]
        (self._opened / MANIFEST).write_bytes(damage_text(rng, self._contents[self._opened]))

    def use(self) -> None:
        manifest = Manifest.from_json((self._opened / MANIFEST).read_bytes())
        assert Manifest.from_json(manifest.to_json()) == manifest
        json.dumps(describe(self._opened), allow_nan=False)
        verify(self._opened, progress=False)
        open_artifact(self._opened)


class Artifacts(Subject):
    """One file of a compiled artifact; what opens may be loaded, and then it runs or says why not.

    Loading takes longer than all else, so one in eight does it.
    """

    def __init__(self, folder: Path, artifact: Path) -> None:
        super().__init__(folder, artifact)
        self._copy = shutil.copytree(artifact, folder / "copy")
        self._contents = {
            path.relative_to(self._copy).as_posix(): path.read_bytes()
            for path in sorted(self._copy.rglob("*"))
            if path.is_file()
        }
        (self._library,) = (name for name in self._contents if name == "model.so")
        (self._weights,) = (name for name in self._contents if name.endswith(".safetensors"))
        self._payload = 8 + int.from_bytes(self._contents[self._weights][:8], "little")
        self._random = json.loads(self._contents[MANIFEST])
        self._random["random_seed"] = 0
        for weight in self._random["weights"]:
            weight["file"] = None
        self._damaged, self._load = "", False

    def damage(self, rng: random.Random) -> None:
        if self._damaged:
            self._restore(self._damaged)
        self._load = rng.random() < 1 / 8
        rare = [name for name in self._contents if name not in (self._library, self._weights)]
        self._damaged = rng.choice((self._library, self._weights, self._weights, *rare))
        path, content = self._copy / self._damaged, self._contents[self._damaged]
        path.unlink()  # so that what is mapped of the old file stays whole
        if rng.random() < 0.05:
            self._replace(rng, path)
        elif self._damaged == MANIFEST:
            described = rng.choice((json.loads(content), self._random))
            path.write_bytes(damage_text(rng, described))
        elif self._damaged == self._weights and rng.random() < 0.7:
            path.write_bytes(content[: self._payload] + self._numbers(rng, content))
        elif self._damaged == self._weights:
            path.write_bytes(damage_safetensors(rng, content))
        else:
            path.write_bytes(damage_bytes(rng, content))

    def _numbers(self, rng: random.Random, content: bytes) -> bytes:
        """Weights with other bytes in places: NaN, infinity, noise."""
        payload = bytearray(content[self._payload :])
        for _ in range(rng.randint(1, 4)):
            begin = rng.randrange(len(payload))
            end = min(len(payload), begin + rng.choice((1, 4, 1000, len(payload))))
            pattern = rng.choice((b"\xff", b"\x80\x7f", b"\0\0\x80\xff", rng.randbytes(64)))
            payload[begin:end] = (pattern * (end - begin))[: end - begin]
        return bytes(payload)

    def _replace(self, rng: random.Random, path: Path) -> None:
        """Something that is no such file."""
        draw = rng.randrange(4)
        if draw == 0:
            path.mkdir()
        elif draw == 1:
            path.symlink_to(path.name)
        elif draw == 2:
            path.write_bytes(rng.choice(list(self._contents.values())))

    def _restore(self, name: str) -> None:
        path = self._copy / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(self._contents[name])

    def use(self) -> None:
        intact = self._intact()
        found = verify(self._copy, progress=False)
        assert found.ok or not intact
        # The manifest has no hash of its own.
        assert not found.ok or intact or self._damaged == MANIFEST
        if self._damaged == self._library and not intact:
            open_artifact(self._copy)  # has to raise
            raise AssertionError("a damaged library was accepted")
        artifact = open_artifact(self._copy)
        if self._load:
            self._run(artifact)

    def _intact(self) -> bool:
        path = self._copy / self._damaged
        return path.is_file() and path.read_bytes() == self._contents[self._damaged]

    def _run(self, artifact: Any) -> None:
        from mxforge import SamplingParams
        from mxforge.engine import Engine

        with Engine(artifact, threads=1, context_length=64, max_batch=1) as engine:
            engine.tokenizer.encode("hello")
            if self._damaged != MANIFEST:
                answer = engine.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
                assert all(0 <= token < engine.vocab_size for token in answer.token_ids)


SUBJECTS: dict[str, type[Subject]] = {
    "safetensors": SafetensorsFiles,
    "config": Configs,
    "tokenizer": Tokenizers,
    "manifest": Manifests,
    "artifact": Artifacts,
}
