"""Runs a saved Core ML package with NumPy, anywhere: what the program in it computes, weights as they are stored.

    package = load_package(Path("dist/ios/tiny_rn_text.mlpackage"))
    package.run({"input_ids": input_ids})["text_embeds"]

A check of the program and of its weights, not of Apple's hardware: every operation is computed in float32 and rounded
to the type the program gives its output, where a Neural Engine may round, fuse and accumulate otherwise.
Neither coremltools nor protobuf is needed.
"""

from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.package import Package, load_package

__all__ = ["Package", "UnusablePackage", "load_package"]
