import os

import pytest


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What whoever runs the tests has set is not looked at."""
    for name in list(os.environ):
        if name.startswith("LOCALMOE_"):
            monkeypatch.delenv(name)
