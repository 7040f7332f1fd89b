"""A classifier behind FastAPI that stores its answers in Redis, as a team would write it today.

The model is the memo's raw-pixel one, as scikit-learn's LinearSVC with the same weights, so that
both give the same labels. MODEL and REDIS are environment variables: the safetensors file, and
Redis' URL.
"""

import hashlib
import json
import os
import struct

import numpy as np
import redis.asyncio as redis
from fastapi import FastAPI, HTTPException, Request, Response
from sklearn.svm import LinearSVC

IMAGE_BYTES = 784


def read_model(path):
    """The weights of a linear model file, and what to divide pixels by."""
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def tensor(name):
        begin, end = header[name]["data_offsets"]
        return np.frombuffer(body[begin:end], dtype="<f4").reshape(header[name]["shape"])

    svm = LinearSVC()
    svm.coef_, svm.intercept_ = tensor("svm.weights"), tensor("svm.intercepts")
    svm.classes_ = np.arange(len(svm.intercept_))
    svm.n_features_in_ = svm.coef_.shape[1]
    return svm, float(tensor("pixels.divisor")[0])


model, divisor = read_model(os.environ["MODEL"])
# The client's own limit of 100 connections would fail the 101st of as many concurrent requests.
store = redis.from_url(os.environ["REDIS"], protocol=3, max_connections=4096)
app = FastAPI()


@app.post("/classify")
async def classify(request: Request):
    pixels = await request.body()
    if len(pixels) != IMAGE_BYTES:
        raise HTTPException(400, f"image is {len(pixels)} bytes; the model takes {IMAGE_BYTES}")
    key = hashlib.blake2b(pixels, digest_size=16).digest()
    label = await store.get(key)
    memoized = label is not None
    if not memoized:
        image = np.frombuffer(pixels, dtype=np.uint8).reshape(1, -1).astype(np.float32)
        label = str(int(model.predict(image / divisor)[0])).encode()
        await store.set(key, label)
    # By hand: FastAPI's own encoding of a dict costs a third of the whole request.
    body = b'{"label":%b,"memoized":%b}' % (label, b"true" if memoized else b"false")
    return Response(body, media_type="application/json")
