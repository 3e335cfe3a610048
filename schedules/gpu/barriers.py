"""Barriers, in the words of each GPU family."""

from __future__ import annotations

from ..kernel import T


@T.inline
def barrier():
    """All threads of the block have come here, and see what the others wrote: to shared memory, and
    on CUDA and Vulkan to device memory too."""
    T.evaluate(T.tvm_storage_sync("shared"))


@T.inline
def metal_device_barrier():
    """The same for device memory on Metal, which orders the memories that a barrier names."""
    # mem_flags::mem_device | mem_flags::mem_threadgroup
    T.evaluate(
        T.call_extern("int32", "threadgroup_barrier", T.call_extern("int32", "mem_flags", 3))
    )
