"""Logs, metrics and TensorBoard."""
