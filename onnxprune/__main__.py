"""`python -m onnxprune`, the same as `onnxprune`."""

from onnxprune.cli import main

main()
