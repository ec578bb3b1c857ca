"""Who made a request, and what that permits: computed once, then carried along."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

from cobatch.batcher.tenant import Tenant
from cobatch.server.settings.auth import ADMIN, INFER, METADATA, ModelRule

# Where the gate puts it in the ASGI scope, which no client can reach.
PRINCIPAL = "cobatch.principal"
ANONYMOUS = "anonymous"


class Principal:
    """An authenticated caller.

    `subject` tells callers apart that may not see each other's predictions. `values` are what the
    credential itself says (scopes, roles), `permissions` what that means here. `expires_s`: seconds since
    the epoch (`time.time`); whoever remembers a principal looks at it each time, since it is set to 0 when
    the key that vouched for the token is withdrawn.
    """

    __slots__ = ("__weakref__", "_rules", "expires_s", "permissions", "subject", "tenant", "values")

    def __init__(
        self,
        tenant: Tenant,
        subject: str,
        *,
        permissions: frozenset[str],
        values: frozenset[str] = frozenset(),
        expires_s: float,
        rules: Mapping[str, ModelRule],
    ) -> None:
        self.tenant = tenant
        self.subject = subject
        self.permissions = permissions
        self.values = values
        self.expires_s = expires_s
        self._rules = rules

    def may_infer(self, model: str) -> bool:
        """Whether this caller may run the model."""
        if INFER not in self.permissions and f"{INFER}:{model}" not in self.permissions:
            return False
        rule = self._rules.get(model)
        return rule is None or self.tenant.name in rule.tenants or not self.values.isdisjoint(rule.scopes)

    def may_read(self, model: str) -> bool:
        """Whether it may see the model's metadata."""
        return METADATA in self.permissions or self.may_infer(model)

    @property
    def is_admin(self) -> bool:
        """Whether it may see what concerns all callers."""
        return ADMIN in self.permissions


def principal_in(scope: Scope) -> Principal | None:
    """Who makes the request; None where the server asks nobody who he is."""
    principal: Principal | None = scope.get(PRINCIPAL)
    return principal


def subject_in(scope: Scope) -> str:
    """The caller's subject, "anonymous" where the server asks nobody who he is."""
    principal = principal_in(scope)
    return ANONYMOUS if principal is None else principal.subject
