"""How far our numbers are from both references, as a table: what tests/model/test_parity_*.py hold, measured.

    python benchmarks/parity.py            # about three minutes; needs the test dependencies

Tiny random models in float32 (weights of standard deviation 0.08), sequences past two attention chunks and several
temperature buckets. Errors are the largest difference as a fraction of the largest magnitude: of the logits, of each
tensor's gradient (the worst tensor), of the loss.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "model")]

import numpy as np
from oracles import hf, meta, numpy_llama4, ours
from oracles.cases import CASES, MAVERICK, SCOUT, Case, tokens
from test_parity_decode import decode
from test_parity_gradients import loss_and_gradients, twenty_steps
from test_parity_logits import difference


def row(case: Case) -> list[str]:
    logits = ours.logits(case)
    loss, gradients = loss_and_gradients(case, False)
    expected = hf.step(case)
    worst = max(difference(gradients[name], gradient) for name, gradient in expected.grads.items())
    curve = "–"
    if case in (SCOUT, MAVERICK):
        mine, theirs = map(np.array, twenty_steps(case))
        curve = number(np.abs(mine / theirs - 1).max())
    return [
        case.name,
        number(difference(logits, hf.logits(case))),
        number(difference(logits, meta.logits(case))) if case.meta else "–",
        number(difference(logits, numpy_llama4.logits(case, hf.reference(case).state_dict, tokens(case)))),
        number(difference(decode(case, tokens(case), 0), hf.reference(case).decode_logits(tokens(case)))),
        number(abs(loss / expected.loss - 1)),
        number(worst),
        curve,
    ]


def number(x: float) -> str:
    return f"{x:.0e}"


def main() -> None:
    columns = ["model", "logits: transformers", "logits: llama-models", "logits: float64 numpy",
               "decoding: transformers", "loss: torch", "worst gradient: torch", "20 AdamW steps: torch"]  # fmt: skip
    for cells in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(cells)} |")
    for case in CASES:
        print(f"| {' | '.join(row(case))} |", flush=True)


if __name__ == "__main__":
    main()
