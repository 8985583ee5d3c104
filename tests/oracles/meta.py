"""Meta's Llama 4 (`llama-models`, `llama_models/llama4/model.py`) at tiny size on a CPU, in and out as numpy.

It is written for GPUs under model parallelism, so it is given a process group of one, and while it is built a
`Tensor.cuda` that stays on the CPU (its two caches ask for it) and a rope scaling whose original context, fixed in its
source at 8192, can be tiny. Both of these are taken back.

Only whole prefills are an oracle. Its single-token decode forgets the chunk mask: right up to the first chunk's end,
and wrong after it.
"""

import contextlib
import functools
import io
from unittest import mock

import llama_models.llama4.model as meta_model
import numpy as np
import torch
from fairscale.nn.model_parallel import initialize as model_parallel
from jaxtyping import Float, Int
from llama_models.llama4.args import ModelArgs, MoEArgs, VisionArgs
from llama_models.llama4.datatypes import TransformerInput

from oracles import hf
from oracles.cases import Case, tokens

ORIGINAL_CONTEXT = 8192  # in Meta's `apply_scaling`


@functools.cache
def _join_process_group_of_one() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its group sizes
        model_parallel.initialize_model_parallel(1)


def args(case: Case) -> ModelArgs:
    """The case in Meta's words, where widths are derived from multipliers: find some that give ours."""
    if not case.meta:
        raise ValueError(f"Meta's code cannot express the case {case.name!r}.")
    dense = int(2 * int(4 * case.embed) / 3)
    multiplier = (case.mlp + 0.5) / dense
    # the expert's width is int(multiplier * int(2 * int(ffn_exp * embed) / 3))
    widths = {int(multiplier * int(2 * hidden / 3)): hidden for hidden in range(1, 64 * case.embed)}
    rope = case.rope_scaling
    return ModelArgs(
        dim=case.embed,
        n_layers=case.layers,
        n_heads=case.heads,
        n_kv_heads=case.kv_heads,
        vocab_size=case.vocab,
        multiple_of=1,
        ffn_dim_multiplier=multiplier,
        ffn_exp=(widths[case.expert_mlp] + 0.5) / case.embed,
        norm_eps=case.norm_eps,
        attention_chunk_size=case.chunk,
        rope_theta=case.rope_theta,
        use_scaled_rope=rope is not None,
        rope_scaling_factor=rope and rope.factor,
        rope_high_freq_factor=rope and rope.high,
        nope_layer_interval=case.nope_interval,
        use_qk_norm=case.qk_norm,
        attn_temperature_tuning=case.temperature,
        floor_scale=case.temperature_floor,
        attn_scale=case.temperature_coef,
        moe_args=None
        if case.moe_interval == 0
        else MoEArgs(
            num_experts=case.experts,
            auto_scale_F=False,
            top_k=case.top_k,
            interleave_moe_layer_step=case.moe_interval,
        ),
        max_batch_size=case.batch,
        max_seq_len=case.length,
    )


def state_dict(case: Case, hf_weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Hugging Face's weights under the keys of Meta's published single-rank checkpoints."""
    weights = {name: torch.from_numpy(array) for name, array in hf_weights.items()}
    ours = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for i, moe in enumerate(case.moe):
        theirs, mine = f"model.layers.{i}.", f"layers.{i}."
        attention = [weights[theirs + f"self_attn.{name}_proj.weight"] for name in "qkv"]
        ours[mine + "attention.wqkv.weight"] = torch.cat(attention)
        ours[mine + "attention.wo.weight"] = weights[theirs + "self_attn.o_proj.weight"]
        ours[mine + "attention.wqkv.layer_norm_weight"] = weights[theirs + "input_layernorm.weight"]
        ffn_norm = weights[theirs + "post_attention_layernorm.weight"]
        theirs, mine = theirs + "feed_forward.", mine + "feed_forward."
        if moe:
            ours[mine + "norm.weight"] = ffn_norm
            ours[mine + "router_DE"] = weights[theirs + "router.weight"].T.contiguous()
            gate, up = weights[theirs + "experts.gate_up_proj"].chunk(2, dim=-1)
            down = weights[theirs + "experts.down_proj"]
            ours[mine + "experts.moe_w_in_eD_F"] = gate.flatten(0, 1)
            ours[mine + "experts.moe_w_swiglu_eD_F"] = up.flatten(0, 1)
            ours[mine + "experts.moe_w_out_eF_D"] = down.flatten(0, 1)
            ours[mine + "w_in_shared_FD.weight"] = weights[theirs + "shared_expert.gate_proj.weight"]
            ours[mine + "w_swiglu_FD.weight"] = weights[theirs + "shared_expert.up_proj.weight"]
            ours[mine + "w_out_shared_DF.weight"] = weights[theirs + "shared_expert.down_proj.weight"]
        else:
            ours[mine + "mlp.layer_norm_weight"] = ffn_norm
            gate_up = [weights[theirs + f"{name}_proj.weight"] for name in ("gate", "up")]
            ours[mine + "mlp.fc1_weight"] = torch.cat(gate_up)
            ours[mine + "mlp.fc2_weight"] = weights[theirs + "down_proj.weight"]
    return ours


def empty(of: ModelArgs) -> meta_model.Transformer:
    """Meta's model on the CPU, its weights not set."""
    _join_process_group_of_one()
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        return meta_model.Transformer(of)


def build(case: Case, weights: dict[str, torch.Tensor], vision: dict | None = None) -> meta_model.Transformer:
    """Meta's model in float32 on the CPU with these weights, loaded strictly by Meta's own hooks.

    - vision: the `vision_args` of a params.json
    """
    scaling = meta_model.apply_scaling
    shrink = 1.0 if case.rope_scaling is None else case.rope_scaling.original / ORIGINAL_CONTEXT

    def scaling_with_our_context(freqs, *factors):
        # wavelengths are compared with 8192: slow the frequencies down as much as our context is shorter
        return scaling(freqs * shrink, *factors) / shrink

    with mock.patch.object(meta_model, "apply_scaling", scaling_with_our_context):
        model = empty(args(case).model_copy(update={"vision_args": vision and VisionArgs(**vision)}))
    model.load_state_dict(dict(weights), strict=True)
    return model.eval()


def prefill(model: meta_model.Transformer, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    """Logits of a whole prefill, float32."""
    output = model(TransformerInput(tokens=torch.from_numpy(ids), tokens_position=0))
    return output.logits.clone().numpy()


@functools.cache
def reference(case: Case) -> meta_model.Transformer:
    """Meta's model with the Hugging Face oracle's weights."""
    return build(case, state_dict(case, hf.reference(case).state_dict))


@functools.cache
def logits(case: Case) -> Float[np.ndarray, "B T V"]:
    """Of the case's own tokens."""
    return prefill(reference(case), tokens(case))
