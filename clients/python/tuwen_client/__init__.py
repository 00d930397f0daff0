"""Client of a Tuwen server: Chinese text and images to embeddings in one space, over gRPC.

from tuwen_client import Client
Client("localhost:8001").embed_text(["戴墨镜的笑脸"])
"""

from tuwen_client.aio import AsyncClient
from tuwen_client.answers import Classes, Scores
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
from tuwen_client.options import RetryPolicy, Tls

__all__ = [
    "AsyncClient",
    "Classes",
    "Client",
    "DeadlineExceeded",
    "ImageLike",
    "InvalidInput",
    "ModelChanged",
    "ModelNotFound",
    "Overloaded",
    "RetryPolicy",
    "Scores",
    "ServerUnavailable",
    "Tls",
    "TuwenError",
]
__version__ = "0.1.0"
