"""A client for Afterimage services: memo, classifier and cache.

    with afterimage.Client("localhost", 7400) as client:
        print(client.classify(image).label)         # one image
        labels = client.classify_many(images)       # many images, pipelined
"""

from .client import Client
from .protocol import AfterimageError, Failed, Label, Lost, Malformed, Snapshot, Welcome

__all__ = ["AfterimageError", "Client", "Failed", "Label", "Lost", "Malformed", "Snapshot", "Welcome"]
__version__ = "0.1.0"
