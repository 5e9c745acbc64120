"""Named arrays in one HDF5 file whose bytes are checked before HDF5 sees one. The only home of h5py.

The first 512 bytes (HDF5's user block, which its readers skip) hold the SHA-256 of the rest: HDF5 2.0 can loop for ever on one
flipped bit. So `unpack` returns what was packed or raises `CorruptFile`. A second SHA-256, over names, types and values
(`digest_of`), does not depend on the HDF5 version that wrote them.
"""
from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .files import CorruptFile

FORMAT = 1
USER_BLOCK = 512        # bytes before the HDF5 superblock
COMPRESS_BYTES = 16384  # smaller datasets are stored plain: a filter costs more than it saves


def text(value: str) -> np.ndarray:
    """As an array."""
    return np.frombuffer(value.encode(), np.uint8)


def digest_of(datasets: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, type, shape and bytes of every dataset, by name."""
    sha = hashlib.sha256()
    for name in sorted(datasets):
        array = datasets[name]
        sha.update(f"{name}|{_type(array.dtype)}|{array.shape}\n".encode())
        sha.update(memoryview(array).cast("B") if array.size else b"")
    return sha.hexdigest()


def _type(dtype: np.dtype) -> str:
    # not dtype.descr: h5py adds its own metadata to the strings it reads
    return ",".join(f"{name}:{dtype[name].str}" for name in dtype.names) if dtype.names else dtype.str


def pack(datasets: Mapping[str, np.ndarray], kind: str, digest: str, compress: bool = True) -> bytes:
    """A file of ours as bytes. Equal content gives equal bytes: no times are stored."""
    import h5py

    link, plain = h5py.h5p.create(h5py.h5p.LINK_CREATE), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    link.set_create_intermediate_group(True)
    plain.set_obj_track_times(False)
    with h5py.File.in_memory(libver="latest") as f:
        f.attrs.update({"format": FORMAT, "kind": kind, "sha256": digest})
        for name in sorted(datasets):
            array = datasets[name]
            if compress and array.nbytes > COMPRESS_BYTES:
                f.create_dataset(name, data=array, track_times=False, compression="gzip", compression_opts=1, shuffle=True)
            else:  # what create_dataset would do, in a third of its time
                h5py.h5d.create(f.id, name.encode(), h5py.h5t.py_create(array.dtype, logical=True), h5py.h5s.create_simple(array.shape),
                                dcpl=plain, lcpl=link).write(h5py.h5s.ALL, h5py.h5s.ALL, array)
        f.flush()
        image = f.id.get_file_image()
    return _user_block(kind, image) + image


def _user_block(kind: str, image: bytes | memoryview) -> bytes:
    return f"poise_hpc {kind}, format {FORMAT}, HDF5 from byte {USER_BLOCK}\nsha256 {hashlib.sha256(image).hexdigest()}\n" \
        .encode().ljust(USER_BLOCK, b"\0")


def unpack(path: Path, kind: str) -> tuple[dict[str, np.ndarray], str]:
    """(datasets, sha256 of the content) of a file of ours; CorruptFile when it is not what was written."""
    import h5py

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorruptFile(f"{path} cannot be read: {error.strerror or error}") from None
    image = memoryview(raw)[USER_BLOCK:]
    if raw[:USER_BLOCK] != _user_block(kind, image):
        raise CorruptFile(f"{path} is damaged, or no {kind} of format {FORMAT}: its {len(raw)} bytes do not match the checksum that was "
                          "written with them")
    datasets: dict[str, np.ndarray] = {}
    with h5py.File.in_memory(image) as f:
        f.visititems(lambda name, item: datasets.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        return datasets, str(f.attrs["sha256"])
