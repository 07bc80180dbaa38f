"""TensorFlow's C API, below which TensorFlow Serving loads the same folder."""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2


class Buffer(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t), ("deallocator", c_void_p)]


class Output(ctypes.Structure):
    _fields_ = [("operation", c_void_p), ("index", c_int)]


NEEDED = {
    "TF_NewStatus": ([], c_void_p),
    "TF_GetCode": ([c_void_p], c_int),
    "TF_Message": ([c_void_p], c_char_p),
    "TF_NewGraph": ([], c_void_p),
    "TF_NewSessionOptions": ([], c_void_p),
    "TF_NewBuffer": ([], POINTER(Buffer)),
    "TF_LoadSessionFromSavedModel": (
        [c_void_p, c_void_p, c_char_p, POINTER(c_char_p), c_int, c_void_p]
        + [POINTER(Buffer), c_void_p],
        c_void_p,
    ),
    "TF_GraphOperationByName": ([c_void_p, c_char_p], c_void_p),
    "TF_AllocateTensor": ([c_int, POINTER(c_int64), c_int, c_size_t], c_void_p),
    "TF_TensorData": ([c_void_p], c_void_p),
    "TF_TensorByteSize": ([c_void_p], c_size_t),
    "TF_NumDims": ([c_void_p], c_int),
    "TF_Dim": ([c_void_p, c_int], c_int64),
    "TF_SessionRun": (
        [c_void_p, c_void_p, POINTER(Output), POINTER(c_void_p), c_int]
        + [POINTER(Output), POINTER(c_void_p), c_int]
        + [c_void_p, c_int, c_void_p, c_void_p],
        None,
    ),
    "TF_CloseSession": ([c_void_p, c_void_p], None),
    "TF_DeleteSession": ([c_void_p, c_void_p], None),
}


@pytest.fixture(scope="module")
def library():
    """The shared library of TensorFlow's own wheel, with the calls declared."""
    found = sorted(Path(tf.sysconfig.get_lib()).glob("libtensorflow_cc.*"))
    loaded = ctypes.CDLL(str(found[0]))
    for name, (arguments, result) in NEEDED.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, result
    return loaded


class Session:
    """A SavedModel loaded by the C library, with its serving signature."""

    def __init__(self, library, folder: Path) -> None:
        self._c = library
        self._status = library.TF_NewStatus()
        self._graph = library.TF_NewGraph()
        meta_graph = library.TF_NewBuffer()
        self._session = library.TF_LoadSessionFromSavedModel(
            *(library.TF_NewSessionOptions(), None, str(folder).encode()),
            *((c_char_p * 1)(b"serve"), 1, self._graph, meta_graph, self._status),
        )
        self._check()
        content = ctypes.string_at(meta_graph.contents.data, meta_graph.contents.length)
        graph = meta_graph_pb2.MetaGraphDef.FromString(content)
        self.signature = graph.signature_def["serving_default"]

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        names = list(self.signature.outputs)
        specs = [self.signature.outputs[name] for name in names]
        answers = (c_void_p * len(names))()
        self._c.TF_SessionRun(
            *(self._session, None),
            *((Output * 1)(self._endpoint(self.signature.inputs["image"].name)),),
            *((c_void_p * 1)(self._tensor(image)), 1),
            *((Output * len(names))(*(self._endpoint(spec.name) for spec in specs)),),
            *(answers, len(names), None, 0, None, self._status),
        )
        self._check()
        return {
            name: self._array(answer, tf.as_dtype(spec.dtype).as_numpy_dtype)
            for name, answer, spec in zip(names, answers, specs, strict=True)
        }

    def close(self) -> None:
        self._c.TF_CloseSession(self._session, self._status)
        self._c.TF_DeleteSession(self._session, self._status)

    def _check(self) -> None:
        assert self._c.TF_GetCode(self._status) == 0, self._c.TF_Message(self._status)

    def _endpoint(self, name: str) -> Output:
        operation, index = name.split(":")
        found = self._c.TF_GraphOperationByName(self._graph, operation.encode())
        return Output(found, int(index))

    def _tensor(self, value: np.ndarray) -> int:
        shape = (c_int64 * value.ndim)(*value.shape)
        code = tf.as_dtype(value.dtype).as_datatype_enum
        tensor = self._c.TF_AllocateTensor(code, shape, value.ndim, value.nbytes)
        ctypes.memmove(self._c.TF_TensorData(tensor), value.tobytes(), value.nbytes)
        return tensor

    def _array(self, tensor: int, dtype: type) -> np.ndarray:
        shape = [self._c.TF_Dim(tensor, i) for i in range(self._c.TF_NumDims(tensor))]
        size = self._c.TF_TensorByteSize(tensor)
        content = ctypes.string_at(self._c.TF_TensorData(tensor), size)
        return np.frombuffer(content, dtype).reshape(shape)


def test_c_api(library, served):
    session = Session(library, served.folder)
    assert set(session.signature.inputs) == {"image"}
    served.check(session.run(served.images))
    one = session.run(served.images[:1])
    np.testing.assert_allclose(one["logits"], served.logits[:1], rtol=0, atol=1e-5)
    session.close()
