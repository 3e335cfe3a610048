"""TVM's default GPU schedules (dlight) through our generator, at odd shapes, on a device."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from support.spirv_programs import TARGET, run
from tvm import te, topi
from tvm.s_tir import dlight

RULES = (
    dlight.gpu.Matmul,
    dlight.gpu.GEMV,
    dlight.gpu.Reduction,
    dlight.gpu.GeneralReduction,
    dlight.gpu.Transpose,
    dlight.gpu.Fallback,
)
TOLERANCE = {"float32": 1e-6, "float16": 5e-3}


def scheduled(tensors: list[te.Tensor]) -> tvm.tirx.PrimFunc:
    function = te.create_prim_func(tensors).with_attr("global_symbol", "main")
    with tvm.target.Target({**TARGET, "max_shared_memory_per_block": 16384}):
        module = tvm.IRModule({"main": function})
        return dlight.ApplyDefaultSchedule(*[rule() for rule in RULES])(module)["main"]


def agree(tensors: list[te.Tensor], arrays: list[np.ndarray], expected: np.ndarray) -> None:
    dtype = str(arrays[0].dtype)
    out = run(scheduled(tensors), *arrays, np.zeros(expected.shape, dtype))[-1]
    error = np.linalg.norm(out.astype(np.float64) - expected)
    assert error <= TOLERANCE[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 77, 129), (33, 65, 47), (128, 128, 64), (5, 1000, 96)]
)
def test_matrix_products(dtype, m, n, k):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(n, k)).astype(dtype)
    x, y = te.placeholder((m, k), dtype, "x"), te.placeholder((n, k), dtype, "y")
    axis = te.reduce_axis((0, k), "axis")
    product = te.compute((m, n), lambda i, j: te.sum(x[i, axis] * y[j, axis], axis=axis))
    agree([x, y, product], [a, b], a.astype(np.float64) @ b.astype(np.float64).T)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


OPERATIONS = {
    "sum": (lambda x: topi.sum(x, axis=1), lambda x: x.sum(1)),
    "max": (lambda x: topi.max(x, axis=1), lambda x: x.max(1)),
    "softmax": (lambda x: topi.nn.softmax(x, axis=1), softmax),
    "transpose": (topi.transpose, lambda x: x.T),
    "relu": (topi.nn.relu, lambda x: np.maximum(x, 0)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7, 1001), (64, 64), (3, 33)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_reductions_and_moves(name, shape, dtype):
    operation, reference = OPERATIONS[name]
    data = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x = te.placeholder(shape, dtype, "x")
    agree([x, operation(x)], [data], reference(data.astype(np.float64)))
