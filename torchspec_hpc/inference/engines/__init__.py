"""One file for each engine; :mod:`~torchspec_hpc.inference.engines.registry` picks one by name."""
