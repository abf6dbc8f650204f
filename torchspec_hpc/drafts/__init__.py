"""Draft models and their losses: pure torch, no input or output."""
