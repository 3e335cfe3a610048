"""mxforge: the thin runtime of compiled gpt-oss models.

    import mxforge

    engine = mxforge.Engine.load("artifacts/gpt-oss-20b-cpu")
    answer = engine.generate("The capital of France is", mxforge.SamplingParams(max_tokens=16))
    print(answer.text)

Names are loaded when they are first used, so that `import mxforge` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .chat import ChatCompletion, ChatPiece, ChatStream, ToolCallPiece
    from .compile import compile_model
    from .engine import Engine
    from .errors import MxforgeError
    from .messages import ToolCall
    from .results import Completion, Metrics, Piece, Timings, TokenLogprob, Usage
    from .sampling import SamplingParams

_HOME = {
    "ChatCompletion": "chat",
    "ChatPiece": "chat",
    "ChatStream": "chat",
    "Completion": "results",
    "Engine": "engine",
    "Metrics": "results",
    "MxforgeError": "errors",
    "Piece": "results",
    "SamplingParams": "sampling",
    "Timings": "results",
    "ToolCall": "messages",
    "ToolCallPiece": "chat",
    "TokenLogprob": "results",
    "Usage": "results",
    "compile_model": "compile",
}

__all__ = [
    "ChatCompletion",
    "ChatPiece",
    "ChatStream",
    "Completion",
    "Engine",
    "Metrics",
    "MxforgeError",
    "Piece",
    "SamplingParams",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallPiece",
    "Usage",
    "__version__",
    "compile_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mxforge' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
