"""What schedules are chosen for in tests that need no machine, no compiler and no driver."""

from __future__ import annotations

from mxforge.compile import cuda
from mxforge.compile.targets import VULKAN_PROFILES, gpu_target
from mxforge.schedules.kernel import Target

PLAIN_CPU = Target("cpu", frozenset({"cpu"}))
CUDA = gpu_target("cuda", *cuda.features("sm_90a"))
BLACKWELL = gpu_target("cuda", *cuda.features("sm_120a"))
METAL = gpu_target("metal")
VULKAN = gpu_target("vulkan", *VULKAN_PROFILES[0].features)
GPUS = (*(gpu_target("cuda", *cuda.features(arch)) for arch in cuda.ARCHS), METAL, VULKAN)
