"""The PyTorch backend: NVIDIA GPUs, and any CPU as the announced fallback."""
