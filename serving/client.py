"""Asks a served student for predictions, by REST or gRPC.

python serving/client.py --request serving/request.json
python serving/client.py --request serving/request.json --grpc localhost:8500
"""

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any


def predict_rest(address: str, request: dict[str, Any], model: str) -> dict[str, Any]:
    """Posts `request` to TensorFlow Serving's REST interface at `host:port`.

    Returns:
        For every output its values, one per image.
    """
    posted = urllib.request.Request(
        f"http://{address}/v1/models/{model}:predict",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(posted, timeout=30) as answer:
        predictions = json.load(answer)["predictions"]
    return {name: [row[name] for row in predictions] for name in predictions[0]}


def predict_grpc(address: str, request: dict[str, Any], model: str) -> dict[str, Any]:
    """Sends the same request to the gRPC interface; needs the extra `serving`."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    images = [instance["image"] for instance in request["instances"]]
    message = predict_pb2.PredictRequest()
    message.model_spec.name = model
    message.model_spec.signature_name = request["signature_name"]
    message.inputs["image"].CopyFrom(tf.make_tensor_proto(images, tf.float32))
    with grpc.insecure_channel(address) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        answer = service.Predict(message, timeout=30)
    return {name: tf.make_ndarray(answer.outputs[name]) for name in answer.outputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--request", type=Path, required=True)
    parser.add_argument("--model", default="student")
    parser.add_argument("--rest", default="localhost:8501", metavar="HOST:PORT")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="ask by gRPC instead")
    flags = parser.parse_args()
    request = json.loads(flags.request.read_text(encoding="utf-8"))
    if flags.grpc:
        answer = predict_grpc(flags.grpc, request, flags.model)
    else:
        answer = predict_rest(flags.rest, request, flags.model)
    for label, probabilities in zip(
        answer["class"], answer["probabilities"], strict=True
    ):
        print(f"class {label}, probability {max(probabilities):.3f}")


if __name__ == "__main__":
    main()
