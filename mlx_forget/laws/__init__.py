"""Scaling laws of forgetting and finetuning: forms, fits, uncertainty, decisions."""

from mlx_forget.laws import published as published
from mlx_forget.laws import update_steps as update_steps
