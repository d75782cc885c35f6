"""Metrics of the configuration."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from localmoe.core.events import ConfigReloaded


class ConfigMetrics:
    """Counts attempts to change the configuration while the server serves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._changes = Counter(
            "localmoe_config_changes",
            "Reloads, changes and rollbacks of the configuration: applied, or failed, which leaves it as it was.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("applied", "failed"):
            self._changes.labels(outcome)
        self._version = Gauge(
            "localmoe_config_version", "Version of the configuration that was applied last.", registry=registry
        )

    def on_event(self, event: ConfigReloaded) -> None:
        """Count one."""
        self._changes.labels("applied" if event.is_applied else "failed").inc()
        if event.version is not None:
            self._version.set(event.version)
