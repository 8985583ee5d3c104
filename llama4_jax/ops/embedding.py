"""Rows of an embedding table by token id, on one device or with the table split over a mesh.

A table is too large to gather: 2 GB for 202 048 words of Scout. Its columns stay where they are (fsdp): the ids of the
devices that share them, which are small, are gathered, each device looks up its columns of all their tokens, and they
are exchanged for all columns of its own tokens. Of a table that is split by rows (tensor), devices look up what they
have and add it up. The gradient goes the same way back.
"""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.sharding import activation_spec, all_parts, axes_of, parameter_spec

AXES = ("vocab", "embed")


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """The row of each token, in `dtype`. Its gradient in the table is summed in the table's dtype."""
    home = parameter_spec(table.shape, *AXES)
    here = activation_spec(tokens.shape, "batch", "seq")
    row_axes, column_axes = axes_of(home[0]), axes_of(home[1])
    token_axes = (*axes_of(here[0]), *axes_of(here[1]))
    # Devices that hold other parts of the table and have other tokens; those with the same need not hear of them.
    shared = tuple(axis for axis in (*column_axes, *row_axes) if axis in token_axes)

    def on_device(table, tokens):
        ids = tokens.reshape(-1)
        ids = all_parts(ids, shared, 0)
        if row_axes:
            ids -= lax.axis_index(row_axes) * table.shape[0]
            x = table.at[jnp.where(ids < 0, table.shape[0], ids)].get(mode="fill", fill_value=0)
            x = lax.psum(x.astype(dtype), row_axes)
        else:
            x = table[ids].astype(dtype)
        if shared and shared == column_axes:
            x = lax.all_to_all(x, shared, split_axis=0, concat_axis=1, tiled=True)
        else:
            x = all_parts(x, column_axes, 1)
            if shared:
                x = lax.dynamic_slice_in_dim(x, lax.axis_index(shared) * tokens.size, tokens.size)
        return x.reshape(*tokens.shape, -1)

    return on_mesh(on_device, (home, here), PartitionSpec(*here, None))(table, tokens)
