"""What a kernel asks of the device: capabilities on SPIR-V's side, features on Vulkan's.

A capability is declared and a feature recorded at the moment that an instruction needs it, so
that a device lacks nothing that the kernel does not use. The loader compares the record with the
device and names what is missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .assembler import Assembler
from .dtypes import DType
from .encoding import Capability, Op, StorageClass

# Names of VkBool32 members of Vulkan's feature structs. What core Vulkan 1.2 has is not listed.
_FEATURES: dict[Capability, str] = {
    Capability.FLOAT16: "shaderFloat16",
    Capability.FLOAT64: "shaderFloat64",
    Capability.INT8: "shaderInt8",
    Capability.INT16: "shaderInt16",
    Capability.INT64: "shaderInt64",
    Capability.STORAGE_BUFFER_8BIT_ACCESS: "storageBuffer8BitAccess",
    Capability.STORAGE_BUFFER_16BIT_ACCESS: "storageBuffer16BitAccess",
    Capability.PHYSICAL_STORAGE_BUFFER_ADDRESSES: "bufferDeviceAddress",
    Capability.DOT_PRODUCT: "shaderIntegerDotProduct",
    Capability.COOPERATIVE_MATRIX: "cooperativeMatrix",
    Capability.VULKAN_MEMORY_MODEL: "vulkanMemoryModel",
    Capability.VULKAN_MEMORY_MODEL_DEVICE_SCOPE: "vulkanMemoryModelDeviceScope",
}
# The bits of VkSubgroupFeatureFlags, by their names in lower case.
_SUBGROUP_OPERATIONS: dict[Capability, str] = {
    Capability.GROUP_NON_UNIFORM: "basic",
    Capability.GROUP_NON_UNIFORM_VOTE: "vote",
    Capability.GROUP_NON_UNIFORM_ARITHMETIC: "arithmetic",
    Capability.GROUP_NON_UNIFORM_BALLOT: "ballot",
    Capability.GROUP_NON_UNIFORM_SHUFFLE: "shuffle",
}
# A SPIR-V extension and the device extension that brings it.
_DEVICE_EXTENSIONS = {
    "SPV_KHR_integer_dot_product": "VK_KHR_shader_integer_dot_product",
    "SPV_KHR_cooperative_matrix": "VK_KHR_cooperative_matrix",
}

_ARITHMETIC: dict[tuple[str, int], Capability] = {
    ("integer", 8): Capability.INT8,
    ("integer", 16): Capability.INT16,
    ("integer", 64): Capability.INT64,
    ("float", 64): Capability.FLOAT64,
}


@dataclass(frozen=True, order=True)
class MatrixProduct:
    """A product of cooperative matrices, a [m, k] · b [k, n] + c [m, n], by one subgroup.

    a, b, c, result: dtypes of the elements
    """

    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    result: str


@dataclass
class Requirements:
    """Collects what one kernel needs while its code is written."""

    assembler: Assembler
    features: set[str] = field(default_factory=set)
    extensions: set[str] = field(default_factory=set)
    subgroup_operations: set[str] = field(default_factory=set)
    subgroup_size: int | None = None
    products: set[MatrixProduct] = field(default_factory=set)

    def capability(self, capability: Capability) -> None:
        self.assembler.capabilities.add(capability)
        if capability in _FEATURES:
            self.features.add(_FEATURES[capability])
        if capability in _SUBGROUP_OPERATIONS:
            # Every capability of subgroups builds upon the basic one.
            self.assembler.capabilities.add(Capability.GROUP_NON_UNIFORM)
            self.subgroup_operations |= {"basic", _SUBGROUP_OPERATIONS[capability]}

    def extension(self, name: str) -> None:
        self.assembler.extensions.add(name)
        self.extensions.add(_DEVICE_EXTENSIONS[name])

    def arithmetic(self, dtype: DType) -> None:
        """Registers of this type: 8, 16 and 64 bits are features of their own.

        Whether float16 is more than loaded, converted and stored is seen at the end (`complete`).
        """
        kind = "float" if dtype.is_float else "integer"
        if dtype.kind != "bool" and (kind, dtype.bits) in _ARITHMETIC:
            self.capability(_ARITHMETIC[kind, dtype.bits])

    def storage(self, dtype: DType) -> None:
        """Global memory holds elements of this type."""
        if dtype.bits == 8:
            self.capability(Capability.STORAGE_BUFFER_8BIT_ACCESS)
        elif dtype.bits == 16:
            self.capability(Capability.STORAGE_BUFFER_16BIT_ACCESS)

    def subgroup_type(self, dtype: DType) -> None:
        """A subgroup operation on this type."""
        narrow = dtype.bits in (8, 16) and dtype.kind != "bool"
        if narrow or (dtype.bits == 64 and not dtype.is_float):
            self.features.add("shaderSubgroupExtendedTypes")

    def matrices(self) -> None:
        """Cooperative matrices, which are there under Vulkan's memory model alone."""
        self.capability(Capability.COOPERATIVE_MATRIX)
        self.capability(Capability.VULKAN_MEMORY_MODEL)
        self.extension("SPV_KHR_cooperative_matrix")

    def complete(self) -> None:
        """The code is written: does it compute in float16?"""
        if _computes_in_float16(self.assembler):
            self.capability(Capability.FLOAT16)

    def to_json(self) -> dict[str, Any]:
        """The object `requirements` of the module format, in an order that never changes."""
        return {
            "features": sorted(self.features),
            "extensions": sorted(self.extensions),
            "subgroup_operations": sorted(self.subgroup_operations),
            "subgroup_size": self.subgroup_size,
            "matrices": [asdict(product) for product in sorted(self.products)],
        }


def _computes_in_float16(assembler: Assembler) -> bool:
    """Whether float16 is more than loaded, converted and stored: that much needs no arithmetic."""
    types: set[int] = set()  # float16 and its vectors
    for op, words in assembler.declarations():
        if (op == Op.TYPE_FLOAT and words[1] == 16) or (op == Op.TYPE_VECTOR and words[1] in types):
            types.add(words[0])
        elif op == Op.TYPE_POINTER:
            if words[2] in types and words[1] != StorageClass.PHYSICAL_STORAGE_BUFFER:
                return True
        elif op in (Op.TYPE_ARRAY, Op.TYPE_RUNTIME_ARRAY, Op.TYPE_COOPERATIVE_MATRIX):
            if words[1] in types:
                return True
        elif words[0] in types and op != Op.TYPE_STRUCT:  # a constant
            return True
    values: set[int] = set()
    for op, words in assembler.instructions() if types else ():
        if op in (Op.LOAD, Op.F_CONVERT):
            if words[0] in types:
                values.add(words[1])
        elif op not in (Op.STORE, Op.ACCESS_CHAIN):
            ids = words[:3] + words[4:] if op == Op.EXT_INST else words
            if (ids and ids[0] in types) or not values.isdisjoint(ids):
                return True
    return False
