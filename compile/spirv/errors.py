"""How the generator refuses: one error class, whose message names construct and function."""

from __future__ import annotations

from mxforge.errors import VulkanCodegenError


class Refusal(Exception):
    """Raised inside the generator, where the kernel's name is not known.

    construct: what was found; expected: what can be there instead; remedy: what to do.
    """

    def __init__(self, construct: str, expected: str, remedy: str) -> None:
        super().__init__(construct)
        self.construct, self.expected, self.remedy = construct, expected, remedy

    def of(self, kernel: str) -> VulkanCodegenError:
        return VulkanCodegenError(
            f"The Vulkan kernel {kernel} holds {self.construct}; expected {self.expected}. "
            f"{self.remedy}"
        )
