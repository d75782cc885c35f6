"""What routes need to put work off."""

from dataclasses import dataclass

from localmoe.core.jobs import JobStore
from localmoe.gateway.jobs.folder import FileFolder
from localmoe.gateway.jobs.runner import JobRunner


@dataclass(frozen=True, kw_only=True)
class JobServices:
    """Where it is kept, and who does it."""

    store: JobStore
    folder: FileFolder
    runner: JobRunner
