"""Who may do what: one table for the whole service.

A route that is not in it is for admins only, so that one that was forgotten is open to nobody else. What is decided
on is the path that the router decides on, the ASGI scope's, never something that a client can say otherwise, such as
the Host header. docs/security.md shows the table.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.routing import compile_path

from localmoe.core.identity import Role

OTHER = "other"
"""What stands for all routes and methods that there are not, since whoever counts them cannot count what clients make
up."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True)
class Rule:
    """Who may use a route."""

    method: str
    route: str
    """The path, as the router has it: `/v1/models/{model_id:path}`."""
    role: Role | None
    """The least that may; None: everybody, and nobody is asked."""

    @property
    def is_counted(self) -> bool:
        """Whether its requests count for limits. To look is cheap, and programs look often."""
        return self.method != "GET" and self.role is not None


_VIEWER = ("/metrics", "/health/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json")

TABLE: Sequence[Rule] = (
    Rule("GET", "/health/live", None),
    *(Rule("GET", route, Role.VIEWER) for route in _VIEWER),
    Rule("GET", "/v1/models", Role.VIEWER),
    Rule("GET", "/v1/models/{model_id:path}", Role.VIEWER),
    Rule("GET", "/v1/experts", Role.VIEWER),
    Rule("GET", "/v1/stats/memory", Role.VIEWER),
    Rule("GET", "/v1/stats/performance", Role.VIEWER),
    Rule("POST", "/v1/chat/completions", Role.USER),
    Rule("POST", "/v1/completions", Role.USER),
    Rule("POST", "/v1/embeddings", Role.USER),
    Rule("POST", "/v1/responses", Role.USER),
    Rule("GET", "/v1/responses/{response_id}", Role.USER),
    Rule("GET", "/v1/responses/{response_id}/input_items", Role.USER),
    Rule("DELETE", "/v1/responses/{response_id}", Role.USER),
    Rule("POST", "/v1/responses/{response_id}/cancel", Role.USER),
    Rule("POST", "/v1/messages", Role.USER),
    Rule("POST", "/v1/messages/count_tokens", Role.USER),
    Rule("POST", "/infill", Role.USER),
    Rule("POST", "/v1/tokenize", Role.USER),
    Rule("POST", "/v1/detokenize", Role.USER),
    Rule("POST", "/v1/inference", Role.USER),
    Rule("GET", "/v1/jobs/{job_id}", Role.USER),
    Rule("DELETE", "/v1/jobs/{job_id}", Role.USER),
    Rule("POST", "/v1/files", Role.USER),
    Rule("GET", "/v1/files", Role.USER),
    Rule("GET", "/v1/files/{file_id}", Role.USER),
    Rule("GET", "/v1/files/{file_id}/content", Role.USER),
    Rule("DELETE", "/v1/files/{file_id}", Role.USER),
    Rule("POST", "/v1/batches", Role.USER),
    Rule("GET", "/v1/batches", Role.USER),
    Rule("GET", "/v1/batches/{batch_id}", Role.USER),
    Rule("POST", "/v1/batches/{batch_id}/cancel", Role.USER),
    Rule("POST", "/v1/models/load", Role.OPERATOR),
    Rule("POST", "/v1/models/switch", Role.OPERATOR),
    Rule("POST", "/v1/models/unload", Role.OPERATOR),
    Rule("GET", "/v1/config", Role.ADMIN),
    Rule("GET", "/v1/config/history", Role.ADMIN),
    Rule("POST", "/v1/config/reload", Role.ADMIN),
    Rule("POST", "/v1/config/rollback", Role.ADMIN),
    Rule("GET", "/v1/config/{key}", Role.ADMIN),
    Rule("PATCH", "/v1/config/{key}", Role.ADMIN),
)


class AccessTable:
    """Finds the rule of a request."""

    def __init__(self, rules: Iterable[Rule] = TABLE) -> None:
        self._fixed: dict[tuple[str, str], Rule] = {}
        self._patterns: list[tuple[re.Pattern[str], Rule]] = []
        for rule in rules:
            if "{" in rule.route:
                self._patterns.append((compile_path(rule.route)[0], rule))
            else:
                self._fixed[rule.method, rule.route] = rule

    def rule(self, method: str, path: str) -> Rule:
        """The one for this request; of a route that is not in the table, one for admins."""
        found = self._fixed.get((method, path))
        if found is not None:
            return found
        for pattern, rule in self._patterns:
            if rule.method == method and pattern.match(path):
                return rule
        return Rule(method if method in _METHODS else OTHER, OTHER, Role.ADMIN)
