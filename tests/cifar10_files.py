"""Small files in the formats of CIFAR-10, and what they hold."""

import io
import pickle
import struct
import tarfile

import numpy as np

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings: as in the official files."""

    def _string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = pickle._Pickler.dispatch | {bytes: _string, str: _string}


def python2(value):
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python3(value):
    return pickle.dumps(value, protocol=2)


def examples(name, count=12):
    """The pixels and the labels of a file."""
    rng = np.random.default_rng(NAMES.index(name))
    pixels = rng.integers(256, size=(count, 3072), dtype=np.uint8)
    return pixels, rng.integers(10, size=count)


def official_files(version):
    """The contents of all files: `version` is "binary" or writes a pickle."""
    files = {}
    for name in NAMES:
        pixels, labels = examples(name)
        if version == "binary":
            records = np.hstack([labels[:, None].astype(np.uint8), pixels])
            files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
        else:
            batch = {
                b"batch_label": name.encode(),
                b"labels": labels.tolist(),
                b"data": pixels,
                b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * 12,
            }
            files[f"cifar-10-batches-py/{name}"] = version(batch)
    return files


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_archive(path, files, name="cifar.tar.gz", mode="w:gz"):
    with tarfile.open(path / name, mode) as archive:
        for member_name, content in files.items():
            member = tarfile.TarInfo(member_name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path / name


def write_unzipped_archive(path, files):
    return write_archive(path, files, "cifar.tar", "w")


def expected(names, labels=range(10), size=None):
    """Pixel by pixel, from the description of the format."""
    parts = [examples(name) for name in names]
    pixels, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    kept = [i for i, label in enumerate(numbers) if label in labels][:size]
    pixels = pixels[kept].reshape(-1, 3, 32, 32) / 255
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    channels = [(pixels[:, c] - mean[c]) / deviation[c] for c in range(3)]
    one_hot = [[float(label == numbers[i]) for label in labels] for i in kept]
    return np.stack(channels, axis=-1), np.array(one_hot)
