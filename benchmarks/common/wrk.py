"""Load from `wrk` (Debian's package): one thread, keep-alive, the same body again and again.

wrk builds the request once and sends those bytes; nothing of Lua runs per request unless answers
are to be traced, which costs the client a few microseconds each and is for engine-bound cases only.
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

# Requests that differ in one header, in turn; made beforehand, so that they cost no more to send.
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

# One line per answer: when it came, and the batch it was in as its Server-Timing says (0: not said).
_TRACE = """
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long seconds; long nanoseconds; } moment_t;
  int clock_gettime(int clock, moment_t *moment);
]]
local moment = ffi.new("moment_t")
local threads = {}
times, batches = {}, {}
function setup(thread) threads[#threads + 1] = thread end
function response(status, headers, body)
  ffi.C.clock_gettime(1, moment)
  times[#times + 1] = tonumber(moment.seconds) * 1e6 + tonumber(moment.nanoseconds) / 1e3
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
    """The load could not be put on, or some requests failed; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw. Times are microseconds; `times` and `batches` are per answer, if traced."""

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
    """Path of wrk; raises WrkError that says how to get it."""
    found = shutil.which("wrk")
    if found is None:
        raise WrkError("wrk, which puts on the load, is not installed: apt-get install wrk")
    return found


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
    """POST the body for `seconds` from `connections` connections; raises WrkError on any failed request.

    `rotating` is a header's name and the values that the requests have in turn. Without `strict`, failed
    requests are counted and no more.
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
                trace=_TRACE if trace else "",
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
