"""Codes of a few bits as streams of bits, least significant first, rows padded to whole 32-bit words."""

from __future__ import annotations

import numpy as np

UNUSED = 255  # in the place of a salient weight's position
MIDDLE = 128  # of the values of salient weights


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [rows, n] below 2^bits → packed uint8 [rows, 4·⌈n·bits/32⌉]."""
    rows, count = codes.shape
    bit_planes = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    packed = np.packbits(bit_planes.reshape(rows, count * bits), axis=1, bitorder="little")
    padded = np.zeros((rows, 4 * -(-count * bits // 32)), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """packed uint8 [rows, 4·⌈count·bits/32⌉] → uint8 codes [rows, count]."""
    bit_planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    return np.packbits(bit_planes.reshape(len(packed), count, bits), axis=2, bitorder="little")[:, :, 0]
