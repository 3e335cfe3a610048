"""The mixture of experts: router, plan, and both halves of an expert by activation format."""

from __future__ import annotations

from .down import DOWN
from .gate_up import GATE_UP
from .plan import MOE_PLAN
from .route import ROUTE
from .router_topk import ROUTER_TOPK

__all__ = ["DOWN", "GATE_UP", "MOE_PLAN", "ROUTE", "ROUTER_TOPK"]
