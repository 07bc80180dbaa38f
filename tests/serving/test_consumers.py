"""Programs that are not ours load an exported student and agree with `predict`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

# OpenVINO reports its own import to its makers unless this package is missing.
sys.modules["openvino_telemetry"] = None
import openvino  # noqa: E402

BIN = Path(sys.executable).parent


def run(*command: object) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_saved_model_cli(served, tmp_path):
    np.savez(tmp_path / "in.npz", image=served.images)
    run(
        *(BIN / "saved_model_cli", "run", "--dir", served.folder),
        *("--tag_set", "serve", "--signature_def", "serving_default"),
        *("--inputs", f"image={tmp_path / 'in.npz'}[image]"),
        *("--outdir", tmp_path / "out"),
    )
    served.check({path.stem: np.load(path) for path in (tmp_path / "out").iterdir()})


def test_onnx_runtime(served, tmp_path):
    run(
        *(sys.executable, "-m", "tf2onnx.convert", "--saved-model", served.folder),
        *("--tag", "serve", "--signature_def", "serving_default"),
        *("--output", tmp_path / "student.onnx"),
    )
    session = onnxruntime.InferenceSession(
        tmp_path / "student.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    answers = session.run(names, {"image": served.images})
    served.check(dict(zip(names, answers, strict=True)))


def test_openvino(served):
    model = openvino.convert_model(served.folder)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = compiled({"image": served.images})
    served.check(
        {output.get_any_name(): answers[output] for output in compiled.outputs}
    )
