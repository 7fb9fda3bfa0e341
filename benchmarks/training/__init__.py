"""Parts of benchmarks/trainer.py and benchmarks/gpu.py."""
