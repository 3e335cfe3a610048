"""Number formats as objects: what a value's bits mean, how numbers become them, what reads them.

    DenseFormat         weights of large dense layers (--dense)
    ActivationFormat    inputs of products (--activations)
    KVFormat            keys and values in the cache (--kv)
    mxfp4               the experts' weights, as every checkpoint has them

A format joins its table (`DENSE`, `ACTIVATIONS`, `KV`) where it is made. Command line, manifest,
weights, model and tests read these tables. A dense format is all in one file. An activation format
has kernels of the experts too, in `moe.GATE_UP` and `moe.DOWN`; a format of the cache has its sizes
in `mxforge.kv_layout`, since the runtime allocates it.
"""

from __future__ import annotations

from .activations import ACTIVATIONS, ActivationFormat
from .dense import DENSE, DenseFormat, DenseWeight, Part
from .kv import KV, KVFormat
from .table import FormatTable

__all__ = [
    "ACTIVATIONS",
    "DENSE",
    "KV",
    "ActivationFormat",
    "DenseFormat",
    "DenseWeight",
    "FormatTable",
    "KVFormat",
    "Part",
]
