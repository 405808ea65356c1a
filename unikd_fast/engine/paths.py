"""The paths of a configuration, checked before torch is loaded, so that a wrong one is refused within a second."""

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.roots import check_root, expand_weights


def check_paths(config: Config) -> None:
    """Check the root of the data set, and that the weights of the networks name no variable that is not set.

    Raises:
        ConfigError: what is missing, and the remedy.
    """
    try:
        check_root(config.data.name, config.data.root)
        for role, network in (("student", config.student), ("teacher", config.teacher)):
            if network is not None and network.weights is not None:
                expand_weights(role, network.weights)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
