"""Conversations in, token ids and loss masks out, in a reproducible order.

rows -> conversations -> masks -> dataset is the way of a row; ``sampler`` says in which order
samples are trained on, ``vocab`` which tokens a pruned draft head keeps.
"""
