"""The authenticated client of a request and its permissions."""

from collections.abc import Mapping

import msgspec
from starlette.types import Scope

from cobatch.batcher.tenant import Tenant
from cobatch.server.settings.auth import INFER, METADATA, ModelRule

# The principal's key in the ASGI scope, which no client can write to.
PRINCIPAL = "cobatch.principal"
ANONYMOUS = "anonymous"
MAX_NAME = 256


class Principal(msgspec.Struct, eq=False, weakref=True):
    """An authenticated client.

    `subject` separates clients that may not see each other's predictions. `values` are the scopes and roles
    in the credential, `permissions` the rights they grant here; `rules` restrict models. `expires_s`, in
    seconds since the epoch, becomes 0 when the token's key is withdrawn, so caches check it on each use.
    """

    tenant: Tenant
    subject: str
    permissions: frozenset[str]
    expires_s: float
    rules: Mapping[str, ModelRule]
    values: frozenset[str] = frozenset()

    def may_infer(self, model: str) -> bool:
        """Report whether the client may run the model."""
        if INFER not in self.permissions and f"{INFER}:{model}" not in self.permissions:
            return False
        rule = self.rules.get(model)
        return rule is None or self.tenant.name in rule.tenants or not self.values.isdisjoint(rule.scopes)

    def may_read(self, model: str) -> bool:
        """Report whether the client may read the model's metadata."""
        return METADATA in self.permissions or self.may_infer(model)


def is_name(value: object) -> bool:
    """Report whether a value is safe in logs and metrics: no control, invisible or surrogate characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def principal_in(scope: Scope) -> Principal | None:
    """Return the request's principal; None on a server without authentication."""
    principal: Principal | None = scope.get(PRINCIPAL)
    return principal


def subject_in(scope: Scope) -> str:
    """Return the principal's subject; "anonymous" on a server without authentication."""
    principal = principal_in(scope)
    return ANONYMOUS if principal is None else principal.subject
