"""Scaling laws of forgetting and finetuning: forms, fits, uncertainty, decisions. Importing it registers the published laws."""

from mlx_forget.laws import forgetting, mixtures, power_laws, update_steps

__all__ = ["forgetting", "mixtures", "power_laws", "update_steps"]
