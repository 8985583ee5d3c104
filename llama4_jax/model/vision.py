"""The vision encoder: tiles of a picture → features that take the places of its `<|patch|>` tokens.

A ViT over patches of 14 × 14 pixels, with learned positions and two-dimensional RoPE; then a pixel shuffle, which makes
a quarter as many vectors of four times the length, and a two-layer adapter. Differences from most ViTs, all as
published: the class token comes last and is dropped at the end; the adapter ends in its activation, too.

Reference: `Llama4VisionModel` of transformers 5.23, `llama4/vision/` of llama-models 0.3.0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, UInt8

from llama4_jax.model.config import Precision, VisionConfig
from llama4_jax.model.layers import LayerNorm, Linear, normal_param
from llama4_jax.model.rope import Rotation, frequencies, rotate
from llama4_jax.model.stack import Stack
from llama4_jax.sharding import constrain


def normalized(tiles: UInt8[Array, "..."] | Float[Array, "..."]) -> Float[Array, "..."]:
    """Pixels from 0 to 255 as numbers from -1 to 1, float32; what is floating-point already is taken as it is."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    return (tiles.astype(jnp.float32) / 255 - 0.5) / 0.5


class VisionEncoder(Stack):
    """Tiles → features, `config.tokens_per_tile` a tile."""

    def __init__(
        self,
        config: VisionConfig,
        precision: Precision,
        *,
        init_std: float,
        scan_layers: bool,
        remat: str,
        key: Array,
    ):
        layers_key, ends_key = jax.random.split(key)
        make = {"std": init_std, "dtype": precision.params}

        def make_layer(_, layer_key: Array) -> VisionLayer:
            return VisionLayer(config, **make, rngs=nnx.Rngs(params=layer_key))

        super().__init__(
            make_layer,
            num_layers=config.num_layers,
            period=1,
            scan_layers=scan_layers,
            remat=remat,
            key=layers_key,
        )
        rngs = nnx.Rngs(params=ends_key)
        patch = config.num_channels * config.patch_size**2
        self.patch_embed = Linear({"patch": patch}, {"embed": config.embed_dim}, **make, rngs=rngs)
        own = {"std": config.embed_dim**-0.5, "dtype": precision.params}
        self.class_embedding = normal_param(rngs, (config.embed_dim,), ("norm",), **own)
        shape = (config.num_patches + 1, config.embed_dim)
        self.positional_embedding = normal_param(rngs, shape, ("patch", "norm"), **own)
        norm = {"eps": config.norm_eps, "dtype": precision.params}
        self.pre_norm = LayerNorm(config.embed_dim, **norm)
        self.post_norm = LayerNorm(config.embed_dim, **norm)
        self.adapter = Adapter(config, **make, rngs=rngs)
        self.config = config
        self.precision = precision

    def __call__(self, tiles: Float[Array, "n S S c"]) -> Float[Array, "n P O"]:
        """Features of each tile's patches, row by row. Tiles are square, their numbers from -1 to 1."""
        config = self.config
        patches = rearrange(
            tiles.astype(self.precision.compute),
            "n (h p) (w q) c -> n (h w) (c p q)",
            p=config.patch_size,
            q=config.patch_size,
        )
        x = self.patch_embed(patches)
        ending = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([x, ending], axis=1) + self.positional_embedding[...].astype(x.dtype)
        x = constrain(self.pre_norm(x), "batch", "patch", "embed")
        rotation = patch_rotation(config)
        x, _ = self.run(lambda layer, x: (layer(x, rotation), None), x)
        return self.adapter(pixel_shuffle(self.post_norm(x)[:, :-1], config))


class VisionLayer(nnx.Module):
    """h = x + attention(norm(x)); h + mlp(norm(h)). Every patch of a tile sees every other."""

    def __init__(self, config: VisionConfig, *, std: float, dtype, rngs: nnx.Rngs):
        make = {"std": std, "dtype": dtype, "rngs": rngs}
        norm = {"eps": config.norm_eps, "dtype": dtype}
        self.attention_norm = LayerNorm(config.embed_dim, **norm)
        self.attention = VisionAttention(config, **make)
        self.mlp_norm = LayerNorm(config.embed_dim, **norm)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, **make)

    def __call__(self, x: Float[Array, "n P D"], rotation: Rotation) -> Float[Array, "n P D"]:
        x = constrain(x + self.attention(self.attention_norm(x), rotation), "batch", "patch", "embed")
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "patch", "embed")


class VisionAttention(nnx.Module):
    """Bidirectional attention with biases, and RoPE over the columns and rows of the tile."""

    def __init__(self, config: VisionConfig, *, std: float, dtype, rngs: nnx.Rngs):
        embed = {"embed": config.embed_dim}
        heads = {"q_heads": config.num_heads, "head_dim": config.head_dim}
        make = {"std": std, "dtype": dtype, "rngs": rngs, "bias": True}
        self.q = Linear(embed, heads, **make)
        self.k = Linear(embed, heads, **make)
        self.v = Linear(embed, heads, **make)
        self.o = Linear(heads, embed, **make)

    def __call__(self, x: Float[Array, "n P D"], rotation: Rotation) -> Float[Array, "n P D"]:
        q, k, v = (constrain(linear(x), "batch", "patch", "q_heads", "head_dim") for linear in (self.q, self.k, self.v))
        q, k = (rotate(y.swapaxes(1, 2), rotation).swapaxes(1, 2) for y in (q, k))
        return self.o(jax.nn.dot_product_attention(q, k, v))


class MLP(nnx.Module):
    """fc2(gelu(fc1(x))), with biases."""

    def __init__(self, dim: int, width: int, *, std: float, dtype, rngs: nnx.Rngs):
        make = {"std": std, "dtype": dtype, "rngs": rngs, "bias": True}
        self.fc1 = Linear({"embed": dim}, {"mlp": width}, **make)
        self.fc2 = Linear({"mlp": width}, {"embed": dim}, **make)

    def __call__(self, x: Float[Array, "n P D"]) -> Float[Array, "n P D"]:
        return self.fc2(gelu(self.fc1(x)))


class Adapter(nnx.Module):
    """gelu(fc2(gelu(fc1(x)))), without biases."""

    def __init__(self, config: VisionConfig, *, std: float, dtype, rngs: nnx.Rngs):
        make = {"std": std, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear({"embed": config.shuffled_dim}, {"mlp": config.adapter_dim}, **make)
        self.fc2 = Linear({"mlp": config.adapter_dim}, {"embed": config.output_dim}, **make)

    def __call__(self, x: Float[Array, "n P D"]) -> Float[Array, "n P O"]:
        return gelu(self.fc2(gelu(self.fc1(x))))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact one, by the error function; float32 inside."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def pixel_shuffle(x: Float[Array, "n P D"], config: VisionConfig) -> Float[Array, "n p d"]:
    """Joins the vectors of each square of neighbouring patches: 24 × 24 of 1408 become 12 × 12 of 5632."""
    side = config.image_size // config.patch_size
    return rearrange(
        x, "n (Y a X b) D -> n (Y X) (a b D)", a=config.shuffle, b=config.shuffle, Y=side // config.shuffle
    )


def patch_rotation(config: VisionConfig) -> Rotation:
    """Of each patch, and of the class token, which is not rotated: the first half of a head's pairs by the patch's
    column, the second by its row, both counted from 1."""
    frequency = frequencies(config.head_dim // 2, config.rope_theta, None)
    side = config.image_size // config.patch_size
    row, column = np.divmod(np.arange(side * side), side)
    angle = np.concatenate([(place + 1).astype(np.float32)[:, None] * frequency for place in (column, row)], axis=1)
    angle = np.concatenate([angle, np.zeros((1, angle.shape[1]), np.float32)])
    return Rotation(jnp.cos(angle)[None], jnp.sin(angle)[None])
