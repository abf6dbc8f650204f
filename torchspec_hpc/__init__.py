"""Slurm-native training of speculative-decoding draft models."""

__version__ = "0.1.0"
