"""`python -m onnxprune.cli`, the same as `onnxprune`."""

from onnxprune.cli import main

main()
