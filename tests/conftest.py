"""Settings of all tests: hypothesis judges answers, never how long they took."""

from hypothesis import HealthCheck, settings

settings.register_profile("cobatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cobatch")
