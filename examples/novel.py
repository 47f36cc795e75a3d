#!/usr/bin/env python3
"""Unpacks a novel out of an R package's data, without R.

usage: novel.py FOLDER_OF_RDATA NAME OUT.txt      (e.g. .../janeaustenr/data persuasion persuasion.txt)

Rdata.rdx is an index (name -> offset and length in Rdata.rdb) and each entry a zlib-compressed object, all in R's
serialization format (R Internals, "Serialization Formats"), of which this reads what a vector of lines needs: integers,
strings, lists and attributes. The text is written one paragraph a line.
"""
import gzip
import os
import struct
import sys
import zlib


class Reader:
    """Big-endian ("X") serialization, versions 2 and 3."""

    def __init__(self, data):
        self.data, self.at = data, 2
        assert data[:2] == b"X\n", "not R's binary serialization"
        version = self.integer()
        self.at += 8  # versions of the writer and of the oldest reader
        if version == 3:
            encoding = self.integer()
            self.at += encoding
        self.symbols = []

    def integer(self):
        value = struct.unpack_from(">i", self.data, self.at)[0]
        self.at += 4
        return value

    def item(self):
        flags = self.integer()
        kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
        if kind in (254, 253, 242, 241, 251):  # nil and the other constants
            return None
        if kind == 255:  # an earlier symbol
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:  # symbol
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == 2:  # pair list: attributes
            if has_attributes:
                self.item()
            tag = self.item() if has_tag else None
            pairs = {tag: self.item()}
            pairs.update(self.item() or {})
            return pairs
        if kind == 9:  # one string
            size = self.integer()
            if size < 0:
                return None
            text = self.data[self.at:self.at + size]
            self.at += size
            return text.decode("latin-1" if flags >> 12 & 4 else "utf-8")
        if kind not in (10, 13, 14, 16, 19):
            raise ValueError(f"R object of type {kind}")
        count = self.integer()
        if kind in (10, 13):
            values = [self.integer() for _ in range(count)]
        elif kind == 14:
            values = list(struct.unpack_from(f">{count}d", self.data, self.at))
            self.at += 8 * count
        else:
            values = [self.item() for _ in range(count)]
        if has_attributes:
            names = self.item().get("names")
            if names:
                return dict(zip(names, values))
        return values


def main():
    folder, name, out = sys.argv[1:4]
    with gzip.open(os.path.join(folder, "Rdata.rdx")) as f:
        offset, length = Reader(f.read()).item()["variables"][name]
    with open(os.path.join(folder, "Rdata.rdb"), "rb") as f:
        f.seek(offset)
        entry = f.read(length)
    lines = Reader(zlib.decompress(entry[4:])).item()  # four bytes of length, then the zlib stream
    paragraphs = "\n".join(lines).split("\n\n")
    with open(out, "w", encoding="utf-8") as f:
        for paragraph in paragraphs:
            text = " ".join(paragraph.split())
            if text:
                f.write(text + "\n")


if __name__ == "__main__":
    main()
