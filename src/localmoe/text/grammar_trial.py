"""Tries whether grammars can be compiled, in a process of its own: see `sandbox_process`.

A question is a grammar, as JSON; the answer, as JSON too, is what is wrong with it, empty if nothing is, and null if
there was no time to find out.

Each grammar is tried in a child, a copy of this process, which has all loaded that it takes. The kernel ends a child
that wants more time, memory or stack than is good for an engine. So what a hostile grammar costs is bounded whatever
the compiler does, nothing of it stays, and the next one need not wait for a process to start.
"""

import os
import signal
import sys
import threading
from functools import partial

import msgspec
from llguidance import LLTokenizer

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.text.grammar_source import compiled
from localmoe.text.sandbox_process import serve

MAX_CPU_S = 0.25
MAX_S = 0.8
"""Of real time, on a machine that has no time for it."""
STACK_BYTES = 1 << 21
"""A quarter of what engines have to compile with, those that are not ours too."""
MAX_BYTES = 1 << 28
"""Address space, of which the interpreter and the compiler take a part."""
_TOO_MUCH = "it takes too much time or memory to compile; make it smaller"


def tried(tokenizer: LLTokenizer, question: bytes) -> bytes:
    """The answer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _try(tokenizer, question, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()  # ends with the child
    _, status = os.waitpid(child, 0)
    if status == 0:
        return said
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return msgspec.json.encode(None if is_late else _TOO_MUCH)


def _try(tokenizer: LLTokenizer, question: bytes, writing: int) -> None:
    """In the child, which it ends."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, MAX_S)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a compiler that panics would fill the log
    complaints: list[str] = []
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=lambda: complaints.append(_complaint(tokenizer, question)))
    worker.start()
    worker.join()
    for complaint in complaints:
        os.write(writing, msgspec.json.encode(complaint))
    os._exit(0 if complaints else 1)


def _complaint(tokenizer: LLTokenizer, question: bytes) -> str:
    """Bytes stand for a model's tokens: to compile takes as long with them."""
    try:
        compiled(msgspec.json.decode(question, type=Grammar), tokenizer)
    except InvalidRequestError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    os.nice(5)
    serve(partial(tried, LLTokenizer("byte")), cpu_s=MAX_CPU_S, memory_bytes=MAX_BYTES)
