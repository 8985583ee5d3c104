"""What a run begins from: whose model and whose tokenizer, its config's or those of the directory `init_from`.

A config always has a model, so the rule is by what fits:

- a model with the same tensors as the directory's is kept as the config has it; a vision encoder and balance biases
  that the directory lacks begin anew
- any other model gives way to the directory's, and keeps a vision encoder and balance biases that the directory lacks
- a flag wins over both (--model.query-scale, --model.attention-chunk …); one that would give the tensors other shapes
  is an error
- the tokenizer is the directory's, if it holds one and no flag names another

What was taken is said, and the run's config.json holds the model that is trained.
"""

import dataclasses
from collections.abc import Iterable

from llama4_jax.config import RunConfig
from llama4_jax.hub import model_directory
from llama4_jax.inputs.tokenizer import holds_tokenizer
from llama4_jax.model.config import ModelConfig
from llama4_jax.weights.source import open_config

_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def begun_from(config: RunConfig, given: Iterable[str] = ()) -> tuple[RunConfig, list[str]]:
    """The config with the model and tokenizer of `config.init_from`, by the rule above; and what is to be said of it.

    - given: fields that flags set, such as "model.query_scale" and "data.tokenizer"

    Raises ValueError for flags that do not fit the directory, and what `open_config` raises.
    """
    if config.init_from is None:
        return config, []
    given, said = set(given), []
    path = model_directory(config.init_from)
    ours, theirs = config.model, open_config(path)
    misfits = other_tensors(ours, theirs)
    refused = [name for name in misfits if f"model.{name}" in given]
    if refused:
        raise ValueError(f"{_misfit(config.init_from, ours, theirs, refused)} Leave these flags out.")
    if misfits:
        keep = {"vision": theirs.vision or ours.vision, "router_bias": theirs.router_bias or ours.router_bias}
        keep |= {name: getattr(ours, name) for name in _names(ours) if f"model.{name}" in given}
        model = dataclasses.replace(theirs, **keep)
        config = dataclasses.replace(config, model=model)
        said.append(f"init_from: the model is that of {config.init_from}, in place of the config's, which has another "
                    f"{', '.join(misfits)}.")  # fmt: skip
        own = [f"{name}={value!r}" for name, value in keep.items() if value != getattr(theirs, name)]
        said += [f"init_from: but for {', '.join(own)}."] if own else []
    else:
        names = [name for name in _names(ours) if name not in ("vision", "router_bias")]
        pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
        differing = [f"{name} ({a!r}; there {b!r})" for name, a, b in pairs if a != b]
        if differing:
            said.append(f"init_from: the model fits {config.init_from} and stays the config's, which differs in "
                        f"{', '.join(differing)}.")  # fmt: skip
    if "data.tokenizer" not in given and config.data.tokenizer != str(path):
        if holds_tokenizer(path):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(path)))
            said.append(f"init_from: the tokenizer is that of {config.init_from}.")
        else:
            said.append(
                f"init_from: {config.init_from} holds no tokenizer, so data.tokenizer={config.data.tokenizer!r} it is."
            )
    return config, said


def check_fits(config: RunConfig) -> None:
    """Raises ValueError if the directory `init_from` holds tensors of other shapes than the model's."""
    theirs = open_config(config.init_from)
    misfits = other_tensors(config.model, theirs)
    if misfits:
        raise ValueError(
            f"{_misfit(config.init_from, config.model, theirs, misfits)} Train its model: "
            f"llama4_jax.train.begin.begun_from(config) gives the config for it, as --init-from does."
        )


def other_tensors(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """The fields of two models by which one has other tensors than the other. A vision encoder or balance biases that
    only `ours` has are none: they begin anew."""

    def differ(name: str) -> bool:
        return getattr(ours, name) != getattr(theirs, name)

    found = [name for name in _SIZES if differ(name)]
    moe, their_moe = ([spec.moe for spec in config.layers] for config in (ours, theirs))
    if moe != their_moe and "num_layers" not in found:
        found += [name for name in ("moe_interval", "moe_layers") if differ(name)] or ["moe_interval"]
    if not (all(moe) and all(their_moe)) and differ("mlp_dim"):
        found.append("mlp_dim")
    if any(moe) or any(their_moe):
        found += [name for name in ("expert_mlp_dim", "num_experts") if differ(name)]
    scales, their_scales = (
        [spec.query_scale if spec.query_scale.startswith("ssmax") else "" for spec in config.layers]
        for config in (ours, theirs)
    )
    if scales != their_scales and len(scales) == len(their_scales):
        found += [name for name in ("query_scale", "query_scale_layers") if differ(name)] or ["rope_layers"]
    if theirs.router_bias and not ours.router_bias:
        found.append("router_bias")
    if theirs.vision is not None and differ("vision"):
        found.append("vision")
    return found


def _names(model: ModelConfig) -> list[str]:
    return [field.name for field in dataclasses.fields(model)]


def _misfit(init_from: str, ours: ModelConfig, theirs: ModelConfig, names: list[str]) -> str:
    shown = [f"model.{name} is {_short(getattr(theirs, name))} there and {_short(getattr(ours, name))} here"
             for name in names[:6]]  # fmt: skip
    more = f", and {len(names) - 6} more fields" if len(names) > 6 else ""
    return f"init_from: the weights of {init_from} are of another model: {'; '.join(shown)}{more}."


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else "another"


def given_fields(arguments: Iterable[str]) -> set[str]:
    """The fields that flags set: --model.no-router-bias gives model.router_bias, --model.vision.num-layers
    model.vision."""
    fields = set()
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        *parts, last = argument[2:].partition("=")[0].replace("-", "_").split(".")
        fields.add(".".join([*parts, last.removeprefix("no_")][:2]))
    return fields
