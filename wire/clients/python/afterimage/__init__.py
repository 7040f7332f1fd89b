"""A client for Afterimage services: memo, classifier and cache.

    with afterimage.Client("localhost", 7400) as client:
        print(client.classify(image).label)         # one image
        labels = client.classify_many(images)       # many images, pipelined
        answers = client.infer("resnet", rows)      # rows: bytes or NumPy arrays
        with client.open("fold/mean") as stream:    # bytes of any length in both directions
            results = list(stream.exchange(chunks))

`afterimage.aio` is the same for asyncio.
"""

from . import aio
from .client import Client
from .protocol import (
    AfterimageError, Answer, Failed, Inference, Label, Lost, Malformed, Snapshot, Unsupported, Welcome,
)
from .stream import Stream

__all__ = [
    "AfterimageError", "Answer", "Client", "Failed", "Inference", "Label", "Lost", "Malformed", "Snapshot", "Stream",
    "Unsupported", "Welcome", "aio",
]
__version__ = "0.1.0"
