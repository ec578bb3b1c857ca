"""Kill fronts and home again and again: nothing may be left behind, and home answers again soon.

`python -m benchmarks.restarts [--restarts N] [--kills N] [--processes N]` prints the open files and mappings
of the supervisor and home before and after N restarts of fronts, and the time from each kill of home, and of
the only front of a second server, until an inference request is answered. It exits with 1 if there are more
files or mappings than before.
"""

import argparse
import http.client
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.procstat import children

_TIMEOUT_S = 60.0
_POLL_S = 0.01
# A child that ends sooner after its start is replaced with a delay.
_STEADY_S = 1.1
_SHARED = "cobatch-slab"


def _is_linked(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/maps").read_text().count(_SHARED) >= 2
    except OSError:
        return False


def _held(pid: int) -> Counter[str]:
    """Count the resources of a process: open files by kind, and mapped slabs."""
    files = [
        str(fd.readlink()).partition("[")[0] for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()
    ]
    slabs = Path(f"/proc/{pid}/maps").read_text().count(_SHARED)
    return Counter(files) + Counter({f"mapped {_SHARED}": slabs})


def _until(done: Callable[[], bool]) -> float:
    """Wait until `done`; return the seconds."""
    start_s = time.monotonic()
    while not done():
        if time.monotonic() - start_s > _TIMEOUT_S:
            sys.exit(f"nothing happened for {_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - start_s


def _restart_fronts(supervisor: int, fronts: int, most: int) -> int:
    """Kill all fronts, at most `most`, and wait for others; return their number."""
    before = {name: pid for name, pid in children(supervisor).items() if name != "home"}
    killed = dict(list(before.items())[:most])
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        now = children(supervisor)
        new = {name: pid for name, pid in now.items() if name != "home" and pid not in killed.values()}
        return len(new) == fronts and all(map(_is_linked, new.values()))

    _until(replaced)
    time.sleep(_STEADY_S)
    return len(killed)


def _answers(address: str) -> bool:
    """Send an inference request on a new connection; return True if it is answered with 200."""
    request = wire.encode("tiny", wire.rows_of("tiny", 1, 0), binary=False)
    try:
        wire.post(address, "/v2/models/tiny/infer", request)
    except (OSError, http.client.HTTPException, wire.RefusedError):
        return False
    return True


def _kill(server: Server, name: str, kills: int) -> None:
    """Kill a child again and again; print the seconds until an inference request is answered."""
    times_s = []
    for _ in range(kills):
        os.kill(children(server.pid)[name], signal.SIGKILL)
        times_s.append(_until(lambda: _answers(server.address)))
        time.sleep(_STEADY_S)
    median_s = statistics.median(times_s)
    text = f"{median_s:.2f} s (median of {kills}), {max(times_s):.2f} s at most"
    print(f"{name} killed: a request is answered after {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=9)
    options = parser.parse_args()
    fronts = options.processes - 1
    flags = ["--processes", str(options.processes)]
    with cobatch(model_path("tiny"), None, fast_path=True, flags=flags) as server:
        supervisor = server.pid
        _restart_fronts(supervisor, fronts, fronts)  # files that are opened at first use are open now
        home = children(supervisor)["home"]
        before = {"supervisor": _held(supervisor), "home": _held(home)}
        left = options.restarts
        while left > 0:
            left -= _restart_fronts(supervisor, fronts, left)
            print(f"\r{options.restarts - left} fronts restarted", end="", flush=True)
        after = {"supervisor": _held(supervisor), "home": _held(home)}
        print()
        for name, held in after.items():
            print(f"{name}: {before[name].total()} files and mappings before, {held.total()} after")
            for kind in sorted((held - before[name]).keys()):
                print(f"    more: {kind} {before[name][kind]} -> {held[kind]}")
        if options.kills:
            _kill(server, "home", options.kills)
    if options.kills:
        with cobatch(model_path("tiny"), None, fast_path=True, flags=["--processes", "2"]) as server:
            _kill(server, "front 0", options.kills)
    sys.exit(any(after[name] - before[name] for name in after))


if __name__ == "__main__":
    main()
