"""Environments of real engines, installed where they are missing."""

import time

from localmoe.backends.environments import EngineEnvironments
from localmoe.config.settings import load_settings
from localmoe.core.errors import EngineInstallError


def with_engines(*engines: str) -> EngineEnvironments:
    """The user's own environments, with these engines in them. Waits for whoever installs one of them already."""
    environments = EngineEnvironments(load_settings().home)
    for engine in engines:
        while True:
            try:
                environments.install(engine, "cpu", lambda stage, done, total: None)
                break
            except EngineInstallError as error:
                if "by somebody else" not in str(error):
                    raise
            time.sleep(1.0)
    return environments
