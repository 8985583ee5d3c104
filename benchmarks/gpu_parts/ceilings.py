"""What the card can do at best, as measured: against this all else is held."""

import jax
import jax.numpy as jnp
from jax import lax

from gpu_parts.fill import filled
from gpu_parts.report import Case, Out, timed


def run(out: Out, tiny: bool) -> None:
    numbers, side = (2**18, 256) if tiny else (2**31, 8192)
    shapes = {name: jax.ShapeDtypeStruct((side, side), name) for name in ("bfloat16", "float8_e4m3fn", "float32")}

    def bandwidth(program, passes: int):
        x = filled((numbers,), jnp.bfloat16, 1.0, 1)
        timing = timed(lambda: program(x))
        return {"GB/s": passes * 2 * numbers / timing.median / 1e9, **timing.figures()}

    def product(dtype: str, precision=None):
        def multiply(a, b):
            y = lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision, jnp.float32)
            return (y * 0.5).astype(jnp.float32 if dtype == "float32" else jnp.bfloat16)

        def measure(program):
            a, b = (filled((side, side), dtype, 1.0, seed) for seed in (2, 3))
            timing = timed(lambda: program(a, b))
            return {"TFLOP/s": 2 * side**3 / timing.median / 1e12, **timing.figures()}

        return lambda: jax.jit(multiply).trace(shapes[dtype], shapes[dtype]), measure

    array = jax.ShapeDtypeStruct((numbers,), jnp.bfloat16)
    out.cases(
        [
            Case("copy", lambda: jax.jit(lambda x: -x).trace(array), lambda program: bandwidth(program, 2)),
            Case("read", lambda: jax.jit(jnp.max).trace(array), lambda program: bandwidth(program, 1)),
            Case(f"product bfloat16 {side}³", *product("bfloat16")),
            Case(f"product fp8 {side}³", *product("float8_e4m3fn")),
            Case(f"product float32 as tf32 {side}³", *product("float32", lax.Precision.DEFAULT)),
            Case(f"product float32 {side}³", *product("float32", lax.Precision.HIGHEST)),
        ]
    )
