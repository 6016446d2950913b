"""The loads of experts as a small picture for TensorBoard, without a library for pictures: a run need not have one.

Dimensions: L mixture-of-experts layers, E experts, H and W pixels, C=3 (red, green, blue).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

MAX_WIDTH = 768  # pixels, where there are not more experts
LIMIT = 2.0  # the load over the mean from which on, and below whose inverse, a color is full
_BUSY_C, _IDLE_C = np.array([178, 24, 43]), np.array([33, 102, 172])


def load_image(load_LE: np.ndarray) -> np.ndarray:
    """A cell an expert, a row a layer: white at the layer's mean, red above it, blue below; uint8 [H, W, C]."""
    load_LE = np.asarray(load_LE, np.float64)
    share_LE = load_LE / np.maximum(load_LE.mean(-1, keepdims=True), 1e-9)
    far_LE = np.log(np.clip(share_LE, 1 / LIMIT, LIMIT)) / np.log(LIMIT)  # -1 to 1
    full_LEC = np.where(far_LE[..., None] > 0, _BUSY_C, _IDLE_C)
    color_LEC = 255 + (full_LEC - 255) * np.abs(far_LE)[..., None]
    cell = max(1, min(24, MAX_WIDTH // load_LE.shape[1]))
    return np.repeat(np.repeat(color_LEC.round().astype(np.uint8), cell, 0), cell, 1)


def encode_png(image_HWC: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 3] (ISO 15948: signature, header, one compressed block of rows, end)."""
    height, width, _ = image_HWC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image_HWC)  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a color, red green blue
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
