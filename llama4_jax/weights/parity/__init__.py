"""Is it the same model? Ours beside a reference, on the same tokens, layer by layer.

    report = run(ParityOptions(path=Path("path/to/hf_dir")))
    print(report.text())

The reference is the directory as `transformers` runs it (or Meta's own code, for a Meta directory); the candidate is
ours, from the same directory or from another. One layer of each side is in memory at a time, so models can be checked
that do not fit twice, or once.

Each layer of ours is run on the *reference's* input to it: a layer that differs is wrong, and not merely fed by one
that was. For the first such layer the report says where inside it the difference begins, and what would take it away.

- compare.py: the walk through the model; gradients.py: the way back
- sides.py: what both sides have in common; ours.py: our layers; torch_sides.py: the references'
- causes.py: why a layer differs; tensors.py: how two tensors do; diff.py: those of two directories (`llama4 diff`)
- options.py: what is asked for; report.py, plot.py: what is said
"""

from llama4_jax.weights.parity.compare import run
from llama4_jax.weights.parity.diff import diff
from llama4_jax.weights.parity.options import ParityOptions
from llama4_jax.weights.parity.report import Report

__all__ = ["ParityOptions", "Report", "diff", "run"]
