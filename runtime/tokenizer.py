"""Text to token ids and back.

A tokenizer is one of three kinds, named in the artifact's manifest:

    "o200k_harmony"   gpt-oss's own: the ranks come with mxforge, the artifact holds only the
                      special tokens (tokenizer/special_tokens.json)
    "tokenizers"      any other checkpoint's, as the artifact's tokenizer/tokenizer.json
    None              none: token ids in, token ids out

Text never becomes a special id, whatever stands in it: only who builds a prompt from ids
(a chat template) can place one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from binascii import b2a_base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np

from .errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

TokenizerKind = Literal["o200k_harmony", "tokenizers"]

HARMONY_VOCAB = 201_088
SPECIAL_TOKENS_FILE = "special_tokens.json"
TOKENIZER_FILE = "tokenizer.json"

RANKS_FILE = Path(__file__).parent / "data" / "o200k_base.ranks"
_RANKS_SHA256 = "440741350e7cfa1c0f4869ce742d1b043550adbda5187adcac9e787edac6fba9"
_RANKS = 199_998  # and everything from here to HARMONY_VOCAB is special

# How o200k_base cuts text into words before merging: a word with at most one leading sign, its
# capitals first or capitals only, with an English contraction; up to three digits; a run of
# signs; then the kinds of white space.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

HARMONY_SPECIAL_TOKENS: Mapping[str, int] = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer. All methods may be called from several threads."""

    @property
    def kind(self) -> TokenizerKind | None:
        """Which of the three it is."""

    @property
    def vocab_size(self) -> int:
        """Highest id + 1; 0 without a tokenizer. The model's vocabulary can be larger."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Name -> id."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special. Raises TokenizerError without a tokenizer."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, possibly part of a character; of a special token, its name.

        Empty for an id that has no token (a vocabulary may be padded beyond its tokenizer).
        """

    def decode_bytes(self, tokens: Iterable[int], *, special: bool = True) -> bytes:
        """The bytes of `tokens` in a row; with `special=False` special tokens give nothing."""


class _Decoding:
    """`decode_bytes` in terms of `token_bytes` and `special_tokens`."""

    special_tokens: Mapping[str, int]

    def token_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def decode_bytes(self, tokens: Iterable[int], *, special: bool = True) -> bytes:
        hidden = frozenset() if special else frozenset(self.special_tokens.values())
        return b"".join(self.token_bytes(token) for token in tokens if token not in hidden)


class O200kHarmony(_Decoding):
    """gpt-oss's tokenizer: the o200k_base ranks and harmony's special tokens, through tiktoken.

    `special_tokens` maps names to ids in [199998, 201088); ids there without a name become
    ``<|reserved_ID|>``. The first text to encode takes about 0.3 s, once per process.
    """

    kind: TokenizerKind = "o200k_harmony"
    vocab_size = HARMONY_VOCAB

    def __init__(self, special_tokens: Mapping[str, int] = HARMONY_SPECIAL_TOKENS) -> None:
        named = {token: name for name, token in special_tokens.items()}
        outside = sorted(token for token in named if not _RANKS <= token < HARMONY_VOCAB)
        names = [named.get(i, f"<|reserved_{i}|>") for i in range(_RANKS, HARMONY_VOCAB)]
        self.special_tokens = dict(zip(names, range(_RANKS, HARMONY_VOCAB), strict=True))
        if outside or len(named) != len(special_tokens) or len(self.special_tokens) != len(names):
            found = (
                f"{str(outside[0])[:20]} lies outside" if outside else "one has two names or ids"
            )
            raise TokenizerError(
                f"o200k_harmony's special ids are distinct numbers from {_RANKS} to "
                f"{HARMONY_VOCAB - 1} with distinct names, but {found}."
            )
        self._ranks = o200k_ranks()
        self._names = [name.encode() for name in names]

    def encode(self, text: str) -> list[int]:
        encode = _o200k_encoding().encode_ordinary
        return [token for chunk in _chunks(_encodable(text)) for token in encode(chunk)]

    def token_bytes(self, token: int) -> bytes:
        if 0 <= token < _RANKS:
            return self._ranks[token]
        return self._names[token - _RANKS] if _RANKS <= token < HARMONY_VOCAB else b""


class HFTokenizer(_Decoding):
    """A checkpoint's own tokenizer.json, through the `tokenizers` library.

    Byte-level vocabularies (gpt-oss, GPT-2, Llama 3) give exact bytes, so that characters split
    over tokens survive; others give what the token adds to a decoded text.
    """

    kind: TokenizerKind = "tokenizers"

    def __init__(self, path: Path) -> None:
        """Raises TokenizerError where `path` is missing or not a tokenizer."""
        try:
            import tokenizers
        except ImportError as error:
            raise TokenizerError(
                f"This model's tokenizer needs the package tokenizers, which cannot be imported "
                f'({error}); install it with: pip install "mxforge[tokenizers]"'
            ) from error

        with _named(f"{path} should hold a tokenizer of the Hugging Face tokenizers format"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # This setting is not stored in the file; those two are, and would bend every prompt.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self._added = {i: token.content.encode() for i, token in added.items()}
        # The unknown token marks text it stands for; it steers nothing.
        self._forbidden = {i for name, i in self.special_tokens.items() if name != unknown}
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._byte_level = "ByteLevel" in _component_types(self._tokenizer.decoder)
        self._anchor = next(iter(self.encode("a")), 0)
        self._anchor_text = self._decode([self._anchor])

    def encode(self, text: str) -> list[int]:
        return self._encode(_encodable(text))

    def _encode(self, text: str) -> list[int]:
        with _named("The model's tokenizer should turn text into ids"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # A vocabulary can list the names of special tokens among its words: spell those out.
        if len(text) == 1:
            raise TokenizerError(f"The tokenizer has no plain token for the character {text!r}.")
        spelled: list[int] = []
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token not in self._forbidden:
                spelled.append(token)
            else:
                for character in text[start:end]:
                    spelled += self._encode(character)
        return spelled

    def is_o200k_harmony(self) -> bool:
        """Whether this says what O200kHarmony says (as the file of gpt-oss itself does)."""
        named = {token: name for name, token in HARMONY_SPECIAL_TOKENS.items()}
        words = self._tokenizer.get_vocab_size(with_added_tokens=False)
        if not self._byte_level or words < _RANKS or self.vocab_size > HARMONY_VOCAB:
            return False
        if self.special_tokens.get("<|return|>") != HARMONY_SPECIAL_TOKENS["<|return|>"]:
            return False
        for token, name in self._added.items():
            if token < _RANKS or named.get(token, name.decode()) != name.decode():
                return False
        return all(self.token_bytes(i) == rank for i, rank in enumerate(o200k_ranks()))

    def _decode(self, tokens: list[int]) -> str:
        with _named("The model's tokenizer should turn ids into text"):
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        name = self._tokenizer.id_to_token(token) if 0 <= token < self.vocab_size else None
        if name is None:
            return b""
        if self._byte_level:
            codes = _byte_of_character()
            return b"".join(codes.get(character, character.encode()) for character in name)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes.fromhex(byte[1])
        # Between words a decoder adds or drops spaces, so look at the token in company.
        return self._decode([self._anchor, token])[len(self._anchor_text) :].encode()


@contextlib.contextmanager
def _named(expected: str) -> Iterator[None]:
    """TokenizerError for what the `tokenizers` library raises: bare exceptions, and panics of its
    Rust code, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{expected}, but could not ({_reason(error)}); take tokenizer.json from the model's "
            "source again."
        ) from None


class NoTokenizer(_Decoding):
    """Stands where a model has no tokenizer: text cannot go in, and comes out empty."""

    kind: TokenizerKind | None = None
    vocab_size = 0
    special_tokens: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        raise TokenizerError(
            "This model was compiled without a tokenizer, so it takes token ids and no text; "
            "give ids, or compile a checkpoint that has a tokenizer.json."
        )

    def token_bytes(self, token: int) -> bytes:
        return b""


def load_tokenizer(folder: Path, kind: str | None) -> Tokenizer:
    """The tokenizer of an artifact.

    `folder` is the artifact's ``tokenizer/`` (not looked at when `kind` is None), `kind` what the
    manifest says. Raises TokenizerError where a file is missing or unreadable.
    """
    if kind is None:
        return NoTokenizer()
    if kind == "tokenizers":
        return HFTokenizer(Path(folder) / TOKENIZER_FILE)
    if kind == "o200k_harmony":
        return O200kHarmony(_read_special_tokens(Path(folder) / SPECIAL_TOKENS_FILE))
    raise TokenizerError(
        f'The kinds of tokenizers are "o200k_harmony", "tokenizers" and none, not {kind!r}.'
    )


def tokenizer_files(
    tokenizer_json: Path | None, vocab_size: int
) -> tuple[TokenizerKind | None, dict[str, bytes]]:
    """What a compiled model takes along of a checkpoint's tokenizer.

    Returns the kind and the files for the artifact's ``tokenizer/`` folder. A tokenizer.json that
    says the same as o200k_harmony becomes that; without one, a vocabulary of 201,088 is taken for
    o200k_harmony's, and any other has none. Raises TokenizerError where the file is unreadable.
    """
    harmony = json.dumps(HARMONY_SPECIAL_TOKENS, indent=1, sort_keys=True).encode() + b"\n"
    if tokenizer_json is None:
        if vocab_size == HARMONY_VOCAB:
            return "o200k_harmony", {SPECIAL_TOKENS_FILE: harmony}
        return None, {}
    tokenizer = HFTokenizer(Path(tokenizer_json))
    if tokenizer.is_o200k_harmony():
        return "o200k_harmony", {SPECIAL_TOKENS_FILE: harmony}
    return "tokenizers", {TOKENIZER_FILE: Path(tokenizer_json).read_bytes()}


def _read_special_tokens(path: Path) -> dict[str, int]:
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path} should list the special tokens, but could not be read ({_reason(error)}); "
            "compile the model again."
        ) from None
    if not isinstance(content, dict) or not all(
        type(token) is int and name.isprintable() for name, token in content.items()
    ):
        raise TokenizerError(
            f"{path} should map names of special tokens to ids, but holds something else; "
            "compile the model again."
        )
    return content


class Ranks(Sequence[bytes]):
    """The words of a byte-pair vocabulary in the order of their ranks, cut out of a file when they
    are asked for: a byte for the length of each, then all of them."""

    def __init__(self, content: bytes, count: int) -> None:
        self._content = content
        lengths = np.frombuffer(content, np.uint8, count)
        self._ends = (np.cumsum(lengths, dtype=np.int64) + count).tolist()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, rank: int) -> bytes: ...
    @overload
    def __getitem__(self, rank: slice) -> list[bytes]: ...
    def __getitem__(self, rank: int | slice) -> bytes | list[bytes]:
        if isinstance(rank, slice):
            return [self[each] for each in range(*rank.indices(len(self)))]
        if not -len(self) <= rank < len(self):
            raise IndexError(rank)
        rank %= len(self)
        end = self._ends[rank]
        return self._content[end - self._content[rank] : end]

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def text(self) -> bytes:
        """As tiktoken's files hold them: lines of "base64 rank"."""
        lines = (b"%s %d\n" % (b2a_base64(word, newline=False), i) for i, word in enumerate(self))
        return b"".join(lines)


@lru_cache(maxsize=1)
def o200k_ranks() -> Ranks:
    """Those of o200k_base; TokenizerError where the package's file is not as it was."""
    try:
        content, reason = RANKS_FILE.read_bytes(), "its hash is another"
    except OSError as error:
        content, reason = b"", str(error)
    if hashlib.sha256(content).hexdigest() != _RANKS_SHA256:
        raise TokenizerError(
            f"{RANKS_FILE} should hold the o200k_base ranks, but does not ({reason}); "
            "install mxforge again."
        )
    return Ranks(content, _RANKS)


@lru_cache(maxsize=1)
def _o200k_encoding() -> tiktoken.Encoding:
    """tiktoken's encoder of them; one serves every engine."""
    import tiktoken

    return tiktoken.Encoding(
        "o200k_harmony",
        pat_str=_O200K_PATTERN,
        mergeable_ranks={word: rank for rank, word in enumerate(o200k_ranks())},
        special_tokens={},  # so that none can come out of text
    )


def _reason(error: BaseException) -> str:
    """What an error says, which may quote the file, as a short line of ASCII."""
    return ascii(str(error))[1:-1][:200]


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, as replacement characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# tiktoken's matcher overflows its stack on a million blanks in a row.
_CHUNK = 400_000
_WORD_END = re.compile(r"[A-Za-z0-9](?= )")


def _chunks(text: str) -> Iterator[str]:
    """`text` in chunks of at most `_CHUNK` characters, cut where the pattern cuts words anyway."""
    start = 0
    while len(text) - start > _CHUNK:
        end = start + _CHUNK
        # The last blank after a letter; a text without one for so long has no better place.
        for match in _WORD_END.finditer(text, end - 1000, end):
            end = match.end()
        yield text[start:end]
        start = end
    yield text[start:]


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, bytes]:
    """Byte-level vocabularies write bytes as printable characters: itself, or the next from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    codes = {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}
    return codes | {chr(byte): bytes([byte]) for byte in printable}


def _component_types(component: Any) -> set[str]:
    """The types named in a component of a `tokenizers.Tokenizer`, nested ones included."""
    if component is None:
        return set()
    return set(re.findall(r'"type":\s*"(\w+)"', component.__getstate__().decode()))
