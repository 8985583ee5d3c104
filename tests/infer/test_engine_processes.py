"""One engine over the devices of two processes: the first takes the requests, and both take the same turns.

Started as a script, this file is one of them.
"""

import json
import pathlib

import numpy as np

CONFIG = {
    "vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48,
    "expert_mlp_dim": 24, "num_experts": 4, "moe_interval": 2, "nope_interval": 2, "attention_chunk": 16,
    "temperature_floor": 4, "context_length": 128, "init_std": 0.3,
}  # fmt: skip
HOW = {"slots": 2, "context": 128, "piece": 8, "read_budget": 16}


def requests() -> list[dict]:
    draw = np.random.default_rng(0)
    system = draw.integers(0, 49, 30).tolist()
    return [{"prompt": [*system, *draw.integers(0, 49, 6).tolist()], "max_new_tokens": 9, "logit_bias": {3: 1.5},
             "frequency_penalty": 0.5} for _ in range(5)]  # fmt: skip


def answers(engine) -> dict:
    endless = engine.submit([1, 2, 3], max_new_tokens=100)
    handles = [engine.submit(**request) for request in requests()]
    next(endless.tokens())
    endless.cancel()
    said = [[token.id for token in handle.result()] for handle in handles]
    return {"said": said, "cancelled": endless.finish_reason, "found": engine.stats.cached_tokens > 0}


def test_two_processes_answer_as_one_does(tmp_path):
    from several_processes import run_all

    from llama4_jax.infer.engine import Engine
    from llama4_jax.model.config import ModelConfig
    from llama4_jax.model.llama4 import Llama4

    with Engine(Llama4(ModelConfig(**CONFIG), seed=1).unscanned(), **HOW) as engine:
        want = answers(engine)
    assert want["cancelled"] == "cancelled" and want["found"]
    first, second = run_all(tmp_path, [[], []], [str(pathlib.Path(__file__))])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout.splitlines()[-1]) == want  # after what Gloo says
    assert second.stdout.splitlines()[-1] == "the first process takes the requests for all: submit there."


def main() -> None:
    import jax

    from llama4_jax.train import hosts

    hosts.connect()
    jax.config.update("jax_num_cpu_devices", 4)
    from flax import nnx

    from llama4_jax.infer.engine import Engine
    from llama4_jax.model.config import ModelConfig
    from llama4_jax.model.llama4 import Llama4
    from llama4_jax.sharding import SERVING, MeshConfig, make_mesh, parameter_sharding

    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.default_device(jax.local_devices()[0]):
        model = Llama4(ModelConfig(**CONFIG), seed=1).unscanned()
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = np.asarray(variable[...])
        sharding = parameter_sharding(value.shape, variable.axes, mesh, rules=SERVING)
        variable.set_value(jax.make_array_from_callback(value.shape, sharding, value.__getitem__))
    with Engine(model, **HOW) as engine:
        if jax.process_index() == 0:
            print(json.dumps(answers(engine)))
        else:
            try:
                engine.submit([1], max_new_tokens=1)
            except ValueError as error:
                print(error)


if __name__ == "__main__":
    main()
