"""Parts of benchmarks/launch_scale.py."""
