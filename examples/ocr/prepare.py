"""Writes the models of rapidocr's wheel, and a configuration file, into a folder: `prepare.py FOLDER`.

The recognizer gets two nodes at its end: of the 18,710 characters at each place of a line only the likeliest
one leaves the model, so 3 MB of a line become 1 kB.
"""

import shutil
import sys
from pathlib import Path

import onnx
import rapidocr
from onnx import TensorProto, helper

_HERE = Path(__file__).parent
_MODELS = Path(rapidocr.__file__).parent / "models"


def main() -> None:
    """Write all files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_MODELS / "PP-OCRv6_det_small.onnx", folder / "detect.onnx")
    shutil.copy(_MODELS / "ch_ppocr_mobile_v2.0_cls_mobile.onnx", folder / "classify.onnx")
    onnx.save(likeliest(onnx.load(_MODELS / "PP-OCRv6_rec_small.onnx")), folder / "recognize.onnx")
    for name in ("app.py", "cobatch.toml"):
        shutil.copy(_HERE / name, folder)


def likeliest(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the index and the probability of the likeliest character in place of all."""
    graph = model.graph
    (before,) = graph.output
    graph.node.extend(
        [
            helper.make_node("ArgMax", [before.name], ["index"], axis=2, keepdims=0),
            helper.make_node("ReduceMax", [before.name], ["probability"], axes=[2], keepdims=0),
        ]
    )
    del graph.output[:]
    shape = ["rows", "places"]
    graph.output.extend(
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, shape),
            helper.make_tensor_value_info("probability", TensorProto.FLOAT, shape),
        ]
    )
    return model


if __name__ == "__main__":
    main()
