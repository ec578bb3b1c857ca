"""The supervisor of fake children: `python supervised.py serve PROCESSES [DRAIN_DELAY_S]`, on a free port."""

import sys
from pathlib import Path

from cobatch.server.settings.schema import ModelSettings, ServerSettings, Settings
from cobatch.server.supervisor.supervisor import run

FAKE = (sys.executable, "-P", str(Path(__file__).with_name("fake_child.py")))

if __name__ == "__main__":
    processes, *delay = sys.argv[2:]
    http = ServerSettings(port=0, processes=int(processes), drain_delay_s=float(delay[0] if delay else 0))
    sys.exit(run(Settings(server=http, models=(ModelSettings(path="fake.onnx"),)), FAKE))
