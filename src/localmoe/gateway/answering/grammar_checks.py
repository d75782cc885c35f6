"""Whether grammars of clients can be compiled, found out where nothing else suffers from it.

Processes of our own try them (`text/grammar_trial.py`). What was found out is remembered, since the same schemas come
again and again, and requests that come with one at the same time wait for the same trial.
"""

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue

import msgspec

from localmoe.core.errors import GatewayOverloadedError, InvalidRequestError, OverloadedError
from localmoe.core.request import Grammar
from localmoe.text.sandbox_process import SandboxProcess

_NUM_PROCESSES = 2
_MAX_ANSWER_S = 2.0
"""For a process that ends trials itself after less."""
_MAX_ANSWER_BYTES = 1 << 14
_MAX_WAITING = 32
_MAX_REMEMBERED = 4096


class GrammarChecker:
    """Checks grammars. Its processes are started when they are first needed."""

    def __init__(self) -> None:
        self._findings: OrderedDict[bytes, asyncio.Future[str | None]] = OrderedDict()
        """Complaints, by a digest of the grammar; also those that are being found out."""
        self._threads = ThreadPoolExecutor(_NUM_PROCESSES, thread_name_prefix="grammar-check")
        self._num_waiting = 0
        # The one that was used last is taken first, so the second is started only where both are needed at once.
        self._processes: LifoQueue[SandboxProcess] = LifoQueue()
        for _ in range(_NUM_PROCESSES):
            self._processes.put(
                SandboxProcess(
                    "localmoe.text.grammar_trial",
                    opening=msgspec.json.encode(Grammar(kind="json_object")),
                    timeout_s=_MAX_ANSWER_S,
                    max_answer_bytes=_MAX_ANSWER_BYTES,
                )
            )

    async def check(self, grammar: Grammar, *, param: str) -> None:
        """Return if an engine could compile it.

        Args:
            param: the request's field that it is from.

        Raises:
            InvalidRequestError: it cannot be compiled, or not with what a grammar may take.
            GatewayOverloadedError: too many wait to be checked, or there was no time or no process to do it.
        """
        key = hashlib.sha256(msgspec.json.encode(grammar)).digest()
        finding = self._findings.get(key)
        if finding is None:
            finding = self._find_out(key, grammar)
        else:
            self._findings.move_to_end(key)
        # A client that goes must not take the answer from others.
        complaint = await asyncio.shield(finding)
        if complaint is None:
            raise GatewayOverloadedError(f"{param}: there was no time to check this grammar; try again later")
        if complaint:
            raise InvalidRequestError(f"{param}: {complaint}", param=param)

    def _find_out(self, key: bytes, grammar: Grammar) -> "asyncio.Future[str | None]":
        if self._num_waiting >= _MAX_WAITING:
            raise GatewayOverloadedError("too many grammars wait to be checked")
        self._num_waiting += 1
        finding = asyncio.get_running_loop().run_in_executor(self._threads, self._complaint, grammar)

        def note(done: "asyncio.Future[str | None]") -> None:
            self._num_waiting -= 1
            # That there was no time for it once says nothing.
            if done.cancelled() or done.exception() is not None or done.result() is None:
                self._findings.pop(key, None)

        finding.add_done_callback(note)
        self._findings[key] = finding
        if len(self._findings) > _MAX_REMEMBERED:
            self._findings.popitem(last=False)
        return finding

    def _complaint(self, grammar: Grammar) -> str | None:
        """Why it cannot be compiled; empty if it can; None: it could not be found out."""
        process = self._processes.get_nowait()  # there are as many as threads
        try:
            answer = process.ask(msgspec.json.encode(grammar))
        except OverloadedError as error:  # for other models it is no different
            raise GatewayOverloadedError(str(error)) from error
        finally:
            self._processes.put(process)
        return None if answer is None else msgspec.json.decode(answer, type=str | None)
