"""The experiment's configuration: schema, loading, overrides and error messages.

A leaf: it imports pydantic and nothing of torch, so a wrong configuration is refused before anything slow is loaded.
"""

from unikd_fast.config.load import config_hash, load_config, parse_config, run_configs
from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError

__all__ = ["Config", "ConfigError", "config_hash", "load_config", "parse_config", "run_configs"]
