"""Number formats that a user may choose in place of what a target does best."""

from __future__ import annotations

from dataclasses import dataclass

from mxforge.errors import UsageError

# By their names on the command line: what the compiler calls them.
CHOICES = {
    "kv": {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": "int8"},
    "activations": {"f32": "f32", "bf16": "bf16", "int8": "i8"},
    "dense": {"bf16": "bf16", "int8": "i8"},
}


@dataclass(frozen=True)
class Formats:
    """What was asked for, in the compiler's names; None leaves it to the target."""

    kv: str | None = None
    activations: str | None = None
    dense: str | None = None

    @classmethod
    def of(cls, numerics: str, **asked: str | None) -> Formats:
        """From the command line's names.

        UsageError where one is unknown, or asked of exact numerics, which are float32 throughout.
        """
        found = {}
        for option, name in asked.items():
            if name is None:
                continue
            if name not in CHOICES[option]:
                known = ", ".join(CHOICES[option])
                raise UsageError(f"{option} must be one of {known}, found {name!r}.")
            if numerics == "exact":
                raise UsageError(
                    f"{option} {name} was asked for with exact numerics, which are float32 "
                    "throughout; leave it out, or take fast numerics."
                )
            found[option] = CHOICES[option][name]
        return cls(**found)
