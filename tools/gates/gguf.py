"""Reads a GGUF file: metadata, and tensors brought back to float32.

Only the types that the one file read here may hold: F32, F16, Q4_1, Q8_0.
"""

import struct

import numpy as np

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NAMES = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
# Values in a block and its fields, in the order of the file.
BLOCKS = {
    "F32": (1, [("w", "<f4")]),
    "F16": (1, [("w", "<f2")]),
    "Q4_1": (32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    "Q8_0": (32, [("d", "<f2"), ("q", "i1", 32)]),
}


class Reader:
    """The file's header at hand, its tensors on demand."""

    def __init__(self, path):
        self.bytes = np.memmap(path, np.uint8, "r")
        self.at = 0
        magic, version = self.take(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise SystemExit(f"{path} is not a GGUF file of version 2 or 3")
        tensors, keys = self.number("Q"), self.number("Q")
        self.metadata = {}
        for _ in range(keys):
            key = self.string()
            self.metadata[key] = self.value(self.number("I"))
        self.infos = {}
        for _ in range(tensors):
            name = self.string()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            self.infos[name] = (shape[::-1], self.number("I"), self.number("Q"))
        align = self.metadata.get("general.alignment", 32)
        self.data = -(-self.at // align) * align

    def take(self, count):
        self.at += count
        return self.bytes[self.at - count : self.at].tobytes()

    def number(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def string(self):
        return self.take(self.number("Q")).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(count)]
        return self.number(SCALARS[kind])

    def tensor(self, name):
        """A tensor in float32."""
        shape, kind, offset = self.infos[name]
        if kind not in NAMES:
            raise SystemExit(f"{name} has the type {kind}, which is not read here")
        size, fields = BLOCKS[NAMES[kind]]
        count = int(np.prod(shape)) // size
        start = self.data + offset
        layout = np.dtype(fields)
        blocks = self.bytes[start : start + count * layout.itemsize].view(layout)
        return widened(NAMES[kind], blocks).reshape(shape)


def widened(kind, blocks):
    """Blocks to float32, with the operations in ggml's order."""
    if kind in ("F32", "F16"):
        return blocks["w"].astype(np.float32)
    step = blocks["d"].astype(np.float32)[:, None]
    if kind == "Q8_0":
        return blocks["q"] * step
    # The low nibbles are the first half of a block.
    codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32)
    return codes * step + blocks["m"].astype(np.float32)[:, None]
