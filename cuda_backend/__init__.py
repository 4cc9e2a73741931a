"""The PyTorch backend: NVIDIA GPUs, and any CPU as the announced fallback."""

import os

# OpenMP threads that wait by spinning starve each other as soon as another process wants a core: with two threads on two busy cores,
# steps took ten times as long. Read when libgomp loads, so it is set before torch is imported; a user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
