"""The experiment's configuration: schema, loading, overrides and error messages.

It is made of the settings of the components and imports nothing of theirs that is slower than torch, so an invalid
configuration is refused before torchvision, DeepSpeed and the data set are loaded.
"""

from unikd_fast.config.load import config_hash, load_config, parse_config, run_configs
from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError

__all__ = ["Config", "ConfigError", "config_hash", "load_config", "parse_config", "run_configs"]
