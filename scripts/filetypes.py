"""Magika's file-type model: its file, its input features, its labels.

The features are computed here and not by the `magika` package, so that the demo can compare the server's
answers with those of the package. They follow its version-3 models: the first and the last `block_size`
bytes, stripped of white space, cut to `beg_size` and `end_size`, and padded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import magika
import numpy as np
from magika import Magika

Row = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A label and its score; `score` is None for a file that is too short for the model."""

    label: str
    score: float | None


class FileTypes:
    """The model, and the conversions from a file to an input row and from an output row to a verdict."""

    def __init__(self) -> None:
        self.reference = Magika()
        directory = Path(magika.__file__).parent / "models" / self.reference.get_model_name()
        config: dict[str, Any] = json.loads((directory / "config.min.json").read_text())
        if config["mid_size"] or config["use_inputs_at_offsets"]:
            raise SystemExit(f"demo: {directory.name} needs features that this demo does not extract")
        self.model = directory / "model.onnx"
        self._labels: list[str] = config["target_labels_space"]
        self._beg: int = config["beg_size"]
        self._end: int = config["end_size"]
        self._block: int = config["block_size"]
        self._padding: int = config["padding_token"]
        self._least: int = config["min_file_size_for_dl"]

    def features(self, path: Path) -> Row | None:
        """Return the model's input for a file, int32 [beg_size + end_size]; None if the file is too short.

        The limit is `min_file_size_for_dl` bytes, without leading white space. Raises OSError.
        """
        with path.open("rb") as file:
            head = file.read(self._block)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - self._block))
            tail = file.read(self._block)
        head = head.lstrip()[: self._beg]
        tail = tail.rstrip()[-self._end :]
        if len(head) < self._least:
            return None
        row = np.full(self._beg + self._end, self._padding, dtype=np.int32)
        row[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        row[len(row) - len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
        return row

    def verdict(self, scores: np.ndarray[Any, Any]) -> Verdict:
        """Return the most likely label of an output row, float32 [labels]."""
        best = int(scores.argmax())
        return Verdict(self._labels[best], float(scores[best]))

    def without_model(self, path: Path) -> Verdict:
        """Return magika's answer for a file that is too short for the model."""
        return Verdict(str(self.reference.identify_path(path).prediction.output.label), None)

    def expected(self, path: Path) -> Verdict:
        """Return the answer of the magika package's own run of the model."""
        prediction = self.reference.identify_path(path).prediction
        return Verdict(str(prediction.dl.label), float(prediction.score))


def own_files(repository: Path) -> list[Path]:
    """Return the repository's files that git does not ignore; all of them without git."""
    command = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return find_files(repository, sys.maxsize)
    paths = [repository / os.fsdecode(name) for name in sorted(set(listed.split(b"\0"))) if name]
    return [path for path in paths if _is_readable(path)]


def find_files(root: Path, most: int) -> list[Path]:
    """Return readable regular files under `root`, sorted, at most `most`; no hidden files, no links."""
    files: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith((".", "__pycache__")))
        for name in sorted(names):
            path = Path(directory, name)
            if _is_readable(path):
                files.append(path)
                if len(files) == most:
                    return files
    return files


def _is_readable(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and os.access(path, os.R_OK)
