"""Client of a Tuwen server: Chinese text and images to embeddings in one space, over gRPC.

from tuwen_client import Client
Client("localhost:8001").embed_text(["戴墨镜的笑脸"])
"""

from tuwen_client.client import Client
from tuwen_client.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelChanged,
    ModelNotFound,
    Overloaded,
    ServerUnavailable,
    TuwenError,
)
from tuwen_client.images import ImageLike

__all__ = [
    "Client",
    "DeadlineExceeded",
    "ImageLike",
    "InvalidInput",
    "ModelChanged",
    "ModelNotFound",
    "Overloaded",
    "ServerUnavailable",
    "TuwenError",
]
__version__ = "0.1.0"
