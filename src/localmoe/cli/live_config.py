"""Puts the configuration of a server that serves together: who is told when settings change."""

from collections.abc import Callable, Sequence

from localmoe.cli.config import history_of
from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.machine import find_findings
from localmoe.cli.model_changes import ModelChanges
from localmoe.config.checks import Finding
from localmoe.config.manager import ConfigManager
from localmoe.config.settings import LoadedSettings, Settings
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.fleet import Fleet
from localmoe.dispatch.policy import make_policy
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel
from localmoe.hardware.meter import HardwareMeter


def manage_config(
    loaded: LoadedSettings,
    *,
    fleet: Fleet[ServedModel],
    builder: DeploymentBuilder,
    specs_of: Callable[[Settings], Sequence[ModelSpec]],
    gateway: Current[GatewayConfig],
    meter: HardwareMeter,
    bus: EventBus,
) -> ConfigManager:
    """What changes the configuration of these parts. What else is to be told may subscribe to it.

    Args:
        specs_of: what settings say is to be served.
        meter: started when a policy first needs it.
    """

    def examine(settings: Settings) -> Sequence[Finding]:
        return find_findings(settings.model_copy(update={"models": tuple(specs_of(settings))}))

    manager = ConfigManager(
        loaded,
        history=history_of(loaded.settings),
        change_models=ModelChanges(fleet, builder, specs_of),
        examine=examine,
        bus=bus,
    )

    def dispatch(config: DispatchConfig) -> None:
        if config.policy == "resource_aware":
            meter.start()
        for dispatcher in fleet.dispatchers:
            dispatcher.reconfigure(config, make_policy(config, meter))

    manager.subscriptions.subscribe(lambda settings: settings.gateway, gateway.replace)
    manager.subscriptions.subscribe(lambda settings: settings.dispatch, dispatch)
    return manager
