"""Slow and obvious float64, in numpy: what the operations mean. Nothing here imports the project."""

import numpy as np


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """x as an array of this dtype holds it, in float64."""
    return x.astype(dtype).astype(np.float64)


def error(got, wanted: np.ndarray) -> float:
    """‖got - wanted‖ / ‖wanted‖; NaN if anything is not finite."""
    got = np.asarray(got).astype(np.float64)
    if got.shape != wanted.shape:
        raise ValueError(f"the shape is {got.shape}, expected {wanted.shape}.")
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def attention(q, k, v, g, seen, scale):
    """q, g [B N T H], k, v [B K S H], seen [B T S] → out and the gradients of q, k, v for the cotangent g."""
    groups = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.where(seen[:, None], np.einsum("bnth,bnsh->bnts", q, keys) * scale, -np.inf)
    p = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300)) * seen[:, None]
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bnsh->bnth", p, values)
    dp = np.einsum("bnth,bnsh->bnts", g, values)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk, dv = (
        np.einsum("bnts,bnsh->bnth", ds, keys),
        np.einsum("bnts,bnth->bnsh", ds, q),
        np.einsum("bnts,bnth->bnsh", p, g),
    )
    dk, dv = (x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    return out, dq, dk, dv


def seen(positions: np.ndarray, segments: np.ndarray, chunk: int | None) -> np.ndarray:
    """[B T T]: the keys that each query sees: of its document and its chunk, not of its future."""
    q, k = positions[:, :, None], positions[:, None, :]
    found = (k <= q) & (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    return found if chunk is None else found & (q // chunk == k // chunk)


def grouped(x, w, g, sizes):
    """Rows sorted by group: x [R I], w [E I O], g [R O] → the products, and the gradients of x and w."""
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], g[rows] @ w[e].T, x[rows].T @ g[rows]
        start += size
    return y, dx, dw


def cross_entropy(hidden, head, targets, weights):
    """hidden [N D], head [D V] → Σ weight · nll and its gradients."""
    logits = hidden @ head
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    n = np.arange(len(targets))
    total = -(weights * np.log(p[n, targets])).sum()
    p[n, targets] -= 1
    p *= weights[:, None]
    return total, p @ head.T, hidden.T @ p


def swiglu_experts(x, expert, gate, gate_up, down):
    """x [N D], expert, gate [N], gate_up [E 2 D F], down [E F D] → expert(gate · x), row by row."""
    out = np.zeros(x.shape)
    for e in range(len(down)):
        rows = expert == e
        scaled = x[rows] * gate[rows, None]
        a, b = scaled @ gate_up[e, 0], scaled @ gate_up[e, 1]
        out[rows] = (a / (1 + np.exp(-a)) * b) @ down[e]
    return out


def filtered(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """Probabilities [V] of what temperature, top-k and top-p leave, by sorting."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits[order] - logits[order[0]]) / temperature)
    p = p[:top_k] / p[:top_k].sum()
    last = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    kept = np.zeros(len(logits))
    kept[order[: len(p)][:last]] = p[:last] / p[:last].sum()
    return kept
