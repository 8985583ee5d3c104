"""Numerics: arrays in, arrays out."""

from llama4_jax.ops.fp8 import fp8_dot_general as fp8_dot_general
from llama4_jax.ops.plain import plain as plain
