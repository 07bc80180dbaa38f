"""`DPTranscriber`: teacher, student and generator in one Keras model."""

from dp_transcribe.transcriber.model import DPTranscriber

__all__ = ["DPTranscriber"]
