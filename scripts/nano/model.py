"""nano in torch: gpt-oss's architecture over a compact vocabulary, with MXFP4-aware experts.

Rows of the embedding and of lm_head exist for the tokens in use only; the last row stands for all
others. In the softmax that row counts as often as there are such tokens. A batch is one prefix
(system and developer message) followed by many dialogues that see the prefix and themselves, with
positions that go on after the prefix: the same numbers as one sequence each.

Shapes: N tokens of a batch (the prefix and G groups of B dialogues padded to L), H hidden,
Hq / Hkv heads of D, E experts, I intermediate, U tokens in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mxforge.compile.models.gpt_oss import HARMONY
from mxforge.compile.models.gpt_oss.config import GptOssConfig

BLOCK = 32


def fake_quantize(w: Tensor) -> Tensor:
    """MXFP4 round trip over the last axis; the gradient passes unchanged.

    The rule of `nano.compact.quantize_mxfp4`.
    """
    with torch.no_grad():
        x = w.detach().reshape(-1, BLOCK)
        _, exponent = torch.frexp(x.abs().amax(dim=1, keepdim=True))
        scale = torch.ldexp(torch.ones_like(x[:, :1]), exponent - 3)
        y = x / scale
        size = y.abs()
        step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
        y = (torch.round(y / step) * step).clamp_(-6, 6) * scale
        delta = y.view_as(w) - w
    return w + delta


def _up(n: int, multiple: int) -> int:
    """oneDNN makes a kernel for each new shape, so shapes are rounded up."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Group:
    """B dialogues of one length, at [first, first + B·L) of the batch; the first group is the
    prefix, which has no keys before its own."""

    first: int
    count: int
    length: int
    is_prefix: bool


@dataclass(frozen=True)
class Batch:
    """rows i64 [N] compact ids; positions i64 [N]; predict i64 [M] places whose next token is
    trained, targets i64 [M] compact ids (-100: padding); owner i64 [M] the dialogue of each."""

    rows: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    predict: Tensor
    targets: Tensor
    owner: Tensor


def make_batch(
    prefix: Sequence[int],
    dialogues: Sequence[tuple[Sequence[int], Sequence[bool]]],
    compact: np.ndarray,
    group_size: int = 8,
) -> Batch:
    """Dialogues (ids, trained) after one prefix; `compact` i64 [vocabulary] maps ids to rows."""
    order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i][0]))
    groups = [Group(0, 1, len(prefix), True)]
    first = len(prefix)
    for at in range(0, len(order), group_size):
        members = order[at : at + group_size]
        length = _up(len(dialogues[members[-1]][0]), 8)
        groups.append(Group(first, len(members), length, False))
        first += len(members) * length
    rows = np.zeros(_up(first, 256), np.int64)
    positions = np.zeros_like(rows)
    rows[: len(prefix)] = compact[np.asarray(prefix)]
    positions[: len(prefix)] = np.arange(len(prefix))
    predict, targets, owner = [], [], []
    for n, group in enumerate(groups[1:]):
        for m in range(group.count):
            member = order[n * group_size + m]
            ids, trained = dialogues[member]
            first = group.first + m * group.length
            rows[first : first + len(ids)] = compact[np.asarray(ids)]
            positions[first : first + group.length] = len(prefix) + np.arange(group.length)
            (places,) = np.nonzero(trained)
            predict.append(first + places - 1)
            targets.append(rows[first + places])
            owner.append(np.full(len(places), member))

    def tensor(parts: list[np.ndarray], padding: int) -> Tensor:
        joined = np.concatenate(parts).astype(np.int64)
        pad = _up(len(joined), 256) - len(joined)
        return torch.from_numpy(np.pad(joined, (0, pad), constant_values=padding))

    return Batch(
        torch.from_numpy(rows), torch.from_numpy(positions), tuple(groups),
        tensor(predict, 0), tensor(targets, -100), tensor(owner, 0),
    )  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the precision of `x`: bfloat16 in training, which is how weights are stored."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int) -> None:
        super().__init__()
        self.config, self.window = config, config.window(layer)
        h = config.hidden_size
        self.qkv = nn.Parameter(torch.randn(config.qkv_rows, h) * h**-0.5)  # q, k, v stacked
        self.qkv_bias = nn.Parameter(torch.zeros(config.qkv_rows))
        self.out = nn.Parameter(torch.randn(h, config.q_size) * 0.5 * config.q_size**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(h))
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))  # [Hq]

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        qkv = _linear(x, self.qkv, self.qkv_bias).view(len(x), -1, c.head_dim)
        qk = _rotate(qkv[:, : -c.num_key_value_heads], cos, sin)
        q, k = qk[:, : c.num_attention_heads], qk[:, c.num_attention_heads :]
        v = qkv[:, -c.num_key_value_heads :]
        out = [self._group(group, batch.groups[0], q, k, v) for group in batch.groups]
        rest = len(x) - sum(map(len, out))
        return _linear(F.pad(torch.cat(out), (0, 0, 0, rest)), self.out, self.out_bias)

    def _group(self, group: Group, prefix: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.config
        b, n, d, kv = group.count, group.length, c.head_dim, c.num_key_value_heads
        here = slice(group.first, group.first + b * n)
        queries = q[here].view(b, n, kv, c.queries_per_kv, d).permute(0, 2, 3, 1, 4)
        queries = queries.reshape(b, kv, c.queries_per_kv * n, d)
        keys = k[here].view(b, n, kv, d)
        values = v[here].view(b, n, kv, d)
        before = 0
        if not group.is_prefix:
            before = min(prefix.length, self.window - 1) if self.window else prefix.length
            seen = slice(prefix.length - before, prefix.length)
            keys = torch.cat([k[seen].expand(b, -1, -1, -1), keys], dim=1)
            values = torch.cat([v[seen].expand(b, -1, -1, -1), values], dim=1)
        # The sink is a key of zeros whose score is the learned logit, and whose value is zero.
        s = before + n
        pad = _up(s + 1, 32) - s
        keys = F.pad(keys, (0, 0, 0, 0, 0, pad)).permute(0, 2, 3, 1)  # [b, kv, d, s + pad]
        values = F.pad(values, (0, 0, 0, 0, 0, pad)).permute(0, 2, 1, 3)  # [b, kv, s + pad, d]
        behind = torch.arange(n)[:, None] - torch.arange(-before, n)
        hidden = (behind < 0) | ((behind >= self.window) if self.window else False)
        mask = torch.full((n, s + pad), -1e9)
        mask[:, :s] = hidden * -1e9
        mask[:, s] = 0
        sink = F.pad(self.sinks[:, None], (s, pad - 1))  # [Hq, s + pad]
        bias = (mask + sink[:, None]).view(kv, c.queries_per_kv * n, -1)
        scores = (queries * d**-0.5) @ keys + bias
        share = torch.softmax(scores, dim=-1)
        out = share.to(values.dtype) @ values  # [b, kv, queries_per_kv · n, d]
        out = out.view(b, kv, c.queries_per_kv, n, d).permute(0, 3, 1, 2, 4)
        return out.reshape(b * n, c.q_size)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, D], cos and sin f32 [N, 1, D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """[T, 2I], gates then ups → [T, I]; with its own backward, which saves half the passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, limit: float, alpha: float) -> Tensor:
        gate, up = y.float().chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit).add_(1)
        sigmoid = torch.sigmoid(gate * alpha)
        ctx.save_for_backward(gate, up, sigmoid)
        ctx.limit, ctx.alpha = limit, alpha
        return (gate * sigmoid).mul_(up).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gate, up, sigmoid = ctx.saved_tensors
        grad = grads[0].float()
        silu = gate * sigmoid
        d_up = (grad * silu).mul_((up - 1).abs_() < ctx.limit)
        slope = (1 - sigmoid).mul_(silu).mul_(ctx.alpha).add_(sigmoid)
        d_gate = slope.mul_(up).mul_(grad).mul_(gate < ctx.limit)
        return torch.cat([d_gate, d_up], dim=-1).to(grads[0].dtype), None, None


class Experts(nn.Module):
    """Router and experts; gate_up holds all gates, then all ups (interleaved when exported)."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        e, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Parameter(torch.randn(e, h) * h**-0.5)
        self.router_bias = nn.Parameter(torch.zeros(e))
        self.gate_up = nn.Parameter(torch.randn(e, 2 * i, h) * h**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(e, 2 * i))
        self.down = nn.Parameter(torch.randn(e, h, i) * 0.5 * i**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(e, h))

    def forward(self, x: Tensor, dtype: torch.dtype, quantized: bool) -> tuple[Tensor, Tensor]:
        """x f32 [N, H] → f32 [N, H] and the balance of the routing (1 where it is even)."""
        c, n, k = self.config, len(x), self.config.num_experts_per_tok
        logits = F.linear(x, self.router, self.router_bias)  # [N, E]
        top, chosen = logits.topk(k, dim=-1)
        weights = F.pad(torch.softmax(top, dim=-1).flatten(), (0, 1))  # [N·k + 1]
        flat = chosen.flatten()
        members = [torch.nonzero(flat == e)[:, 0] for e in range(c.num_local_experts)]
        counts = torch.tensor([float(len(m)) for m in members])
        # Places without a token have weight 0.
        members = [F.pad(m, (0, _up(len(m), 128) - len(m)), value=n * k) for m in members]
        order = torch.cat(members)  # i64 [T]
        token = (order // k).clamp_(max=n - 1)
        gate_up = fake_quantize(self.gate_up) if quantized else self.gate_up
        down = fake_quantize(self.down) if quantized else self.down
        sizes = [len(m) for m in members]
        y = torch.cat([
            _linear(part, gate_up[e], self.gate_up_bias[e])
            for e, part in enumerate(x.to(dtype)[token].split(sizes))
        ])  # fmt: skip
        y = _SwiGLU.apply(y, c.swiglu_limit, c.swiglu_alpha)
        y = torch.cat([
            _linear(part, down[e], self.down_bias[e]) for e, part in enumerate(y.split(sizes))
        ])  # fmt: skip
        out = torch.zeros_like(x).index_add(0, token, y.float() * weights[order][:, None])
        share = counts / counts.sum()
        balance = c.num_local_experts * (share * torch.softmax(logits, dim=-1).mean(0)).sum()
        return out, balance


class Layer(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = Experts(config)

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        dtype: torch.dtype,
        quantized: bool,
    ) -> tuple[Tensor, Tensor]:
        normed = _norm(x, self.input_layernorm, self.eps).to(dtype)
        x = x + self.self_attn(normed, batch, cos, sin).float()
        normed = _norm(x, self.post_attention_layernorm, self.eps)
        y, balance = self.mlp(normed, dtype, quantized)
        return x + y, balance


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class Nano(nn.Module):
    """`dtype` is that of the matrix products: bfloat16 is twice as fast, float32 exact.

    `features` f32 [U + 1, K] describes tokens by what they have in common (numbers: their digits):
    while training, a row is its own values plus those of its features. Exported is the sum.
    """

    def __init__(
        self,
        config: GptOssConfig,
        used: int,
        dtype: torch.dtype = torch.float32,
        features: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        h = config.hidden_size
        self.features = torch.zeros(used + 1, 0) if features is None else features
        k = self.features.shape[1]
        own = torch.where(self.features.any(dim=1), 0.1, 1.0)[:, None]
        self.embed = nn.Parameter(torch.randn(used + 1, h) * own)  # [U + 1, H]
        self.embed_features = nn.Parameter(torch.randn(k, h) * 0.5)  # [K, H]
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(h))
        self.head = nn.Parameter(torch.randn(used + 1, h) * 0.1 * h**-0.5)  # [U + 1, H]
        self.head_features = nn.Parameter(torch.randn(k, h) * 0.1 * h**-0.5)  # [K, H]
        # What the softmax adds to the last row's logit: it counts once for each other token.
        self.shift = F.pad(
            torch.tensor([math.log(HARMONY.vocab_size - used)]), (used, 0)
        )  # [U + 1]
        self.inv_freq = torch.from_numpy(config.rope_inv_freq())

    def hidden(self, batch: Batch, quantized: bool) -> tuple[Tensor, Tensor]:
        """The residual stream f32 [N, H] after the last layer, and the mean balance."""
        angles = batch.positions.float()[:, None] * self.inv_freq
        factor = self.config.rope_attention_factor
        cos, sin = angles.cos()[:, None] * factor, angles.sin()[:, None] * factor
        x = F.embedding(batch.rows, self.embed + self.features @ self.embed_features)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, batch, cos, sin, self.dtype, quantized)
            balances.append(balance)
        return x, torch.stack(balances).mean()

    def logits(self, x: Tensor) -> Tensor:
        """x [M, H] → f32 [M, U + 1]; the last is of every token that is not in use."""
        normed = _norm(x, self.norm, self.config.rms_norm_eps).to(self.dtype)
        return _linear(normed, self.head + self.features @ self.head_features).float()

    def loss(self, batch: Batch, quantized: bool) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the whole vocabulary, and the balance of the routing."""
        x, balance = self.hidden(batch, quantized)
        # A target is always a token in use, so the shift never adds to its own logit.
        logits = self.logits(x[batch.predict]) + self.shift
        return F.cross_entropy(logits, batch.targets), balance

    @torch.no_grad()
    def right(self, batch: Batch, dialogues: int) -> Tensor:
        """bool [dialogues]: whether each expected token is the likeliest."""
        x, _ = self.hidden(batch, True)
        logits = self.logits(x[batch.predict])
        wrong = (logits.argmax(dim=-1) != batch.targets) & (batch.targets >= 0)
        right = torch.ones(dialogues, dtype=torch.bool)
        right[batch.owner[wrong]] = False
        return right


# -- to and from the published tensors ------------------------------------------------------------


def _places(model: Nano) -> dict[str, Tensor]:
    """Published name -> the parameter, or the rows of one, that it is."""
    features = model.features
    places: dict[str, Tensor] = {
        "model.embed_tokens.weight": (model.embed + features @ model.embed_features).detach()
    }
    for n, layer in enumerate(model.layers):
        p, attention, mlp = f"model.layers.{n}.", layer.self_attn, layer.mlp
        c = model.config
        sizes = (c.q_size, c.kv_size, c.kv_size)
        for name, rows, bias in zip(
            ("q_proj", "k_proj", "v_proj"),
            attention.qkv.data.split(sizes),
            attention.qkv_bias.data.split(sizes),
            strict=True,
        ):
            places[f"{p}self_attn.{name}.weight"] = rows
            places[f"{p}self_attn.{name}.bias"] = bias
        named = {
            "input_layernorm.weight": layer.input_layernorm,
            "self_attn.o_proj.weight": attention.out,
            "self_attn.o_proj.bias": attention.out_bias,
            "self_attn.sinks": attention.sinks,
            "post_attention_layernorm.weight": layer.post_attention_layernorm,
            "mlp.router.weight": mlp.router,
            "mlp.router.bias": mlp.router_bias,
            "mlp.experts.gate_up_proj": mlp.gate_up,
            "mlp.experts.gate_up_proj_bias": mlp.gate_up_bias,
            "mlp.experts.down_proj": mlp.down,
            "mlp.experts.down_proj_bias": mlp.down_bias,
        }
        places |= {p + name: parameter.data for name, parameter in named.items()}
    head = (model.head + features @ model.head_features).detach()
    return places | {"model.norm.weight": model.norm.data, "lm_head.weight": head}


def export(model: Nano) -> dict[str, np.ndarray]:
    """Published name -> float32; experts' matrices as `…gate_up_proj` [E, 2I, H] and
    `…down_proj` [E, H, I] not yet packed, the vocabulary's [U + 1, H]."""
    return {
        name: (_interleave(place) if "gate_up" in name else place).numpy()
        for name, place in _places(model).items()
    }


def load(config: GptOssConfig, tensors: Mapping[str, np.ndarray]) -> Nano:
    """The inverse of `export`, in float32."""
    model = Nano(config, len(tensors["model.embed_tokens.weight"]) - 1)
    model.requires_grad_(False)
    for name, place in _places(model).items():
        value = torch.from_numpy(np.ascontiguousarray(tensors[name], np.float32))
        if "gate_up" in name:
            value = torch.cat([value[:, 0::2], value[:, 1::2]], dim=1)
        place.copy_(value)
    model.embed.data = torch.from_numpy(np.array(tensors["model.embed_tokens.weight"]))
    model.head.data = torch.from_numpy(np.array(tensors["lm_head.weight"]))
    return model


def _interleave(x: Tensor) -> Tensor:
    """[E, 2I, …], gates then ups → gate, up, gate, up."""
    gate, up = x.chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).reshape(x.shape)


# -- optimizer -----------------------------------------------------------------------------------


class Optimizer:
    """Muon for the matrices of the layers, Adam for everything else.

    Muon (Jordan et al. 2024): Nesterov momentum, orthogonalized by five Newton-Schulz steps.
    """

    def __init__(self, model: Nano, matrix_rate: float, rate: float, decay: float = 0.01) -> None:
        matrices, others = [], []
        for name, p in model.named_parameters():
            is_matrix = name.startswith("layers.") and name.endswith(
                ("attn.qkv", "attn.out", "gate_up", "down")
            )
            (matrices if is_matrix else others).append(p)
        self.matrices, self.others = matrices, others
        self.rates, self.decay, self.steps = (matrix_rate, rate), decay, 0
        self.momentum = [torch.zeros_like(p) for p in matrices]
        self.first = [torch.zeros_like(p) for p in others]
        self.second = [torch.zeros_like(p) for p in others]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the peak learning rates."""
        self.steps += 1
        rate = self.rates[0] * scale
        for p, m in zip(self.matrices, self.momentum, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 0.05)
            update = _orthogonal(p.grad.lerp(m, 0.95))
            p.mul_(1 - rate * self.decay)
            p.add_(update, alpha=-rate * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)
        rate, (b1, b2) = self.rates[1] * scale, (0.9, 0.98)
        for p, m, v in zip(self.others, self.first, self.second, strict=True):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - b1)
            v.lerp_(p.grad.square(), 1 - b2)
            size = (v / (1 - b2**self.steps)).sqrt_().add_(1e-10)
            p.addcdiv_(m, size, value=-rate / (1 - b1**self.steps))

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "momentum": self.momentum,
            "first": self.first, "second": self.second,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.momentum, self.first, self.second = (
            state["momentum"], state["first"], state["second"],
        )  # fmt: skip


def _orthogonal(g: Tensor) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns, of each [..., m, n]."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return (x.mT if tall else x).float()
