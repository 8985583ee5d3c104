"""Which linear layer multiplies how: `precision.matmul` and its rules, applied to a model that is built.

This is the only place that knows. Layers have the name of a matmul, and hand it on to the product.
"""

from flax import nnx

from llama4_jax.model.config import Precision
from llama4_jax.model.names import kinds, linear_layers


def choose_matmuls(model: nnx.Module, precision: Precision) -> None:
    """Sets the matmul of every linear layer, and of every layer's routed experts, by its name: layers.3.attention.q,
    layers.3.mlp.gate_up, layers.3.moe.experts, vision.layers.0.mlp.fc1, projector …

    Raises ValueError for a rule that decides for no layer, and for rules that tell apart layers that are scanned
    together.
    """
    used, every = set(), []
    for module, names in linear_layers(model):
        chosen = {name: precision.matmul_of(name) for name in names}
        if len(set(chosen.values())) > 1:
            differing = ", ".join(f"{name}: {matmul}" for name, matmul in chosen.items())
            raise ValueError(
                f"precision.rules tell apart layers that are scanned together ({differing}): set scan_layers to False, "
                f"or write rules that treat them alike."
            )
        module.matmul = chosen[names[0]]
        used |= {precision.rule_for(name) for name in names}
        every += names
    for rule in precision.rules:
        if rule not in used:
            known = ", ".join(kinds(every))
            raise ValueError(f"precision.rules: {rule!r} decides for no layer. The layers are {known}.")
