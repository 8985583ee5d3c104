"""The two references: Hugging Face's `transformers` and Meta's `llama-models`, a layer at a time, in float32 on a CPU.

Both run the classes of their packages; what is written here is what their `forward` does between the layers: masks,
rotary tables, and which layer gets which. torch is imported when this file is, and this file only when a reference is
asked for.

- `transformers` gets its tensors by Hugging Face's names, not by way of `weights.table`, which is thus checked too.
- Meta's tensors come through the table, which merges the files of its model-parallel ranks.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from jaxtyping import Float, Int

from llama4_jax.untrusted_json import read_json
from llama4_jax.weights.parity.sides import CHOSEN, Stages, Tensors, positions_at_once, watching
from llama4_jax.weights.source import Weights
from llama4_jax.weights.table import Row, rows, write_boxes

# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's transformers


class Transformers:
    """Llama4ForCausalLM of `transformers`, with eager attention. See `sides.Side`.

    Raises ImportError if transformers is not installed; ValueError for quantized weights.
    """

    def __init__(self, weights: Weights, length: int):
        import transformers
        from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask
        from transformers.models.llama4 import modeling_llama4

        # It warns that rope's high factor should exceed its low one, which Scout's does not.
        transformers.utils.logging.set_verbosity_error()
        self.code = modeling_llama4
        self.label = f"transformers {transformers.__version__} in float32: {weights.path}"
        self.config = weights.config
        whole = transformers.AutoConfig.from_pretrained(weights.path)
        if getattr(whole, "quantization_config", None) is not None:
            raise ValueError(
                f"{weights.path} is quantized, which the transformers reference does not read here. "
                f"Give --reference ours: it compares with our own code in float32, on the dequantized weights."
            )
        self.hf_config = whole.get_text_config()
        self.hf_config._attn_implementation = "eager"
        self.files = _HFFiles(Path(weights.path))
        self.rows = {row.ours: row for row in rows(weights.config)}

        # As Llama4TextModel.forward makes them. Only shape and dtype of the embeddings are looked at.
        embeds = torch.zeros(1, length, 1)
        self.position_ids = torch.arange(length)[None]
        given = {
            "config": self.hf_config,
            "inputs_embeds": embeds,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": self.position_ids,
        }
        self.masks = {
            "full_attention": create_causal_mask(**given),
            "chunked_attention": create_chunked_causal_mask(**given),
        }
        rotary = modeling_llama4.Llama4TextRotaryEmbedding(self.hf_config)
        self.rotation = rotary(embeds, self.position_ids)

    def embed(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        return _numpy(self._embed(tokens)[1])

    def embed_gradients(self, tokens: Int[np.ndarray, "B T"], g: Float[np.ndarray, "B T D"]) -> Tensors:
        table, out = self._embed(tokens)
        out.backward(torch.from_numpy(g))
        return {"embed.embedding": _numpy(table.grad)}

    def _embed(self, tokens: Int[np.ndarray, "B T"]) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.files.read("model.embed_tokens.weight").requires_grad_()
        return table, torch.nn.functional.embedding(torch.from_numpy(tokens), table)

    def layer(self, i: int) -> "TransformersLayer":
        with torch.device("meta"):
            module = self.code.Llama4TextDecoderLayer(self.hf_config, i)
        prefix = f"model.layers.{i}."
        _load(module, {name: self.files.read(prefix + name) for name in module.state_dict()}, assign=True)
        return TransformersLayer(self, i, module)

    def head(self) -> "TorchHead":
        with torch.device("meta"):
            norm = self.code.Llama4TextRMSNorm(self.hf_config.hidden_size, self.hf_config.rms_norm_eps)
            output = torch.nn.Linear(self.hf_config.hidden_size, self.hf_config.vocab_size, bias=False)
        _load(norm, {"weight": self.files.read("model.norm.weight")}, assign=True)
        _load(output, {"weight": self.files.read("lm_head.weight")}, assign=True)
        return TorchHead(norm, output)


class TransformersLayer:
    """See `sides.Layer`."""

    def __init__(self, side: Transformers, i: int, module: torch.nn.Module):
        self.side, self.i, self.module = side, i, module.eval()

    def run(self, x: Float[np.ndarray, "B T D"]) -> Stages:
        layer, code, stages = self.module, self.side.code, _Stages()
        attention, feed_forward = layer.self_attn, layer.feed_forward
        watched = {
            layer.input_layernorm: "attention norm",
            attention.q_proj: "q projection",
            attention.k_proj: "k projection",
            attention.v_proj: "v projection",
            attention: "attention output",
            layer.post_attention_layernorm: "feed-forward norm",
            feed_forward: "feed-forward output",
        }

        def chose(_, __, result):
            scores, logits = result
            stages["router logits"] = logits
            stages.choose(scores.topk(self.side.hf_config.num_experts_per_tok, dim=-1).indices)

        with contextlib.ExitStack() as stack, torch.no_grad():
            for module, name in watched.items():
                stages.watch(stack, module, name)
            if layer.is_moe_layer:
                stack.enter_context(_hooked(feed_forward.router, chose))
            stack.enter_context(watching(code, "apply_rotary_emb", stages.rotated))
            stack.enter_context(watching(code, "eager_attention_forward", lambda args, _: stages.attended(*args[1:3])))
            stages["layer output"] = self._forward(torch.from_numpy(x))
        return stages.numpy(x.shape)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.side
        return self.module(
            x,
            attention_mask=side.masks[side.hf_config.layer_types[self.i]],
            position_ids=side.position_ids,
            position_embeddings=side.rotation,
        )

    def tensors(self) -> Tensors:
        return self._ours({name: _numpy(tensor) for name, tensor in self.module.state_dict().items()})

    def gradients(
        self, x: Float[np.ndarray, "B T D"], g: Float[np.ndarray, "B T D"]
    ) -> tuple[Float[np.ndarray, "B T D"], Tensors]:
        self.module.zero_grad(set_to_none=True)
        given = torch.from_numpy(x).requires_grad_()
        self._forward(given).backward(torch.from_numpy(g))
        return _numpy(given.grad), self._ours({name: _numpy(p.grad) for name, p in self.module.named_parameters()})

    def _ours(self, theirs: Mapping[str, np.ndarray]) -> Tensors:
        """Arrays of the layer's parameters under our names and in our layouts."""
        of_layer = [row for name, row in self.side.rows.items() if name.startswith(f"layers.{self.i}.")]
        prefix = f"model.layers.{self.i}."
        return {
            row.ours: row.to_ours(row.hf[0], [theirs[name.removeprefix(prefix)] for name in row.hf[0].names])
            for row in of_layer
        }


class _HFFiles:
    """The tensors of a Hugging Face directory by the names of Llama4ForCausalLM."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.path, self.of_name = path, {}
        for file in sorted(path.glob("*.safetensors")):
            opened = safe_open(file, "pt")
            self.of_name |= {name.removeprefix("language_model."): (opened, name) for name in opened.keys()}  # noqa: SIM118

    def read(self, name: str) -> torch.Tensor:
        """In float32. Raises ValueError if there is none."""
        if name not in self.of_name:
            raise ValueError(
                f"{self.path} has no tensor {name}, which transformers' Llama 4 wants. If its experts are stored one "
                f"by one, as quantizers write them, give --reference ours."
            )
        file, in_file = self.of_name[name]
        return file.get_tensor(in_file).float()


# ---------------------------------------------------------------------------------------------------------------------
# Meta's llama-models

_ORIGINAL_CONTEXT = 8192  # of the rope scaling: fixed in the source of `apply_scaling`


class Meta:
    """`Transformer` of Meta's `llama-models`. See `sides.Side`; it has no gradients, since its code takes none.

    Written for GPUs under model parallelism, it is given a process group of one, which `meta` takes down again, and
    while a layer is built a `Tensor.cuda` that stays on the CPU.

    Raises ImportError if llama-models or fairscale is not installed.
    """

    def __init__(self, weights: Weights, batch: int, length: int):
        import llama_models.llama4.model as code
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
        from llama_models.llama4.args import ModelArgs

        self.code, self.embedding, self.linear = code, VocabParallelEmbedding, ColumnParallelLinear
        self.label = f"llama-models in float32: {weights.path}"
        self.config, self.weights = weights.config, weights
        params = read_json(Path(weights.path) / "params.json", of=dict)
        params |= {"vocab_size": self.config.vocab_size, "max_batch_size": batch, "max_seq_len": length}
        self.args = ModelArgs(**{**params, "vision_args": None})
        self.rows = rows(self.config)

        # As Transformer.__init__ and its forward make them.
        self.freqs_cis = code.precompute_freqs_cis(
            self.args.dim // self.args.n_heads,
            length,
            self.args.rope_theta,
            self.args.use_scaled_rope,
            self.args.rope_scaling_factor,
            self.args.rope_high_freq_factor,
        )
        self.global_mask = torch.triu(torch.full((length, length), float("-inf")), diagonal=1)
        chunk = self.args.attention_chunk_size
        self.local_mask = code.create_chunked_attention_mask(length, chunk, torch.device("cpu")) if chunk else None

    def embed(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        embedding = self.embedding(self.args.vocab_size, self.args.dim, init_method=lambda x: x)
        _load(embedding, self._read("embed.", "tok_embeddings."))
        with torch.no_grad():
            return _numpy(embedding(torch.from_numpy(tokens)))

    def layer(self, i: int) -> "MetaLayer":
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            module = self.code.TransformerBlock(i, self.args)
        _load(module, self._read(f"layers.{i}.", f"layers.{i}."))
        return MetaLayer(self, i, module)

    def head(self) -> "TorchHead":
        norm = self.code.RMSNorm(self.args.dim, eps=self.args.norm_eps)
        output = self.linear(self.args.dim, self.args.vocab_size, bias=False, init_method=lambda x: x)
        _load(norm, self._read("final_norm.", "norm."))
        _load(output, self._read("lm_head.", "output."))
        return TorchHead(norm, output)

    def _read(self, ours: str, theirs: str) -> dict[str, torch.Tensor]:
        """The tensors whose names here begin with `ours`, under the names of Meta's modules, less their beginning."""
        return {
            name.removeprefix(theirs): tensor
            for row in self.rows
            if row.ours.startswith(ours)
            for name, tensor in _to_meta(row, self.weights.read(row.ours).astype(np.float32))
        }


def _to_meta(row: Row, array: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    layout = row.meta[-1]  # named as the modules name their parameters, none sharing a tensor
    tensors = [np.empty(row.file_shape(layout), array.dtype) for _ in layout.names]
    write_boxes(row.boxes(layout, [tensors]), row.whole, array)
    yield from zip(layout.names, map(torch.from_numpy, tensors), strict=True)


class MetaLayer:
    """See `sides.Layer`."""

    def __init__(self, side: Meta, i: int, module: torch.nn.Module):
        self.side, self.i, self.module = side, i, module.eval()

    def run(self, x: Float[np.ndarray, "B T D"]) -> Stages:
        layer, side, stages = self.module, self.side, _Stages()
        attention, feed_forward = layer.attention, layer.feed_forward
        watched = {
            layer.attention_norm: "attention norm",
            attention.wq: "q projection",
            attention.wk: "k projection",
            attention.wv: "v projection",
            attention: "attention output",
            layer.ffn_norm: "feed-forward norm",
            feed_forward: "feed-forward output",
        }

        def attended(args, _):
            stages.attended(args[0], args[1][:, :: attention.n_rep])  # each key head is repeated for its queries

        def chose(args, result):
            stages["router logits"] = args[0]
            stages.choose(result[1])

        with contextlib.ExitStack() as stack, torch.inference_mode():
            for module, name in watched.items():
                stages.watch(stack, module, name)
            stack.enter_context(watching(side.code, "apply_rotary_emb", stages.rotated))
            stack.enter_context(watching(torch.nn.functional, "scaled_dot_product_attention", attended))
            if hasattr(feed_forward, "router_DE"):
                stack.enter_context(watching(torch, "topk", chose))
            given = torch.from_numpy(x)
            stages["layer output"] = layer(given, 0, side.freqs_cis, side.global_mask, side.local_mask)
        return stages.numpy(x.shape)

    def tensors(self) -> Tensors:
        prefix = f"layers.{self.i}."
        names = [row.ours for row in self.side.rows if row.ours.startswith(prefix)]
        return {name: self.side.weights.read(name).astype(np.float32) for name in names}


@contextlib.contextmanager
def meta(weights: Weights, batch: int, length: int) -> Iterator[Meta]:
    """Meta's side, in a process group of one that is taken down at the end if it was set up here."""
    from fairscale.nn.model_parallel import initialize as model_parallel

    own = not torch.distributed.is_initialized()
    if own:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its group sizes
            model_parallel.initialize_model_parallel(1)
    try:
        yield Meta(weights, batch, length)
    finally:
        if own:
            model_parallel.destroy_model_parallel()
            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Both


class TorchHead:
    """See `sides.Head`. Works through a few positions at a time: all logits together may not fit."""

    def __init__(self, norm: torch.nn.Module, output: torch.nn.Module):
        self.norm, self.output = norm, output

    def logits(self, x: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B T V"]:
        with torch.no_grad():
            return _numpy(self.output(self.norm(torch.from_numpy(x))))

    def gradients(
        self, x: Float[np.ndarray, "B T D"], targets: Int[np.ndarray, "B T"]
    ) -> tuple[float, Float[np.ndarray, "B T D"], Tensors]:
        given, loss = torch.from_numpy(x).requires_grad_(), 0.0
        block = positions_at_once(len(x), self.output.weight.shape[0])
        for some, right in zip(given.split(block, dim=1), torch.from_numpy(targets).split(block, dim=1), strict=True):
            nats = torch.nn.functional.cross_entropy(
                self.output(self.norm(some)).flatten(0, 1), right.flatten(), reduction="sum"
            )
            (nats / targets.size).backward()
            loss += nats.item() / targets.size
        return loss, _numpy(given.grad), self._ours(self.norm.weight.grad, self.output.weight.grad)

    def tensors(self) -> Tensors:
        return self._ours(self.norm.weight, self.output.weight)

    def _ours(self, norm: torch.Tensor, output: torch.Tensor) -> Tensors:
        return {"final_norm.scale": _numpy(norm), "lm_head.kernel": _numpy(output.T)}


class _Stages(dict):
    """Stages while they are seen, as copies: later code may write into what it was given."""

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        super().__setitem__(name, value.detach().clone())

    def watch(self, stack: contextlib.ExitStack, module: torch.nn.Module, name: str) -> None:
        def see(_, __, result):
            self[name] = result[0] if isinstance(result, tuple) else result

        stack.enter_context(_hooked(module, see))

    def rotated(self, _, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        self["q after RoPE"], self["k after RoPE"] = result

    def attended(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Both head-major."""
        self["q after qk-norm and temperature"], self["k after qk-norm"] = q.transpose(1, 2), k.transpose(1, 2)

    def choose(self, experts: torch.Tensor) -> None:
        self[CHOSEN] = experts.sort(dim=-1).values

    def numpy(self, shape: tuple[int, ...]) -> Stages:
        batch, length, _ = shape
        return {name: value.reshape(batch, length, -1).numpy() for name, value in self.items()}


@contextlib.contextmanager
def _hooked(module: torch.nn.Module, see: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _load(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, assign: bool = False) -> None:
    """Raises ValueError for tensors that do not fit the module."""
    try:
        module.load_state_dict(dict(tensors), strict=True, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"the reference cannot take these weights: {error}") from error


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()
