"""`import tensorrt` over the bindings that PyPI has, and the libnvinfer that Triton's image has.

NVIDIA's own package of this name is a source distribution that would bring a second libnvinfer of several GB.
"""

from tensorrt_bindings import *  # noqa: F403
from tensorrt_bindings import __version__  # noqa: F401
