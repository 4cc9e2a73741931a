"""Scaling laws of forgetting and finetuning: forms, fits, uncertainty, decisions."""
