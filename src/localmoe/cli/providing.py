"""Makes what native engines read of a model and is missing on disk, by commands in processes of their own: that needs
torch, which the gateway's process never loads."""

import subprocess
import sys
from collections.abc import Sequence

from localmoe.backends.process import GuardedProcess
from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.core.errors import ModelBuildError
from localmoe.core.serving import ModelSpec


def provide(catalog: Catalog, spec: ModelSpec) -> None:
    """Before a server listens: with the commands' own progress.

    Raises:
        ModelNotFoundError: it cannot be made.
        ModelBuildError: making it failed.
    """
    while arguments := _missing(catalog, spec):
        status = subprocess.run(_command(arguments), check=False).returncode
        if status != 0:
            raise ModelBuildError(f"`localmoe models {' '.join(arguments)}` failed with exit status {status}")


async def provide_while_serving(catalog: Catalog, spec: ModelSpec) -> None:
    """The same; the command ends with the server, or when nobody waits for it any more.

    Raises:
        ModelNotFoundError: it cannot be made.
        ModelBuildError: making it failed.
    """
    while arguments := _missing(catalog, spec):
        process = await GuardedProcess.start(_command(arguments), name="models")
        try:
            how = await process.wait()
            lines = await process.output.last_lines()
        finally:
            await process.stop()
        if _missing(catalog, spec) == arguments:
            raise ModelBuildError(f"`localmoe models {' '.join(arguments)}` ended with {how}:\n{lines}")


def _missing(catalog: Catalog, spec: ModelSpec) -> Sequence[str]:
    """Arguments of `localmoe models` that make the next thing that is missing; none if all is there."""
    kinds = {engine.engine for engine in spec.engines}
    if spec.model == DEMO_NAME and kinds != {"remote"} and not catalog.has(spec.model):
        return ["build-demo"]
    if "native" in kinds and not catalog.has_store(spec.model, spec.weights):
        return ["convert", spec.model, "--weights", spec.weights]
    return []


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "localmoe", "models", *arguments]
