"""Settings of all tests: hypothesis judges answers, never how long they took; Ctrl-C is not ignored."""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("cobatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cobatch")
# A shell starts a background command with SIGINT ignored, and the processes of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
