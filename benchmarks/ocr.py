"""Pages read by rapidocr in a pool of threads, and by the server of examples/ocr: `python -m benchmarks.ocr`.

Sixteen pages at once, in turns. The models alone, on one thread each, bound what either can reach; rapidocr
runs once with its own settings, and once with one thread for each model, which suits a pool of threads.
"""

import argparse
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import onnxruntime
import rapidocr

from benchmarks.common.pages import page
from benchmarks.common.processes import ROOT, cobatch
from benchmarks.common.procstat import cpu_us

AT_ONCE = 16
_TIMEOUT_S = 300.0
_MODELS = Path(rapidocr.__file__).parent / "models"


class Turn(NamedTuple):
    """Pages a second, and CPU seconds of a page."""

    per_s: float
    cpu_s: float


def turn(read: Callable[[bytes], object], pages: Sequence[bytes], cpu: Callable[[], float]) -> Turn:
    """Let AT_ONCE threads read the pages."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        start_s, cpu_s = time.perf_counter(), cpu()
        list(threads.map(read, pages))
        seconds = time.perf_counter() - start_s
        return Turn(len(pages) / seconds, (cpu() - cpu_s) / len(pages))


def of_server(address: str) -> Callable[[bytes], object]:
    """Return a function that has the server read a page."""

    def read(picture: bytes) -> object:
        url = f"http://{address}/v1/models/ocr/infer"
        request = urllib.request.Request(url, picture, {"content-type": "image/png"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return answer.read()

    return read


def models_alone(pages: Sequence[bytes]) -> float:
    """Return the CPU seconds that a page takes in the models, with rapidocr's shapes, on one thread."""
    spent = 0.0

    def timed(session: Any) -> Any:
        def run(array: Any) -> Any:
            nonlocal spent
            start_s = time.process_time()
            (output,) = session.run(None, {session.get_inputs()[0].name: array})
            spent += time.process_time() - start_s
            return output

        return run

    reader: Any = rapidocr.RapidOCR(params={"Global.log_level": "error"})
    reader(pages[0])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for part, file in (
        (reader.text_det, "PP-OCRv6_det_small.onnx"),
        (reader.text_cls, "ch_ppocr_mobile_v2.0_cls_mobile.onnx"),
        (reader.text_rec, "PP-OCRv6_rec_small.onnx"),
    ):
        part.session = timed(onnxruntime.InferenceSession(_MODELS / file, options))
    for one in pages[:2]:
        reader(one)
    spent = 0.0
    for one in pages:
        reader(one)
    return spent / len(pages)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ocr", description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    pages = [page(seed) for seed in range(AT_ONCE)]
    one_thread = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    plain: Any = rapidocr.RapidOCR(params={"Global.log_level": "error"})
    single: Any = rapidocr.RapidOCR(params=one_thread)
    turns: dict[str, list[Turn]] = {}
    with TemporaryDirectory() as folder:
        prepare = ROOT / "examples" / "ocr" / "prepare.py"
        subprocess.run([sys.executable, prepare, folder], check=True)
        with cobatch(None, None, True, Path(folder, "cobatch.toml")) as server:
            readers: dict[str, tuple[Callable[[bytes], object], Callable[[], float]]] = {
                "rapidocr, its settings": (plain, time.process_time),
                "rapidocr, one thread a model": (single, time.process_time),
                "cobatch": (of_server(server.address), lambda: cpu_us(server.pid) / 1e6),
            }
            for read, _ in readers.values():
                read(pages[0])
            for _ in range(options.turns):
                for name, (read, cpu) in readers.items():
                    turns.setdefault(name, []).append(turn(read, pages, cpu))
    ours = turns["cobatch"]
    print(f"{AT_ONCE} pages at once, medians of {options.turns} turns")
    for name, figures in turns.items():
        ratio = median([own.per_s / other.per_s for own, other in zip(ours, figures, strict=True)])
        per_s, cpu_s = median([one.per_s for one in figures]), median([one.cpu_s for one in figures])
        print(
            f"{name:30}{per_s:8.2f} pages/s{cpu_s:8.2f} s of CPU a page   cobatch has {ratio:.2f} times its"
        )
    print(f"{'the models alone, one thread':30}{models_alone(pages[:6]):24.2f} s of CPU a page")
    return 0


if __name__ == "__main__":
    sys.exit(main())
