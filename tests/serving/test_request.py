"""The request file of serving/README.md, and the client that sends it."""

import importlib.util
import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from dp_transcribe import export

LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def client(pytestconfig):
    path = pytestconfig.rootpath / "serving" / "client.py"
    spec = importlib.util.spec_from_file_location("serving_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def signature(served):
    return tf.saved_model.load(str(served.folder)).signatures[export.SIGNATURE]


@pytest.fixture
def rest_address(signature):
    """A server that speaks TensorFlow Serving's row format on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/student:predict"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            rows = json.loads(body)["instances"]
            names = rows[0].keys()
            inputs = {n: tf.constant([row[n] for row in rows]) for n in names}
            outputs = {n: v.numpy().tolist() for n, v in signature(**inputs).items()}
            predictions = [
                {name: values[i] for name, values in outputs.items()}
                for i in range(len(rows))
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": predictions}).encode())

        def log_message(self, *_):
            """Keeps the test output quiet."""

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"{LOOPBACK}:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_address(signature):
    """TensorFlow Serving's published prediction service on a free port."""

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            assert request.model_spec.name == "student"
            assert request.model_spec.signature_name == export.SIGNATURE
            inputs = {n: tf.make_ndarray(v) for n, v in request.inputs.items()}
            response = predict_pb2.PredictResponse()
            for name, value in signature(
                **{n: tf.constant(v) for n, v in inputs.items()}
            ).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Service(), server
    )
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    yield f"{LOOPBACK}:{port}"
    server.stop(grace=None).wait(timeout=10)


def test_request_fits_the_signature(served, signature):
    assert served.request["signature_name"] == export.SIGNATURE
    _, inputs = signature.structured_input_signature
    for row in served.request["instances"]:
        assert set(row) == set(inputs)
    assert inputs["image"].shape.is_compatible_with(served.images.shape)
    # Images a student of the examples expects, and exact in float32.
    assert served.images.min() == 0 and served.images.max() == 1
    np.testing.assert_array_equal(served.images * 8, np.round(served.images * 8))
    served.check(signature(image=tf.constant(served.images)))


def test_rest_client(served, client, rest_address):
    served.check(client.predict_rest(rest_address, served.request, "student"))


def test_grpc_client(served, client, grpc_address):
    served.check(client.predict_grpc(grpc_address, served.request, "student"))


def test_client_prints_one_line_per_image(
    served, client, rest_address, monkeypatch, capsys, pytestconfig
):
    request = pytestconfig.rootpath / "serving" / "request.json"
    arguments = ["client.py", "--request", str(request), "--rest", rest_address]
    monkeypatch.setattr("sys.argv", arguments)
    client.main()
    classes = served.logits.argmax(-1)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed] == [f"class {c}" for c in classes]
