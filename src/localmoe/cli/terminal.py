"""What commands tell on the terminal."""

import sys


def say(line: str) -> None:
    """On standard error, at once: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def url_of(host: str, port: int) -> str:
    """Where a server at this address is reached."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
