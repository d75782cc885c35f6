"""vLLM: a server that we start and supervise, or one that runs already."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path

from localmoe.backends.process import GuardedProcess
from localmoe.backends.supervised import SupervisedBackend
from localmoe.backends.vllm_answers import MAX_LOGPROBS, WriteGrammar
from localmoe.backends.vllm_client import VllmClient
from localmoe.backends.vllm_config import LoraModule, VllmConfig, command, environment
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    LocalMoEError,
)
from localmoe.core.events import EngineState, EventBus
from localmoe.core.request import Request, SamplingParams, TokenChunk

logger = logging.getLogger(__name__)

_POLL_S = 0.5
"""Between two looks whether a server is up."""
_WATCH_S = 2.0
"""Between two looks at one that serves."""
_LOST_AFTER_S = 20.0
"""A server that nobody started here and that has not answered for so long is taken for gone."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server must be serving."""

    name: str
    vocab_size: int
    """Ids that its tokenizer and ours may use are below this."""
    probes: Sequence[tuple[str, list[int]]] = ()
    """Texts, and what our tokenizer makes of them without tokens around: a server must make the same."""
    adapters: Mapping[str, LoraModule | None] = field(default_factory=dict)
    """By name; None where only a server that runs already has it."""


class VllmConnection:
    """One time of being connected with a server that runs, however it was started.

    Args:
        client: its own; closed with it.
        model: what the server must be serving.
        name: the engine's, for metrics and logs.
        start_timeout_s: its first answer takes no longer.
        hang_timeout_s: a server that computes nothing for this long, although it was asked, hangs.
        lost_after_s: one that does not answer at all for this long is gone.
        on_state: told every few seconds how the server is; must be quick.
    """

    def __init__(
        self,
        *,
        client: VllmClient,
        model: ServedModel,
        name: str,
        start_timeout_s: float,
        hang_timeout_s: float,
        lost_after_s: float,
        on_state: Callable[[EngineState], None],
    ) -> None:
        self._client = client
        self._model = model
        self._name = name
        self._start_timeout_s = start_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._lost_after_s = lost_after_s
        self._on_state = on_state
        self._server_model = model.name
        self._died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None
        self.max_context_tokens: int | None = None
        """Of the server; None: it does not say."""

    @property
    def is_ready(self) -> bool:
        return self._watcher is not None and not self._died.done()

    async def start(self) -> None:
        """Check that the server serves this model, have it answer once, and watch it from then on.

        Raises:
            EngineStartError: it serves something else, or cannot answer.
            EngineDiedError: it does not answer now.
        """
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self._check_model()
                await self._answer_once()
        except TimeoutError as error:
            raise EngineDiedError(f"vLLM did not answer within {self._start_timeout_s:g} s") from error
        except BackendUnavailableError as error:
            raise EngineDiedError(str(error)) from error
        except (EngineFaultError, InvalidRequestError) as error:
            raise EngineStartError(str(error)) from error
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Leave the server; open requests fail, and it forgets them."""
        self.end("the engine was stopped")
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._client.close()

    async def wait_for_death(self) -> str:
        """Returns, when the server is gone or hangs, how that showed."""
        return await asyncio.shield(self._died)

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        if not self.is_ready:
            raise BackendUnavailableError("the engine is not running")
        async with aclosing(self._client.generate(request, request.adapter or self._server_model)) as chunks:
            async for chunk in chunks:
                yield chunk

    def end(self, reason: str) -> None:
        """Whoever knows that the server is gone says so."""
        if not self._died.done():
            self._died.set_result(reason)
        self._client.fail(reason)

    async def _check_model(self) -> None:
        found = await self._client.model(self._model.name)
        self._server_model, self.max_context_tokens = found.name, found.max_context_tokens
        if missing := [name for name in self._model.adapters if name not in found.adapters]:
            raise EngineStartError(
                f"the server of {self._name} has no adapter {', '.join(missing)}; start it with --enable-lora and "
                "--lora-modules, which name it so"
            )
        for text, token_ids in self._model.probes:
            theirs = await self._client.tokenize(found.name, text)
            if theirs != token_ids:
                raise EngineStartError(
                    f"the server of {self._name} has another tokenizer: {text[:40]!r} is {theirs[:8]} there and "
                    f"{token_ids[:8]} here"
                )

    async def _answer_once(self) -> None:
        """A first answer takes long, as much is loaded and compiled for it, and may fail where nothing did before."""
        request = Request(
            id="first",
            model=self._server_model,
            prompt_ids=[index % self._model.vocab_size for index in range(1, 9)],
            sampling=SamplingParams(max_tokens=2, temperature=0.0),
        )
        async with aclosing(self._client.generate(request, self._server_model)) as chunks:
            async for _ in chunks:
                continue

    async def _watch(self) -> None:
        num_steps, answered_s = -1, time.monotonic()
        while True:
            await asyncio.sleep(min(_WATCH_S, self._hang_timeout_s / 4))
            now_s = time.monotonic()
            try:
                metrics = await self._client.metrics()
            except (LocalMoEError, ValueError) as error:
                if now_s - answered_s > self._lost_after_s:
                    self._give_up(f"vLLM has not answered for {now_s - answered_s:.0f} s: {error}")
                    return
                continue
            answered_s = now_s
            if metrics.num_steps != num_steps:
                # It computes, if perhaps for others: our requests may be waiting for their turn.
                num_steps = metrics.num_steps
                self._client.hang_clock.heard()
            self._on_state(metrics.state(self._model.name, self._name))
            silent_s = self._client.hang_clock.silent_s
            if silent_s > self._hang_timeout_s:
                self._give_up(f"vLLM finished no step for {silent_s:.0f} s")
                return

    def _give_up(self, reason: str) -> None:
        logger.error("%s: %s", self._name, reason)
        self.end(reason)


class VllmServer:
    """One server of ours, from its start to its death.

    Args:
        python: the interpreter of vLLM's environment.
        model_path: the checkpoint.
        model: what it serves.
        name: the engine's, for metrics and logs.
        on_gpu: whether the build is for CUDA.
        write_grammar: see `vllm_answers.question`.
        on_state: told every few seconds how the server is; must be quick.
    """

    def __init__(
        self,
        *,
        python: Path,
        model_path: Path,
        model: ServedModel,
        name: str,
        config: VllmConfig,
        on_gpu: bool,
        write_grammar: WriteGrammar,
        on_state: Callable[[EngineState], None],
    ) -> None:
        self._name = name
        self._config = config
        self._on_gpu = on_gpu
        self._cleanup = AsyncExitStack()
        # Mode 0700: nobody else can reach the socket.
        self._folder = Path(tempfile.mkdtemp(prefix="localmoe-"))
        self._cleanup.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._socket = self._folder / "vllm"
        try:
            self._command = command(
                config,
                python=python,
                model=model.name,
                model_path=model_path,
                socket=self._socket,
                on_gpu=on_gpu,
                adapters=model.adapters,
            )
        except BaseException:  # nobody will stop what was never there
            shutil.rmtree(self._folder)
            raise
        self._client = VllmClient(
            url="http://vllm", socket=self._socket, vocab_size=model.vocab_size, write_grammar=write_grammar
        )
        self._connection = VllmConnection(
            client=self._client,
            model=model,
            name=name,
            start_timeout_s=config.start_timeout_s,
            hang_timeout_s=config.hang_timeout_s,
            lost_after_s=config.hang_timeout_s,
            on_state=on_state,
        )
        self._cleanup.push_async_callback(self._connection.stop)

    @property
    def is_ready(self) -> bool:
        return self._connection.is_ready

    async def start(self) -> None:
        """Returns when the server has answered a first request. Call `stop` whatever comes of it.

        Raises:
            EngineStartError: it cannot start as configured, or took too long; the message has its last lines.
        """
        try:
            process = await GuardedProcess.start(
                self._command, name=self._name, environment=environment(self._config, on_gpu=self._on_gpu)
            )
        except OSError as error:
            raise EngineStartError(f"vLLM's process could not be started: {error}") from error
        self._cleanup.push_async_callback(process.stop)
        watcher = asyncio.create_task(self._watch(process))
        self._cleanup.callback(watcher.cancel)
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while not watcher.done() and not await self._client.is_healthy():  # noqa: ASYNC110 - it does not tell
                    await asyncio.sleep(_POLL_S)
                await self._connection.start()
        except TimeoutError as error:
            raise EngineStartError(
                f"vLLM was not ready within {self._config.start_timeout_s:g} s\n{await process.output.last_lines()}"
            ) from error
        except (EngineDiedError, EngineStartError) as error:
            reason = watcher.result() if watcher.done() else str(error)
            raise EngineStartError(f"{reason}\n{await process.output.last_lines()}") from error

    async def stop(self) -> None:
        """End the server and free what it held; open requests fail."""
        await self._cleanup.aclose()

    async def wait_for_death(self) -> str:
        """Returns, when it has ended or hangs, how."""
        return await self._connection.wait_for_death()

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        async with aclosing(self._connection.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    @property
    def max_context_tokens(self) -> int | None:
        return self._connection.max_context_tokens

    async def _watch(self, process: GuardedProcess) -> str:
        reason = f"vLLM ended with {await process.wait()}"
        self._connection.end(reason)
        return reason


class VllmBackend(SupervisedBackend[VllmServer | VllmConnection]):
    """One vLLM server: started anew when it dies, or connected with again when it is there again.

    Args:
        model: what it serves.
        name: the engine's, where a model has several.
        model_path: the checkpoint: a directory with safetensors, or a GGUF file.
        python: the interpreter of vLLM's environment; None where `config.url` names a server.
        on_gpu: whether that environment is for CUDA.
        write_grammar: see `vllm_answers.question`; for a server that is started here.
        bus: where engine states and restarts are published.
    """

    def __init__(
        self,
        *,
        model: ServedModel,
        name: str = "vllm",
        model_path: Path,
        config: VllmConfig,
        python: Path | None,
        on_gpu: bool,
        write_grammar: WriteGrammar,
        bus: EventBus,
    ) -> None:
        def begin() -> VllmServer | VllmConnection:
            if config.url is not None:
                return VllmConnection(
                    client=VllmClient(url=config.url, vocab_size=model.vocab_size, api_key=config.api_key),
                    model=model,
                    name=name,
                    start_timeout_s=config.hang_timeout_s,
                    hang_timeout_s=config.hang_timeout_s,
                    lost_after_s=min(_LOST_AFTER_S, config.hang_timeout_s),
                    on_state=bus.publish,
                )
            assert python is not None
            return VllmServer(
                python=python,
                model_path=model_path,
                model=model,
                name=name,
                config=config,
                on_gpu=on_gpu,
                write_grammar=write_grammar,
                on_state=bus.publish,
            )

        self._is_foreign = config.url is not None
        super().__init__(
            model=model.name,
            name=name,
            capacity=config.max_num_seqs,
            context_tokens=config.max_model_len,
            begin=begin,
            bus=bus,
        )

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        sampling = request.sampling
        if request.embed:
            return "a vLLM server that generates gives no embeddings; native and remote engines do"
        if request.resumed_ids and (sampling.presence_penalty or sampling.frequency_penalty):
            return (
                "vLLM takes what was generated before for a part of the prompt, which presence_penalty and "
                "frequency_penalty do not count"
            )
        if sampling.grammar is not None:
            if request.resumed_ids:
                return (
                    "vLLM takes what was generated before for a part of the prompt, and a grammar would begin anew"
                )
            if sampling.grammar.kind == "lark" and self._is_foreign:
                return "a vLLM server that was not started here may read the grammar's rules as another language"
        if max(sampling.logprobs or 0, sampling.prompt_logprobs or 0) > MAX_LOGPROBS:
            return f"vLLM reports {MAX_LOGPROBS} alternatives at most"
        told = self._current.max_context_tokens if self._current is not None else None
        if told is not None and len(request.prompt_ids) + sampling.max_tokens > told:
            return f"its context is {told} tokens, of prompt and answer together"
        return super().refusal(request)
