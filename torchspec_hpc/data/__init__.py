"""Conversations in, token ids and loss masks out, in a reproducible order.

``sources`` and ``rows`` read files; ``messages`` and ``conversations`` make one form of every row.
``template`` renders it, ``probe`` finds out what a template does, ``chat`` (with ``forms`` and
``parsers``) where in the text the answers are, ``masks`` which tokens those are. ``encode`` does
all that for a shard of rows, ``dataset`` for a whole data set, ``shards`` keeps the result.

``sampler`` and ``packing`` say in which order samples are trained on, ``vocab`` which tokens a
pruned draft head keeps, ``summary`` what an epoch costs. ``regenerate`` has the target answer anew:
``dialogs`` are its rows, ``answerers`` and ``server`` who answers.
"""
