"""ONNX files as graphs: opening, saving, running, shapes."""
