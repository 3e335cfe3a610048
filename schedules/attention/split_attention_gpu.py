"""Split attention on GPUs: a block for each token, group of heads and split."""

from __future__ import annotations

from . import attend_cuda, attend_gpu

SCHEDULES = (*attend_cuda.schedules(split=True), *attend_gpu.schedules(split=True))
