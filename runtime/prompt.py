"""A single user message in the harmony format, for one-shot prompts."""

from __future__ import annotations

from .errors import TokenizerError
from .tokenizer import Tokenizer

# The system message of OpenAI's harmony guide, without a date so that runs repeat.
_SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\n"
    "Reasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)


def single_turn(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids that ask the model to answer `text`; what the user wrote is never special.

    Raises TokenizerError where the tokenizer has no harmony format.
    """
    content = tokenizer.encode(text)  # first: without a tokenizer, that is the error
    special = tokenizer.special_tokens
    needed = ("<|start|>", "<|message|>", "<|end|>")
    if any(name not in special for name in needed):
        raise TokenizerError(
            "This model's tokenizer has no harmony format to answer in; "
            "continue plain text with --raw instead."
        )
    start, message, end = (special[name] for name in needed)
    ids: list[int] = []
    for role, body in (("system", tokenizer.encode(_SYSTEM)), ("user", content)):
        ids += [start, *tokenizer.encode(role), message, *body, end]
    return [*ids, start, *tokenizer.encode("assistant")]
