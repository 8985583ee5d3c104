"""Hugging Face's Llama 4 (`transformers`, `models/llama4/modeling_llama4.py`) at tiny size, in and out as numpy.

Eager attention in float32 on one thread. `reference(case)` is cached, and so is everything costly it computes for the
case's own tokens, so the parity tests of one process pay for each once.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.utils import logging

from oracles.cases import Case, tokens

torch.set_num_threads(1)  # test processes run side by side, and at these sizes threads only wait for each other
logging.set_verbosity_error()  # it warns that rope's high factor should exceed its low one, which Scout's does not

WEIGHT_STD = 0.08


def config(case: Case) -> Llama4TextConfig:
    """The case in Hugging Face's words."""
    rope = {"rope_type": "default", "rope_theta": case.rope_theta}
    if case.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": case.rope_scaling.factor,
            "low_freq_factor": case.rope_scaling.low,
            "high_freq_factor": case.rope_scaling.high,
            "original_max_position_embeddings": case.rope_scaling.original,
        }
    # transformers 5.23 cannot run without a chunk size; saying that every layer attends in full is its way to say so
    everywhere = {} if case.chunk is not None else {"layer_types": ["full_attention"] * case.layers}
    return Llama4TextConfig(
        vocab_size=case.vocab,
        hidden_size=case.embed,
        intermediate_size=case.expert_mlp,
        intermediate_size_mlp=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        moe_layers=[i for i, moe in enumerate(case.moe) if moe],
        no_rope_layers=[int(rope) for rope in case.rope],
        attention_chunk_size=case.chunk or 8192,
        use_qk_norm=case.qk_norm,
        attn_temperature_tuning=case.temperature,
        floor_scale=case.temperature_floor,
        attn_scale=case.temperature_coef,
        rms_norm_eps=case.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        **everywhere,
    )


def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every tensor from numpy's generator, in the order of the names: the same on every version of torch."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), np.float32))
            is_norm = "norm" in name
            tensor.copy_(1 + 0.2 * noise if is_norm else WEIGHT_STD * noise)


@dataclass(frozen=True)
class Step:
    """One optimiser step: the loss before it, and the gradient of every parameter by Hugging Face's name."""

    loss: float
    grads: dict[str, np.ndarray]


class Reference:
    """One tiny Hugging Face model with random weights. Methods return numpy, float32 unless said otherwise."""

    def __init__(self, case: Case):
        self.case = case
        self.model = Llama4ForCausalLM(config(case)).eval()
        random_weights(self.model, case.seed)

    @functools.cached_property
    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy().copy() for name, tensor in self.model.state_dict().items()}

    @functools.cached_property
    def inv_freq(self) -> Float[np.ndarray, "H/2"]:
        """Radians a position for each pair of rotary dimensions, scaled."""
        return self.model.model.rotary_emb.inv_freq.numpy().copy()

    def logits(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        with torch.no_grad():
            return self.model(torch.from_numpy(ids), use_cache=False).logits.numpy()

    def trace(self, ids: Int[np.ndarray, "B T"]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(input, output) of every module by its name, as they were in one forward pass.

        `model.layers.3.self_attn`, `.input_layernorm`, `.feed_forward`, `.feed_forward.router` (output: the raw
        logits [B*T, E]), `model.layers.3` (the residual stream before and after), `model.norm`, `lm_head` and so on.
        """
        seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def record(name, module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):  # attention: (output, weights); experts: (output, router logits)
                output = output[1] if name.endswith("router") else output[0]
            # the experts' output is added to in place later on, so keep copies
            seen[name] = (given.numpy().copy(), output.reshape(*given.shape[:-1], -1).numpy().copy())

        hooks = [
            module.register_forward_hook(functools.partial(record, name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name.startswith("model.layers.") or name in ("model.norm", "lm_head")
            if not name.endswith((".act_fn", ".activation_fn", ".qk_norm", ".experts"))
        ]
        try:
            self.logits(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def router_logits(self, ids: Int[np.ndarray, "B T"]) -> dict[int, Float[np.ndarray, "B T E"]]:
        """Raw router logits by layer, for the layers that have experts."""
        trace = self.trace(ids)
        return {
            layer: trace[f"model.layers.{layer}.feed_forward.router"][1].reshape(*ids.shape, -1)
            for layer, moe in enumerate(self.case.moe)
            if moe
        }

    def decode_logits(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits when the tokens are fed one at a time through the key/value cache."""
        cache, steps = None, []
        with torch.no_grad():
            for column in torch.from_numpy(ids).split(1, dim=1):
                output = self.model(column, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                steps.append(output.logits[:, 0].numpy())
        return np.stack(steps, axis=1)

    def greedy(self, prompt: Int[np.ndarray, "B T"], steps: int) -> Int[np.ndarray, "B steps"]:
        """The tokens that `generate` appends to prompts of equal length, always the most likely one."""
        ids = torch.from_numpy(prompt)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
        )
        return output[:, prompt.shape[1] :].numpy()

    def loss_and_grads(self, ids: Int[np.ndarray, "B T"]) -> Step:
        """Mean cross entropy in nats of every next token (B * (T - 1) of them), and its gradients."""
        self.model.zero_grad(set_to_none=True)
        loss = _next_token_loss(self.model, torch.from_numpy(ids))
        loss.backward()
        grads = {name: parameter.grad.numpy().copy() for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return Step(loss.item(), grads)

    def adamw(
        self, batches: list[Int[np.ndarray, "B T"]], *, lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> tuple[list[float], dict[str, np.ndarray]]:
        """Train a copy with `torch.optim.AdamW`, one step a batch; the losses before each step, and the last weights.

        Weight decay applies to every parameter alike, norms included.
        """
        model = Llama4ForCausalLM(config(self.case)).eval()
        model.load_state_dict(self.model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=decay)
        losses = []
        for ids in batches:
            optimizer.zero_grad()
            loss = _next_token_loss(model, torch.from_numpy(ids))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}

    def save_pretrained(self, directory, *, shards: int = 1) -> None:
        """Write config.json and the weights as `transformers` does, in about this many shards."""
        size = sum(tensor.nbytes for tensor in self.state_dict.values())
        limit = size + 1 if shards == 1 else -(-size // shards)
        self.model.save_pretrained(directory, max_shard_size=limit)


def _next_token_loss(model: Llama4ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@functools.cache
def reference(case: Case) -> Reference:
    return Reference(case)


@functools.cache
def logits(case: Case) -> Float[np.ndarray, "B T V"]:
    """Of the case's own tokens."""
    return reference(case).logits(tokens(case))


@functools.cache
def trace(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of the case's own tokens."""
    return reference(case).trace(tokens(case))


@functools.cache
def step(case: Case) -> Step:
    """Of the case's own tokens."""
    return reference(case).loss_and_grads(tokens(case))
