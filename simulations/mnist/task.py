"""MNIST as a task of one's own: one file outside the package, read from the four ``idx`` files as they are published.

The pixels stay bytes, 0 to 255; the model scales them itself, so that an exported model takes what a scanner gives.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["Mnist"]

_UNSIGNED_BYTE = 0x08


class Mnist(Task):
    """Tell the digit on a 28×28 image, with a small convolutional network (10,586 parameters)."""

    label_names = tuple("0123456789")

    def build_model(self) -> nn.Module:
        """Return two strided convolutions and a linear layer."""
        return nn.Sequential(
            _Scale(),
            nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(784, 10),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every image."""
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every digit told rightly, else 0."""
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def load_pool(self, path: Path | None) -> Pool:
        """Return the 60,000 training images.

        Raises:
            DataError: no path is given, or a file is missing or not what it should be.
        """
        return Pool(train=_images(_given(path), "train"))

    def load_test(self, path: Path | None) -> Examples:
        """Return the 10,000 test images."""
        return _images(_given(path), "t10k")

    def load_local(self, path: Path) -> ClientData:
        """Return a device's own images, from a folder with two files named and built like MNIST's training set."""
        return ClientData(_images(path, "train"))


class _Scale(nn.Module):
    """Bring bytes to about mean 0 and deviation 1; the two numbers are of the data set, to two digits."""

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - 33.0) / 79.0


def _given(path: Path | None) -> Path:
    """Return the path, or say that it is needed."""
    if path is None:
        raise DataError("mnist needs its folder: --set data.path=FOLDER, the one with train-images-idx3-ubyte.gz")
    return path


def _images(folder: Path, part: str) -> Examples:
    """Return the images and labels of one part, checked against each other."""
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{folder}: images of {images.shape[1]}×{images.shape[2]} where 28×28 are expected")
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels in the {part} files")
    if len(labels) and labels.max() > 9:
        raise DataError(f"{folder}: a label is {labels.max()}; 0 to 9 are expected")
    return Examples(torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64)))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array in a gzipped idx file of unsigned bytes, as a writable copy."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise DataError(f"{path}: is no idx file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=dimensions, offset=4))
    if len(data) != start + math.prod(shape):
        raise DataError(f"{path}: holds {len(data) - start} bytes where {shape} needs {math.prod(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()
