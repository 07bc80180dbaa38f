"""Mechanisms: everything that lets an answer of the teacher out."""
