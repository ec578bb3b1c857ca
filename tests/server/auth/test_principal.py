"""Permissions of a principal, the words for them, and the principal's place in the ASGI scope."""

from __future__ import annotations

import math

import pytest

from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.principal import PRINCIPAL, Principal, principal_in, subject_in
from cobatch.server.settings.auth import ModelRule, is_permission


def principal(
    *permissions: str, tenant: str = "t", values: tuple[str, ...] = (), rules: tuple[ModelRule, ...] = ()
) -> Principal:
    return Principal(
        Tenant(tenant),
        "someone",
        permissions=frozenset(permissions),
        values=frozenset(values),
        expires_s=math.inf,
        rules={rule.model: rule for rule in rules},
    )


def test_permissions() -> None:
    everything, one, reader, admin = (principal(name) for name in ("infer", "infer:m", "metadata", "admin"))
    assert [each.may_infer("m") for each in (everything, one, reader, admin)] == [True, True, False, False]
    assert [each.may_infer("n") for each in (everything, one, reader, admin)] == [True, False, False, False]
    assert [each.may_read("m") for each in (everything, one, reader, admin)] == [True, True, True, False]
    assert [each.may_read("n") for each in (everything, one, reader, admin)] == [True, False, True, False]


def test_model_rules_restrict_and_never_grant() -> None:
    rules = (ModelRule(model="m", tenants=("red",), scopes=("gold",)),)
    assert principal("infer", tenant="red", rules=rules).may_infer("m")
    assert principal("infer", values=("gold",), rules=rules).may_infer("m")
    assert not principal("infer", rules=rules).may_infer("m")
    assert principal("infer", rules=rules).may_infer("n")
    assert not principal("metadata", tenant="red", values=("gold",), rules=rules).may_infer("m")
    assert not principal("infer:n", tenant="red", rules=rules).may_infer("m")


@pytest.mark.parametrize("text", ["infer", "infer:a", "infer:A-1._b", "metadata", "admin"])
def test_permission_words(text: str) -> None:
    assert is_permission(text)


@pytest.mark.parametrize(
    "text", ["", "Infer", "infer:", "infer:.a", "infer:a b", "infer:a\n", "admin:x", "infer*"]
)
def test_words_that_are_not_permissions(text: str) -> None:
    assert not is_permission(text)


def test_the_principal_is_in_the_scope() -> None:
    someone = principal("infer")
    assert principal_in({PRINCIPAL: someone}) is someone
    assert (subject_in({PRINCIPAL: someone}), subject_in({})) == ("someone", "anonymous")
