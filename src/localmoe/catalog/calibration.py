"""Text and code that every Python brings along, for fitting routers without shipping or fetching data."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import InspectLoader
from itertools import chain, islice
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from localmoe.core.errors import ModelBuildError

WINDOW_TOKENS = 256
_WINDOWS_PER_TEXT = 3
_HELD_OUT_EVERY = 3
_MODULES = (
    "argparse", "bisect", "calendar", "cmd", "collections", "configparser", "csv", "difflib", "fractions",
    "graphlib", "heapq", "html.parser", "http.cookies", "json.decoder", "logging", "queue", "random", "sched",
    "shlex", "statistics", "string", "tarfile", "textwrap", "wave",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows of `WINDOW_TOKENS` token ids: prose in a chat's frame and source code, by turns."""

    fitting: list[list[int]]
    held_out: list[list[int]]
    """From other modules and topics than `fitting`."""


def calibration_windows(tokenizer: Tokenizer, *, num_fitting: int, num_held_out: int) -> Calibration:
    """Cut windows out of the standard library's sources and of the language reference behind `help()`.

    Raises:
        ModelBuildError: this Python comes without them.
    """
    prose = [
        f"<|im_start|>user\nExplain {topic}.<|im_end|>\n<|im_start|>assistant\n{text.strip()}"
        for topic, text in sorted(topics.items())
    ]
    code = [source for source in map(_source, _MODULES) if source is not None]

    def windows(*, held_out: bool, count: int) -> list[list[int]]:
        chosen = (
            _windows(tokenizer, [t for i, t in enumerate(texts) if (i % _HELD_OUT_EVERY == 0) == held_out])
            for texts in (prose, code)
        )
        found = list(islice(chain.from_iterable(zip(*chosen, strict=False)), count))
        if len(found) < count:
            raise ModelBuildError(
                "routers are fitted to the standard library's sources and documentation, of which this Python has "
                f"only {len(found)} windows, not {count}; use a Python that was not stripped of its sources"
            )
        return found

    return Calibration(
        fitting=windows(held_out=False, count=num_fitting), held_out=windows(held_out=True, count=num_held_out)
    )


def _source(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not isinstance(spec.loader, InspectLoader):
        return None
    return spec.loader.get_source(module)


def _windows(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenizer.encode(text).ids
        for start in range(0, min(len(ids), _WINDOWS_PER_TEXT * WINDOW_TOKENS) - WINDOW_TOKENS + 1, WINDOW_TOKENS):
            yield ids[start : start + WINDOW_TOKENS]
