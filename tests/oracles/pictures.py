"""Both references with their vision encoders, at tiny size: rows of tokens with pictures in them."""

import dataclasses
import functools

import numpy as np
import torch
from jaxtyping import Float, Int
from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

from llama4_jax.model.config import ModelConfig, VisionConfig
from oracles import hf, meta, ours
from oracles.cases import MAVERICK, SCOUT, Case, tokens

PATCH = 90  # the token whose place a feature takes
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,  # as the pixel shuffle makes it
    "vision_output_dim": 24,
    "image_size": 24,
    "patch_size": 6,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
META_VISION = {
    "image_size": {"height": 24, "width": 24},
    "patch_size": {"height": 6, "width": 6},
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "mlp_ratio": 4.0,
    "output_dim": 24,
    "pixel_shuffle_ratio": 0.5,
}
TOKENS_PER_TILE = 4
# Where each row's tiles stand: next to one another, across the ends of attention chunks (of 8), at the very beginning.
PLACES = ((3, 7, 18), (0,))
# The encoder is what they are for: half the language model's layers are enough, one interval of NoPE.
CASES = tuple(dataclasses.replace(case, layers=4) for case in (SCOUT, MAVERICK))


def config(case: Case) -> ModelConfig:
    """The case in our words."""
    vision = VisionConfig(
        embed_dim=32, num_layers=3, num_heads=4, mlp_dim=128, image_size=24, patch_size=6, adapter_dim=24,
        output_dim=24, patch_token_id=PATCH,
    )  # fmt: skip
    return dataclasses.replace(ours.config(case), vision=vision)


def ids(case: Case) -> Int[np.ndarray, "B T"]:
    """The case's tokens, with `TOKENS_PER_TILE` patches from each place on."""
    rows = tokens(case)
    rows[rows == PATCH] = 1
    for row, places in zip(rows, PLACES, strict=True):
        for place in places:
            row[place : place + TOKENS_PER_TILE] = PATCH
    return rows


def tiles() -> Float[np.ndarray, "B tiles S S 3"]:
    """Random numbers from -1 to 1; rows with fewer tiles end in zeros."""
    made = np.random.default_rng(7).uniform(-1, 1, (len(PLACES), max(map(len, PLACES)), 24, 24, 3))
    for row, places in zip(made, PLACES, strict=True):
        row[len(places) :] = 0
    return made.astype(np.float32)


def _pixels() -> list[torch.Tensor]:
    """The tiles of each row, channels first, without padding."""
    return [
        torch.from_numpy(row[: len(places)].transpose(0, 3, 1, 2).copy())
        for row, places in zip(tiles(), PLACES, strict=True)
    ]


@functools.cache
def hf_model(case: Case) -> Llama4ForConditionalGeneration:
    """Hugging Face's, with random weights; biases and embeddings are not zero."""
    config = Llama4Config(
        text_config=hf.config(case), vision_config=Llama4VisionConfig(**VISION), image_token_index=PATCH
    )
    model = Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    hf.random_weights(model, seed=case.seed)
    return model


def state_dict(case: Case) -> dict[str, np.ndarray]:
    """Its tensors, by the names that files have."""
    return {
        name.removeprefix("model.") if name.startswith("model.vision") else name: tensor.numpy().copy()
        for name, tensor in hf_model(case).state_dict().items()
    }


@functools.cache
def trace(case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(input, output) of the vision encoder's modules by their names, and of the projector, in one forward pass."""
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def record(name, module, args, kwargs, output):
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))
        output = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        if isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor):
            seen[name] = (given.numpy().copy(), output.numpy().copy())

    model = hf_model(case)
    hooks = [
        module.register_forward_hook(functools.partial(record, name), with_kwargs=True)
        for name, module in model.named_modules()
        if "vision" in name or "projector" in name
    ]
    try:
        hf_logits(case)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def hf_logits(case: Case) -> Float[np.ndarray, "B T V"]:
    with torch.no_grad():
        return _hf_forward(case).numpy()


def _hf_forward(case: Case) -> torch.Tensor:
    return hf_model(case)(torch.from_numpy(ids(case)), pixel_values=torch.cat(_pixels()), use_cache=False).logits


def hf_greedy(case: Case, row: int, steps: int) -> Int[np.ndarray, " steps"]:
    """What Hugging Face's `generate` appends to one row, always the most likely token."""
    prompt = torch.from_numpy(ids(case)[row : row + 1])
    output = hf_model(case).generate(
        prompt,
        pixel_values=_pixels()[row],
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=0,
    )
    return output[0, prompt.shape[1] :].numpy()


@functools.cache
def hf_step(case: Case) -> hf.Step:
    """Loss and gradients of the next tokens, by the names that files have. No patch is a target."""
    model = hf_model(case)
    model.zero_grad(set_to_none=True)
    targets = torch.from_numpy(ids(case)[:, 1:].copy())
    targets[targets == PATCH] = -100  # torch's word for no target
    loss = torch.nn.functional.cross_entropy(_hf_forward(case)[:, :-1].flatten(0, 1), targets.flatten())
    loss.backward()
    grads = {
        name.removeprefix("model.") if name.startswith("model.vision") else name: parameter.grad.numpy().copy()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return hf.Step(loss.item(), grads)


def meta_logits(case: Case) -> Float[np.ndarray, "B T V"]:
    """Meta's code with the same weights, renamed here: none of our own code is between."""
    weights = state_dict(case)
    text = {
        name.removeprefix("language_model."): array
        for name, array in weights.items()
        if name.startswith("language_model.")
    }
    vision = {name: torch.from_numpy(array) for name, array in weights.items() if "vision" in name}
    renamed = {_meta_name(name): tensor for name, tensor in vision.items()}
    renamed["vision_projection.weight"] = torch.from_numpy(weights["multi_modal_projector.linear_1.weight"])
    model = meta.build(case, meta.state_dict(case, text) | renamed, vision=META_VISION).float()
    rows = torch.from_numpy(ids(case))
    mask = (rows == PATCH)[..., None]
    with torch.no_grad():
        like = torch.zeros(*rows.shape, case.embed)
        model.load_state_dict(meta.state_dict(case, text) | renamed, strict=True)  # again, now that all is float32
        embedding = model.vision_embeddings([[row] for row in _pixels()], mask, like)
        given = TransformerInput(tokens=rows, tokens_position=0, image_embedding=MaskedEmbedding(embedding, mask))
        return model(given).logits.clone().numpy()


def _meta_name(name: str) -> str:
    """Of a tensor of the vision model."""
    encoder = "vision_embeddings.vision_encoder."
    if "vision_adapter" in name:
        mlp = "vision_embeddings.vision_adapter.mlp."
        return mlp + {"fc1": "c_fc", "fc2": "c_proj"}[name.split(".")[-2]] + ".weight"
    name = name.removeprefix("vision_model.")
    if name.startswith("model.layers."):
        _, _, layer, *rest = name.split(".")
        part = ".".join(rest[:-1])
        parts = {f"self_attn.{x}_proj": f"attn.w{x}" for x in "qkvo"}
        parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
        parts |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
        return f"{encoder}transformer.resblocks.{layer}.{parts[part]}.{rest[-1]}"
    for theirs, metas in (("layernorm_pre", "ln_pre"), ("layernorm_post", "ln_post")):
        name = name.replace(theirs, metas)
    return encoder + name.replace("patch_embedding.linear", "conv1._linear")
