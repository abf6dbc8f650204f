"""Conversations in, token ids and loss masks out, in a reproducible order.

A row goes through rows, conversations, chat and masks into dataset; ``sampler`` says in which
order samples are trained on, ``vocab`` which tokens a pruned draft head keeps.
"""
