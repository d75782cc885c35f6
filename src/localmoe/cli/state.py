"""What a server keeps, wired together: keys, responses, files, jobs."""

from pathlib import Path

from starlette.types import ASGIApp

from localmoe.core.current import Current
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.jobs.batches import BatchFiles
from localmoe.gateway.jobs.folder import FileFolder
from localmoe.gateway.jobs.runner import JobRunner
from localmoe.gateway.jobs.runner_name import RunnerName
from localmoe.gateway.jobs.services import JobServices
from localmoe.state.config import STATE_FILE, StateConfig
from localmoe.state.database import Database
from localmoe.state.files import SqlFileStore
from localmoe.state.job_work import SqlJobWork
from localmoe.state.jobs import SqlJobStore
from localmoe.state.keys import SqlKeyStore
from localmoe.state.responses import SqlResponseStore


class ServerState:
    """Everything that outlives a request. Jobs run between `start` and `stop`; the rest is there until `close`.

    Args:
        home: directory of what is on disk.
    """

    def __init__(self, config: StateConfig, gateway: Current[GatewayConfig], *, home: Path) -> None:
        jobs = gateway.now.jobs
        self._database = Database(config, default_path=home / STATE_FILE)
        self._runner_name = RunnerName(home / "runner")
        self.keys = SqlKeyStore(self._database)
        self.responses = SqlResponseStore(
            self._database, max_owner_bytes=config.max_owner_response_bytes, keep_s=config.keep_responses_s
        )
        directory = home / "files" if config.files_directory is None else Path(config.files_directory).expanduser()
        folder = FileFolder(SqlFileStore(self._database), directory, max_owner_bytes=jobs.max_owner_file_bytes)
        work = SqlJobWork(self._database)
        batch_files = BatchFiles(work, folder, config=jobs, max_line_bytes=lambda: gateway.now.max_body_bytes)
        runner = JobRunner(work, batch_files, config=jobs, name=self._runner_name.name)
        self.jobs = JobServices(store=SqlJobStore(self._database), folder=folder, runner=runner)

    def start(self, app: ASGIApp) -> None:
        """Run jobs, whose requests are put to this application."""
        self.jobs.runner.start(app)

    async def stop(self) -> None:
        """Run no more jobs; those under way are taken up again by whoever comes next."""
        await self.jobs.runner.stop()

    async def close(self) -> None:
        """Close the database."""
        await self._database.close()
        self._runner_name.release()
