"""Scaling laws of forgetting and finetuning: forms, fits, uncertainty, decisions."""

from mlx_forget.laws import finetuning_steps as finetuning_steps
from mlx_forget.laws import published as published
