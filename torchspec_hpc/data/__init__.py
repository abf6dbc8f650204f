"""Conversations in, token ids and loss masks out, in a reproducible order."""
