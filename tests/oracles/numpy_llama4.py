"""Llama 4's text model in numpy, as slow and as obvious as it can be: one token, one head, one expert at a time.

Written from the published description of the architecture, not from either reference's code, so that all three must
agree for a reason. It takes weights under Hugging Face's names; those of linear layers are [out, in].
"""

import math

import numpy as np
from jaxtyping import Float, Int

from oracles.cases import Case


def frequencies(case: Case) -> Float[np.ndarray, "H/2"]:
    """Radians a position, one for each pair of head dimensions, after Llama 3's scaling by wavelength."""
    freqs = [case.rope_theta ** (-2 * j / case.head_dim) for j in range(case.head_dim // 2)]
    if case.rope_scaling is None:
        return np.array(freqs)
    rope, scaled = case.rope_scaling, []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < rope.original / rope.high:
            scaled.append(freq)
        elif wavelength > rope.original / rope.low:
            scaled.append(freq / rope.factor)
        else:  # never reached when low equals high
            keep = (rope.original / wavelength - rope.low) / (rope.high - rope.low)
            scaled.append(keep * freq + (1 - keep) * freq / rope.factor)
    return np.array(scaled)


def rotate(vector: Float[np.ndarray, "H"], position: int, freqs: Float[np.ndarray, "H/2"]) -> Float[np.ndarray, "H"]:
    """Neighbouring dimensions (2j, 2j+1) are one complex number, turned by position * freqs[j]."""
    turned = np.empty_like(vector)
    for j, freq in enumerate(freqs):
        real, imaginary = vector[2 * j], vector[2 * j + 1]
        cos, sin = math.cos(position * freq), math.sin(position * freq)
        turned[2 * j] = real * cos - imaginary * sin
        turned[2 * j + 1] = real * sin + imaginary * cos
    return turned


def rms_norm(x: Float[np.ndarray, "*shape D"], eps: float) -> Float[np.ndarray, "*shape D"]:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def attention(
    case: Case, weights: dict[str, np.ndarray], layer: int, x: Float[np.ndarray, "T D"]
) -> Float[np.ndarray, "T D"]:
    """Causal self-attention of one layer over one sequence."""
    prefix, heads, kv_heads, size = f"model.layers.{layer}.self_attn.", case.heads, case.kv_heads, case.head_dim
    length, uses_rope, freqs = len(x), case.rope[layer], frequencies(case)
    queries = (x @ weights[prefix + "q_proj.weight"].T).reshape(length, heads, size)
    keys = (x @ weights[prefix + "k_proj.weight"].T).reshape(length, kv_heads, size)
    values = (x @ weights[prefix + "v_proj.weight"].T).reshape(length, kv_heads, size)

    for position in range(length):
        for vectors in (queries, keys):
            for head in range(vectors.shape[1]):
                if uses_rope:
                    vectors[position, head] = rotate(vectors[position, head], position, freqs)
                if uses_rope and case.qk_norm:
                    vectors[position, head] = rms_norm(vectors[position, head], case.norm_eps)
        if not uses_rope and case.temperature:
            bucket = (position + 1) // case.temperature_floor
            queries[position] *= 1 + case.temperature_coef * math.log(bucket + 1)

    mixed = np.empty_like(queries)
    for position in range(length):
        first = position // case.chunk * case.chunk if uses_rope and case.chunk else 0  # of the chunk
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = keys[first : position + 1, kv_head] @ queries[position, head] / math.sqrt(size)
            weight = np.exp(scores - scores.max())
            mixed[position, head] = (weight / weight.sum()) @ values[first : position + 1, kv_head]
    return mixed.reshape(length, heads * size) @ weights[prefix + "o_proj.weight"].T


def swiglu(x, gate, up, down):
    """Weights here are [in, out]."""
    return (silu(x @ gate) * (x @ up)) @ down


def feed_forward(
    case: Case, weights: dict[str, np.ndarray], layer: int, x: Float[np.ndarray, "T D"]
) -> Float[np.ndarray, "T D"]:
    """Dense, or the shared expert plus the chosen ones, each fed the token times the sigmoid of its router logit."""
    prefix = f"model.layers.{layer}.feed_forward."

    def linears(where: str) -> list[np.ndarray]:
        return [weights[f"{prefix}{where}{name}_proj.weight"].T for name in ("gate", "up", "down")]

    if not case.moe[layer]:
        return swiglu(x, *linears(""))
    out = swiglu(x, *linears("shared_expert."))
    gate_up, down = weights[prefix + "experts.gate_up_proj"], weights[prefix + "experts.down_proj"]
    for position, token in enumerate(x):
        router = weights[prefix + "router.weight"] @ token
        for expert in np.argsort(-router)[: case.top_k]:
            gate, up = np.split(gate_up[expert], 2, axis=-1)
            score = 1 / (1 + np.exp(-router[expert]))
            out[position] += swiglu(score * token, gate, up, down[expert])
    return out


def logits(
    case: Case, weights: dict[str, np.ndarray], ids: Int[np.ndarray, "B T"], dtype=np.float64
) -> Float[np.ndarray, "B T V"]:
    """The whole text model, every sequence for itself."""
    weights = {name: array.astype(dtype) for name, array in weights.items()}

    def norm(x, name):
        return rms_norm(x, case.norm_eps) * weights[name]

    rows = []
    for sequence in ids:
        x = weights["model.embed_tokens.weight"][sequence]
        for layer in range(case.layers):
            prefix = f"model.layers.{layer}."
            x = x + attention(case, weights, layer, norm(x, prefix + "input_layernorm.weight"))
            x = x + feed_forward(case, weights, layer, norm(x, prefix + "post_attention_layernorm.weight"))
        rows.append(norm(x, "model.norm.weight") @ weights["lm_head.weight"].T)
    return np.stack(rows)
