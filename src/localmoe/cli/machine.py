"""What `config.checks` holds settings against: this machine, its engines and its models."""

from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from localmoe.backends.environments import ENGINES, EngineEnvironments
from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.config.checks import EngineVersion, Finding, Machine, check
from localmoe.config.seed_keys import KNOWN_CONTEXT_TOKENS
from localmoe.config.settings import Settings
from localmoe.core.errors import ModelFileError, ModelNotFoundError
from localmoe.core.serving import ENGINE_KINDS, ENTRY_POINTS
from localmoe.hardware.gpus import find_gpus
from localmoe.hardware.memory import total_memory_bytes
from localmoe.hardware.processors import num_processors


def find_findings(settings: Settings) -> list[Finding]:
    """What somebody should know of these settings on this machine, errors first."""
    return check(settings, examine_machine(settings), KNOWN_CONTEXT_TOKENS)


def examine_machine(settings: Settings) -> Machine:
    """Looks; starts nothing."""
    environments, catalog = EngineEnvironments(settings.home), Catalog(settings.home)
    return Machine(
        gpu_bytes=[gpu.memory_bytes for gpu in find_gpus()],
        num_cores=num_processors(),
        ram_bytes=total_memory_bytes(),
        engine_kinds=[*ENGINE_KINDS, *sorted(entry_points(group=ENTRY_POINTS).names)],
        native_on_gpu=_computes_on_gpus(),
        engines={engine: _version(environments, engine) for engine in ENGINES},
        context_tokens={
            name: _context_tokens(catalog, name)
            for name in {model.model for model in settings.models}
            if name == DEMO_NAME or catalog.has(name)  # the demo model is made when it is served
        },
    )


def _computes_on_gpus() -> bool:
    """Whether torch is a build for CUDA, and Triton is there; asked of what is installed, since loading torch takes a
    second, and memory."""
    try:
        return not version("torch").endswith("+cpu") and find_spec("triton") is not None
    except PackageNotFoundError:
        return False


def _version(environments: EngineEnvironments, engine: str) -> EngineVersion:
    found = environments.installed(engine)
    build = "cpu" if found is None else found.build
    return EngineVersion(
        installed=None if found is None else found.version,
        pinned=environments.pinned_version(engine, build),
        is_current=found is not None and environments.is_current(found),
        build=None if found is None else found.build,
    )


def _context_tokens(catalog: Catalog, name: str) -> int | None:
    try:
        return catalog.context_tokens(name)
    except (ModelFileError, ModelNotFoundError):
        return None
