"""One answer on its way, through as many engines as it takes."""

import msgspec

from localmoe.core.errors import BackendUnavailableError, DeadlineExceededError, EngineDiedError, LocalMoEError
from localmoe.core.request import Request, TokenChunk, Usage
from localmoe.dispatch.replica import Replica


class Answer:
    """What was sent of one answer, and who has failed on it.

    Args:
        request: as it came.
        deadline_s: when it must be complete, by the dispatcher's clock.
    """

    def __init__(self, request: Request, *, deadline_s: float) -> None:
        self.request = request
        self.deadline_s = deadline_s
        self.num_attempts = 0
        self.failed: set[str] = set()
        """Names of engines not to be tried now."""
        self.suspects: list[tuple[Replica, float]] = []
        """Engines that said that they failed on this request, and when they were given it."""
        self.has_seen_death = False
        """Whether an engine died while it gave this answer."""
        self.engine: str | None = None
        """That sent the last chunk; None before the first."""
        self.last_chunk_s = 0.0
        self.slowness: float | None = None
        """How many times as long the engine takes as it should; None: not known."""
        self._sent_ids = list(request.resumed_ids)
        self._gist = request
        self._has_text = False
        self._usage: Usage | None = None

    @property
    def num_tokens(self) -> int:
        """Generated so far."""
        return len(self._sent_ids)

    @property
    def can_resume(self) -> bool:
        """Whether another engine could go on."""
        return not self._has_text

    @property
    def gist(self) -> Request:
        """The request for what is missing, as far as an engine needs it to say whether it can go on: with one of the
        tokens that were sent. Unlike `rest` it is made once."""
        if self._sent_ids and not self._gist.resumed_ids:
            self._gist = msgspec.structs.replace(self.request, resumed_ids=self._sent_ids[:1])
        return self._gist

    def rest(self) -> Request:
        """The request for what is missing."""
        if self.engine is None:
            return self.request
        # Log-probabilities of the prompt came with the first chunk.
        sampling = msgspec.structs.replace(self.request.sampling, prompt_logprobs=None)
        return msgspec.structs.replace(self.request, sampling=sampling, resumed_ids=list(self._sent_ids))

    def verdict(self, failure: LocalMoEError) -> LocalMoEError:
        """What the answer's last failure is to whoever asked: where it may have killed an engine, that the others
        were not to be had does not mean that it could be tried again without harm."""
        if not self.has_seen_death or not isinstance(failure, BackendUnavailableError):
            return failure
        if isinstance(failure, DeadlineExceededError | EngineDiedError):
            return failure
        message = f"an engine ended during this request, and then: {failure}"
        return EngineDiedError(message, retry_after_s=failure.retry_after_s)

    def take(self, chunk: TokenChunk, engine: str, now_s: float) -> TokenChunk:
        """Take note of a chunk; returns it as the client is to see it."""
        self.engine, self.last_chunk_s = engine, now_s
        self._sent_ids += chunk.token_ids
        self._has_text = self._has_text or chunk.text is not None
        if chunk.usage is None:
            return chunk
        if self._usage is None:
            self._usage = chunk.usage
            return chunk
        # What another engine queued and computed again is not what the client's prompt took.
        counted = chunk.usage.completion_tokens if self._has_text else self.num_tokens
        usage = msgspec.structs.replace(self._usage, completion_tokens=counted)
        return msgspec.structs.replace(chunk, usage=usage)
