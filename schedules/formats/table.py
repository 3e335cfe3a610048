"""The table of one kind of formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from mxforge.errors import FormatError


class Named(Protocol):
    """What a table holds.

    `name` stands in manifests; `option` on the command line, None where nobody may ask for it.
    """

    @property
    def name(self) -> str: ...

    @property
    def option(self) -> str | None: ...


F = TypeVar("F", bound=Named)


class FormatTable(Generic[F]):
    """Formats of one `kind` by name, in the order in which they joined."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._formats: dict[str, F] = {}

    def add(self, format_: F) -> F:
        """The format, which is in the table from now on; FormatError where its name is taken."""
        if format_.name in self._formats:
            raise FormatError(
                f"There is a {self.kind} format called {format_.name!r} already; each needs a name "
                "of its own, which manifests hold."
            )
        self._formats[format_.name] = format_
        return format_

    def remove(self, format_: F) -> None:
        """Take a format out again."""
        del self._formats[format_.name]

    def __getitem__(self, name: str) -> F:
        """The format of this name; FormatError where there is none."""
        if name not in self._formats:
            raise FormatError(
                f"Unknown {self.kind} format {name!r}; the known ones are {', '.join(self)}."
            )
        return self._formats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def formats(self) -> tuple[F, ...]:
        return tuple(self._formats.values())

    def options(self) -> tuple[str, ...]:
        """What may be asked for on the command line."""
        return tuple(dict.fromkeys(f.option for f in self.formats() if f.option is not None))

    def asked(self, option: str | None) -> tuple[F, ...]:
        """The formats that an option stands for, the plainest first."""
        return tuple(f for f in self.formats() if f.option == option)
