"""Images to train on: Fashion-MNIST, other data in its format, or random ones."""

import dataclasses
import gzip
import math
import zlib
from pathlib import Path

import jax
import numpy as np

# Folder of the Debian package dataset-fashion-mnist.
FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28
CLASSES = 10
_UNSIGNED_BYTES = 8  # type code in the third byte of an IDX file


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images (n, 28, 28) and their labels (n,), both uint8."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen])


def load_images(folder: Path | None, least: int) -> tuple[Images, Images]:
    """Loads the training and the test images.

    Args:
      folder: with four IDX files, gzipped or not; None for Debian's.
      least: smallest number of images that each part must have.

    Returns:
      60,000 and 10,000 images, if they are Fashion-MNIST.

    Raises:
      ValueError: for a file that is missing, damaged or something else.
    """
    folder = FOLDER if folder is None else folder
    return _part(folder, "train", least), _part(folder, "t10k", least)


def random_images(train: int, test: int) -> tuple[Images, Images]:
    """Makes images to try a program with: one random image per class, plus noise."""
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 256, (CLASSES, SIDE, SIDE))

    def part(number):
        labels = generator.integers(0, CLASSES, number, np.uint8)
        noise = generator.integers(0, 256, (number, SIDE, SIDE))
        return Images(((classes[labels] + noise) // 2).astype(np.uint8), labels)

    return part(train), part(test)


def _part(folder, name, least):
    pixels_path = _path(folder, f"{name}-images-idx3-ubyte")
    labels_path = _path(folder, f"{name}-labels-idx1-ubyte")
    images = Images(read_idx(pixels_path), read_idx(labels_path))
    shape = images.pixels.shape
    if len(shape) != 3 or shape[1:] != (SIDE, SIDE):
        raise _wrong(pixels_path, f"images of {SIDE} x {SIDE}", f"shape {shape}")
    if images.labels.shape != shape[:1]:
        rule = f"a label for each of {shape[0]} images"
        raise _wrong(labels_path, rule, f"shape {images.labels.shape}")
    if shape[0] < least:
        raise _wrong(pixels_path, f"at least {least} images", f"{shape[0]}")
    if images.labels.max() >= CLASSES:
        rule = f"labels from 0 to {CLASSES - 1}"
        raise _wrong(labels_path, rule, f"{images.labels.max()}")
    return images


def _path(folder, name):
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(
        f"`--data` must be a folder with Fashion-MNIST's four IDX files; got "
        f"{str(folder)!r} without {name}.gz. Install the Debian package "
        f"dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or name the "
        f"folder that has them. --tiny does without."
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads the array in an IDX file of bytes, gzipped or not.

    Raises:
      ValueError: for a file that is damaged or something else.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _wrong(path, "a whole gzip file", str(error)) from error
    # An IDX file: two zeros, the type, the number of axes, their lengths, the bytes.
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
        raise _wrong(path, "an IDX file of bytes", f"it begins with {content[:4]!r}")
    begin = 4 + 4 * content[3]
    lengths = (content[i : i + 4] for i in range(4, begin, 4))
    shape = tuple(int.from_bytes(length, "big") for length in lengths)
    values = np.frombuffer(content[begin:], np.uint8)
    if len(content) < begin or values.size != math.prod(shape):
        rule = f"a whole IDX file of shape {shape}"
        raise _wrong(path, rule, f"{values.size} bytes")
    return values.reshape(shape)


def _wrong(path, rule, value):
    return ValueError(
        f"`--data` must have {rule} in {path.name}; got {value}, in "
        f"{str(path.parent)!r}. Get the file again, or name another folder."
    )
