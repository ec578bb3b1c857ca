"""Load from `wrk` (a Debian package): one thread, keep-alive, always the same body.

wrk builds the request once and sends those bytes. Lua runs for each request only if answers are traced, which
costs the client some microseconds each and is for engine-bound cases.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SCRIPT = """
local file = assert(io.open({body_file}, "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
{rotate}
{trace}
function done(summary, latency, requests)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\\n#wrk {{"requests":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"max_us":%d,'
    .. '"not_2xx":%d,"socket_errors":%d',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    errors.status, bad))
  if traced then traced() end
  io.write("}}\\n")
end
"""

# Requests that differ in one header, in turn; built beforehand, so that they cost no more to send.
_ROTATE = """
local requests, at = {{}}, 0
function init()
  for value in io.lines({file}) do
    wrk.headers[{name}] = value
    requests[#requests + 1] = wrk.format()
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
"""

# The monotonic clock, in seconds, for scripts of wrk.
CLOCK = """
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long seconds; long nanoseconds; } moment_t;
  int clock_gettime(int clock, moment_t *moment);
]]
local moment = ffi.new("moment_t")
function now()
  ffi.C.clock_gettime(1, moment)
  return tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
end
"""

# Records the time of each answer, and its batch size from Server-Timing (0: none).
_TRACE = """
local threads = {}
times, batches = {}, {}
function setup(thread) threads[#threads + 1] = thread end
function response(status, headers, body)
  times[#times + 1] = now() * 1e6
  local timing = headers["server-timing"] or headers["Server-Timing"] or ""
  batches[#batches + 1] = tonumber(timing:match("batch;desc=\\"?(%d+)")) or 0
end
function traced()
  for _, name in ipairs({"times", "batches"}) do
    io.write(string.format(',"%s":[', name))
    for index, value in ipairs(threads[1]:get(name)) do
      io.write(index > 1 and "," or "", string.format("%.0f", value))
    end
    io.write("]")
  end
end
"""


class WrkError(Exception):
    """wrk failed, or some requests failed."""


@dataclass(frozen=True, slots=True)
class Load:
    """The report of wrk. Times are microseconds; `times` and `batches` are those of each traced answer."""

    requests: int
    duration_us: int
    p50_us: int
    p99_us: int
    max_us: int
    not_2xx: int
    socket_errors: int
    times: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)


def require_wrk() -> str:
    """Return the path of wrk. Raises WrkError."""
    program = shutil.which("wrk")
    if program is None:
        raise WrkError("wrk is not installed: apt-get install wrk")
    return program


def run_wrk(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    connections: int,
    seconds: int,
    trace: bool = False,
    rotating: tuple[str, Sequence[str]] | None = None,
    strict: bool = True,
) -> Load:
    """Send POST requests for `seconds` in a closed loop. Raises WrkError.

    `rotating` is the name of a header, and its values in turn. With `strict` a failed request is an error;
    otherwise it is counted.
    """
    with tempfile.TemporaryDirectory(prefix="cobatch-wrk-") as folder:
        body_file, script = Path(folder, "body"), Path(folder, "post.lua")
        body_file.write_bytes(body)
        rotate = ""
        if rotating is not None:
            values = Path(folder, "values")
            values.write_text("\n".join(rotating[1]) + "\n")
            rotate = _ROTATE.format(name=json.dumps(rotating[0]), file=json.dumps(str(values)))
        lines = [f"wrk.headers[{json.dumps(key)}] = {json.dumps(value)}" for key, value in headers.items()]
        script.write_text(
            _SCRIPT.format(
                body_file=json.dumps(str(body_file)),
                headers="\n".join(lines),
                rotate=rotate,
                trace=CLOCK + _TRACE if trace else "",
            )
        )
        command = [require_wrk(), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
        done = subprocess.run(
            [*command, "-s", str(script), url],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 60,
        )
    marked = [line for line in done.stdout.splitlines() if line.startswith("#wrk ")]
    if done.returncode or not marked:
        raise WrkError(f"wrk failed on {url}: {(done.stderr or done.stdout).strip()}")
    load = Load(**json.loads(marked[0].removeprefix("#wrk ")))
    if strict and (load.not_2xx or load.socket_errors or not load.requests):
        raise WrkError(
            f"{url}: {load.requests} answers, {load.not_2xx} not 2xx, {load.socket_errors} socket errors"
        )
    return load
