"""transformers' Llama 4 on the same weights and the same card: reading, decoding, a training step.

One layer of Scout with all 16 experts and a vocabulary of 16 384, 2.4 billion parameters, in bfloat16 (reading and
decoding) and with AdamW on bfloat16 parameters (a step; our moments are float32, torch's take the parameters' dtype).
transformers writes the weights into a temporary directory, 4.7 GB, and both read them there. Its Llama 4 multiplies
every token by every expert: it has no grouped experts in 5.17 nor in 5.23.

One contender after another has the card's memory: each is a process of its own, which ends before the next begins.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time

from gpu_parts.report import Figures, Out

LENGTH, PROMPT, NEW = 2048, 2048, 33
SETTINGS = {
    "vocab_size": 16_384, "hidden_size": 5120, "num_hidden_layers": 1, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
    "num_experts_per_tok": 1, "num_local_experts": 16, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192,
    "max_position_embeddings": 16_384, "use_qk_norm": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 4}  # fmt: skip


def run(out: Out, tiny: bool) -> None:
    """This process holds no memory of the card: it writes no weights and times nothing itself."""
    with tempfile.TemporaryDirectory() as folder:

        def save() -> Figures:
            start = time.perf_counter()
            ask(out, "save", "-", folder, tiny)
            return {"s": time.perf_counter() - start}

        if not out.case("weights", save):
            return
        # A process a task: a trained model's state has no room beside a served one's.
        for names in (("ours", "transformers sdpa"), ("transformers eager",)):
            for task in ("serve", "train"):
                for name in names:
                    out.case(f"{name}, {task}", functools.partial(ask, out, name, task, folder, tiny))


def ask(out: Out, name: str, task: str, folder: str, tiny: bool) -> Figures:
    """Figures from a contender's process, which has no longer than is left of the part."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.dirname(here), here, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "gpu_parts.peers", name, task, folder, "tiny" if tiny else "whole"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    limit = max(out.left, 1)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-350:])
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# A contender's process. `clock(run)` gives the median of some runs' seconds, each waited for.


def clock(run, runs: int = 3) -> float:
    run()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return sorted(found)[runs // 2]


def drawn(rows: int, length: int, words: int):
    import numpy as np

    return np.random.default_rng(0).integers(2, words, (rows, length)).astype(np.int32)


def sizes(tiny: bool) -> tuple[int, int, int]:
    return (64, 48, 5) if tiny else (LENGTH, PROMPT, NEW)


class Ours:
    def __init__(self, folder: str, tiny: bool):
        import llama4_jax

        self.model = llama4_jax.from_pretrained(folder, dtype="bfloat16")

    def generate(self, prompts, new: int):
        import llama4_jax

        return llama4_jax.generate(self.model, prompts.tolist(), max_new_tokens=new)

    def training(self, tokens):
        """`make_trainer`'s step."""
        import jax
        import numpy as np

        from llama4_jax.config import RunConfig
        from llama4_jax.data.batch import Batch
        from llama4_jax.data.config import DataConfig
        from llama4_jax.sharding import MeshConfig, make_mesh
        from llama4_jax.train.next_token import next_token
        from llama4_jax.train.optimizer import OptimizerConfig, make_optimizer
        from llama4_jax.train.step import first_state, make_trainer

        rows, length = tokens.shape
        config = RunConfig(name="peers", model=self.model.config, data=DataConfig(seq_len=length, batch_size=rows),
                           precision=self.model.precision, optimizer=OptimizerConfig(peak_lr=1e-5, warmup_steps=0),
                           steps=1000, scan_layers=False)  # fmt: skip
        trainer = make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token)
        state = first_state(self.__dict__.pop("model"), make_optimizer(config.optimizer, config.steps))
        held = [jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.abstract))]
        del state
        ones = np.ones_like(tokens)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
        batch = Batch(tokens=tokens, targets=np.roll(tokens, -1, axis=1), positions=positions, segment_ids=ones,
                      weights=ones.astype(np.float32), target_bytes=ones)  # fmt: skip

        def step() -> float:
            held[0], metrics = trainer.step(held[0], batch, None)
            return float(metrics.loss)

        return step


class Transformers:
    def __init__(self, folder: str, tiny: bool, attention: str):
        import torch
        from transformers import Llama4ForCausalLM

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        made = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
        self.model = made.to(self.device).eval()

    def generate(self, prompts, new: int):
        torch = self.torch
        tokens = torch.from_numpy(prompts).long().to(self.device)
        with torch.inference_mode():
            how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        return out[:, prompts.shape[1] :].tolist()  # which waits for the device

    def training(self, tokens):
        torch = self.torch
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.1)
        tokens = torch.from_numpy(tokens).long().to(self.device)

        def step() -> float:
            loss = self.model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step


def save(folder: str, tiny: bool) -> Figures:
    import torch
    import transformers

    torch.manual_seed(0)
    settings = SETTINGS | (TINY if tiny else {})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves the experts empty, or zero
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def serve(contender, tiny: bool) -> Figures:
    _, prompt, new = sizes(tiny)
    words = (SETTINGS | (TINY if tiny else {}))["vocab_size"]
    one, eight = drawn(1, prompt, words), drawn(8, prompt // 8, words)
    read, read_eight = (clock(lambda p=p: contender.generate(p, 1)) for p in (one, eight))
    figures: Figures = {"read tokens/s": prompt / read}
    for rows, prompts, first in ((1, one, read), (8, eight, read_eight)):
        seconds = clock(lambda p=prompts: contender.generate(p, new)) - first
        # At tiny sizes noise can make the whole shorter than its beginning.
        figures[f"decode tokens/s, {rows} rows"] = rows * (new - 1) / seconds if seconds > 0 else float("nan")
    return figures | {"first tokens": contender.generate(one, 4)[0]}


def train(contender, tiny: bool) -> Figures:
    length, *_ = sizes(tiny)
    step = contender.training(drawn(1, length, (SETTINGS | (TINY if tiny else {}))["vocab_size"]))
    first = step()
    seconds = clock(step)
    return {"train tokens/s": length / seconds, "ms": seconds * 1e3, "loss": first}


def main(name: str, task: str, folder: str, size: str) -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    tiny = size == "tiny"
    if name == "save":
        found = save(folder, tiny)
    else:
        contender = Ours(folder, tiny) if name == "ours" else Transformers(folder, tiny, name.split()[1])
        found = {"serve": serve, "train": train}[task](contender, tiny)
    os.write(answers, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
