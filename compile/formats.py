"""Number formats of a model: what a target does best, and what a user may ask for instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxforge.errors import UsageError
from mxforge.schedules.formats import ACTIVATIONS, DENSE, KV, DenseFormat, FormatTable
from mxforge.schedules.kernel import Kernel, Target
from mxforge.schedules.moe import DOWN, GATE_UP

# By the options of the command line that choose from them.
TABLES: Mapping[str, FormatTable[Any]] = {"kv": KV, "activations": ACTIVATIONS, "dense": DENSE}


@dataclass(frozen=True)
class Formats:
    """What was asked for, in the command line's names; None leaves it to the target."""

    kv: str | None = None
    activations: str | None = None
    dense: str | None = None

    @classmethod
    def of(cls, numerics: str, **asked: str | None) -> Formats:
        """Checked: UsageError where a name is unknown, or where one is asked of exact numerics,
        which are float32 throughout."""
        for option, name in asked.items():
            if name is None:
                continue
            if name not in TABLES[option].options():
                known = ", ".join(TABLES[option].options())
                raise UsageError(f"{option} must be one of {known}, found {name!r}.")
            if numerics == "exact":
                raise UsageError(
                    f"{option} {name} was asked for with exact numerics, which are float32 "
                    "throughout; leave it out, or take fast numerics."
                )
        return cls(**asked)


@dataclass(frozen=True)
class Precision:
    """The formats that a model is compiled with, by their names in the tables.

    The default is that of exact numerics.
    """

    kv: str = "float32"
    activations: str = "f32"  # the inputs of the experts
    dense: str = "bf16"  # attention's projections and the output layer

    def options(self) -> dict[str, str | None]:
        """The formats in the command line's names, by its options."""
        return {option: table[getattr(self, option)].option for option, table in TABLES.items()}

    def with_asked(self, asked: Formats, target: Target) -> Precision:
        """This, where nothing else is asked for; of equals, what `target` has a kernel for."""
        kv = KV.asked(asked.kv)[0].name if asked.kv else self.kv
        activations = (
            ACTIVATIONS.asked(asked.activations)[0].name if asked.activations else self.activations
        )
        same = DENSE.asked(asked.dense or DENSE[self.dense].option)
        # Of the dense formats of one option, that which takes the experts' activations too.
        known = [one for one in same if one.kernel.runs_on(target)] or list(same)
        dense = next((one for one in known if one.inputs.name == activations), known[0])
        return Precision(kv, activations, dense.name)

    def dense_of(self, k: int) -> DenseFormat:
        """How a dense weight of k inputs is kept: bf16 where it does not fit its format."""
        format_ = DENSE[self.dense]
        return format_ if k % format_.weight.multiple == 0 else DENSE["bf16"]

    def unscheduled(self, target: Target, **experts: int) -> list[str]:
        """The formats that `target` lacks a kernel for, as the command line has them; of experts of
        these sizes, `ModelConfig.expert_sizes`, where they are given."""
        activations, dense = ACTIVATIONS[self.activations], DENSE[self.dense]

        def has(kernel: Kernel | None, **sizes: int) -> bool:
            if kernel is None:
                return False
            return kernel.fits(target, **sizes) if sizes else kernel.runs_on(target)

        found = {
            f"activations {activations.option or activations.name}": (
                *map(has, activations.kernels),
                *(has(halves.get(activations.name), **experts) for halves in (GATE_UP, DOWN)),
            ),
            f"dense {dense.option or dense.name}": (
                *map(has, dense.inputs.kernels),
                has(dense.kernel),
            ),
        }
        return [option for option, kernels in found.items() if not all(kernels)]
