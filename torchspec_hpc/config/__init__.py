"""Typed settings: one frozen schema, read from YAML and dotted overrides."""

from torchspec_hpc.config.load import load_config, parse_config, save_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config

__all__ = ["Config", "RunDir", "load_config", "parse_config", "save_config"]
