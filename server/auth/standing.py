"""RateLimit and RateLimit-Policy: where a tenant stands (draft-ietf-httpapi-ratelimit-headers-10)."""

from __future__ import annotations

import math

from cobatch.batcher.scheduling.tenant import Tenant


def standing(tenant: Tenant, now_s: float) -> tuple[tuple[bytes, bytes], ...]:
    """The headers for a tenant's answer, none where it has no limit that they can say.

    `requests` is the token bucket: `q` at once, full again after `w` seconds; `r` are left, and in `t`
    seconds all will be. `concurrent` are the requests that may be open at the same time.
    """
    policies, left = [], []
    bucket = tenant.bucket
    if bucket is not None:
        policies.append(f'"requests";q={bucket.burst};w={math.ceil(bucket.window_s - 1e-9)}')
        full_s = math.ceil(bucket.until_full_s(now_s) - 1e-9)
        left.append(f'"requests";r={bucket.left(now_s)};t={full_s}')
    if tenant.max_concurrent is not None:
        policies.append(f'"concurrent";q={tenant.max_concurrent};qu="concurrent-requests"')
        left.append(f'"concurrent";r={max(0, tenant.max_concurrent - tenant.open_requests)}')
    if not policies:
        return ()
    return (
        (b"ratelimit-policy", ", ".join(policies).encode()),
        (b"ratelimit", ", ".join(left).encode()),
    )
