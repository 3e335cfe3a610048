from __future__ import annotations
import sys
from collections.abc import Callable
from .errors import MxforgeError
def run_command(name: str, run: Callable[[], None]) -> int:
    try:
        run()
    except MxforgeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0
