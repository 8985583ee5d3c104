"""What `benchmarks/gpu.py` measures, one module a part. Each has `run(out, tiny)`."""
