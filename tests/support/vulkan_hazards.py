"""The rules of runtime/native/vulkan/hazards.h a second time: a checker of logs, by brute force.

For each access it follows, event by event, which stages are ordered behind it and which see what
it wrote; a later access that conflicts and is not among them is an unguarded hazard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]
DEVICE = ("compute", "transfer")


def unguarded(log: list[Event]) -> Iterator[str]:
    """A line for each pair of conflicting accesses that nothing orders; none: the log is sound."""
    for first, event in enumerate(log):
        if event["event"] != "command" or event["stage"] == "host":
            continue  # what the host did comes before whatever is submitted later
        for access in event["accesses"]:
            yield from _follow(log, first, event, access)


def without(log: list[Event], index: int) -> list[Event]:
    return log[:index] + log[index + 1 :]


def barriers(log: list[Event]) -> list[int]:
    return [index for index, event in enumerate(log) if event["event"] == "barrier"]


def _follow(log: list[Event], first: int, event: Event, access: list[Any]) -> Iterator[str]:
    resource, kind, begin, end = access
    stage, wrote = event["stage"], kind == "w"
    ordered: set[str] = set()  # stages whose next command runs after this one
    sees: set[str] = set()  # stages that see what it wrote
    promised: list[int] = []  # positions of barriers that let the host see it, once waited for
    for later in log[first + 1 :]:
        if later["event"] == "forget" and later["resource"] == resource:
            break
        if later["event"] == "barrier":
            to = later["to"]
            if any(s == stage or s in ordered for s in later["execution"]) and to in DEVICE:
                ordered.add(to)
            if any(s == stage or s in sees for s in later["memory"]):
                if to in DEVICE:
                    sees.add(to)
                else:
                    promised.append(later["position"])
        elif later["event"] == "wait":
            if later["position"] >= event["position"]:
                ordered.update((*DEVICE, "host"))
            if any(later["position"] >= position for position in promised):
                sees.add("host")
        elif later["event"] == "command":
            for other, other_kind, other_begin, other_end in later["accesses"]:
                apart = other != resource or other_end <= begin or end <= other_begin
                if apart or (not wrote and other_kind == "r"):
                    continue
                by = later["stage"]
                if by not in ordered or (wrote and by not in sees):
                    yield (
                        f"{later['name']} ({by}, {other_kind}) at {later['position']} after "
                        f"{event['name']} ({stage}, {kind}) at {event['position']} of {resource}"
                    )
