#!/usr/bin/env python3
"""Golden data for the GGUF tests, made with the PyPI package gguf at test time.

io_golden.py blocks DIR   what gguf.quants decodes and encodes, from random and hostile inputs
io_golden.py write FILE   a GGUF file by gguf.GGUFWriter, with every metadata type
io_golden.py read FILE DIR  opens FILE with gguf.GGUFReader: prints its metadata, dumps its decoded tensors
"""

import os
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

np.seterr(all="ignore")
DECODED = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
ENCODED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


def hostile_halves(rng, n):
    """fp16 bit patterns: ordinary ones, subnormals, zeros of both signs, Inf, NaN."""
    special = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01], np.uint16)
    out = rng.integers(0, 65536, n).astype(np.uint16)
    pick = rng.random(n) < 0.3
    out[pick] = rng.choice(special, pick.sum())
    return out


def blocks(folder):
    rng = np.random.default_rng(20240607)
    for name in DECODED:
        kind = T[name]
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        count = 512 if size == 256 else 4096
        raw = rng.integers(0, 256, (count, nbytes)).astype(np.uint8)
        if size > 1:
            places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,))
            for at in places:
                raw[: count // 2, at : at + 2] = hostile_halves(rng, count // 2).reshape(-1, 1).view(np.uint8)
        raw.tofile(f"{folder}/{name}.raw")
        gguf.quants.dequantize(raw.reshape(1, -1), kind).astype(np.float32).tofile(f"{folder}/{name}.decoded")

    cases = [rng.standard_normal(32 * 6000) * 0.05]
    # Every magnitude that fits, down to fp32 subnormals, block by block.
    cases.append((rng.standard_normal((3000, 32)) * np.exp2(rng.uniform(-149, 14, (3000, 1)))).ravel())
    # Ties and integers: whole and half steps of a scale that is a power of two.
    cases.append(rng.integers(-254, 255, 32 * 2000) / 2.0)
    step = rng.integers(-16, 17, (2000, 32)) / 2.0
    step[:, 0] = -8
    cases.append((step * np.exp2(rng.integers(-10, 10, (2000, 1)))).ravel())
    ramp = rng.integers(0, 31, (2000, 32)) / 2.0
    ramp[:, 0], ramp[:, 1] = 0, 15
    cases.append((ramp * np.exp2(rng.integers(-10, 10, (2000, 1))) + 3).ravel())
    # Constant blocks, zeros of one sign, one spike, equal extremes of both signs (the first one wins).
    for value in (0.0, -0.0, 1.5, -1.5, 65504.0, -65504.0, 1e-45, 1e-38, 6e-8, 3e-8):
        cases.append(np.full(32, value))
    spike = np.zeros((64, 32))
    spike[np.arange(64), np.arange(64) % 32] = np.linspace(-700, 700, 64)
    cases.append(spike.ravel())
    pair = np.zeros((64, 32))
    pair[:, 3], pair[:, 17] = 2.0, -2.0
    pair[32:] *= -1
    cases.append(pair.ravel())
    x = np.concatenate([np.asarray(c, np.float64) for c in cases]).astype(np.float32)
    x.tofile(f"{folder}/input.f32")
    wide = rng.integers(0, 2**32, 32 * 4000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    wide[:4] = [np.inf, -np.inf, np.nan, -0.0]
    wide.tofile(f"{folder}/wide.f32")
    for name in ENCODED:
        gguf.quants.quantize(x.reshape(1, -1), T[name]).tofile(f"{folder}/{name}.encoded")
        if gguf.GGML_QUANT_SIZES[T[name]][0] == 1:
            gguf.quants.quantize(wide.reshape(1, -1), T[name]).tofile(f"{folder}/{name}.wide")


def write(path):
    rng = np.random.default_rng(7)
    w = gguf.GGUFWriter(path, "test")
    w.add_uint8("a.u8", 255)
    w.add_int8("a.i8", -128)
    w.add_uint16("a.u16", 65535)
    w.add_int16("a.i16", -32768)
    w.add_uint32("a.u32", 4294967295)
    w.add_int32("a.i32", -2147483648)
    w.add_uint64("a.u64", 2**64 - 1)
    w.add_int64("a.i64", -(2**63))
    w.add_float32("a.f32", 1.25)
    w.add_float64("a.f64", -1e300)
    w.add_bool("a.yes", True)
    w.add_bool("a.no", False)
    w.add_string("a.text", "gr\u00fc\u00df dich \U0001f44b")
    w.add_array("a.words", ["one", "", "dr\u00e9i"])
    w.add_array("a.ints", [1, -2, 3])
    w.add_array("a.floats", [0.5, -0.25])
    w.add_array("a.bools", [True, False, True])
    w.add_custom_alignment(64)
    for name in ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]:
        x = rng.standard_normal((3, 64)).astype(np.float32)
        data = gguf.quants.quantize(x, T[name])
        if name in ("F32", "F16"):
            w.add_tensor(f"t.{name}", data)
        else:
            w.add_tensor(f"t.{name}", data, raw_dtype=T[name])
    w.add_tensor("vector", np.arange(5, dtype=np.float32))
    w.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read(path, folder):
    reader = gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        kinds = ",".join(t.name.lower() for t in field.types)
        value = field.contents()
        # Numbers as exact bits: floats by their hexadecimal form.
        def text(v):
            return float(v).hex() if isinstance(v, float) else v if isinstance(v, str) else str(int(v))
        values = [text(v) for v in value] if isinstance(value, list) else [text(value)]
        print(f"{key}|{kinds}|{'/'.join(values)}")
    for i, tensor in enumerate(reader.tensors):
        dims = "x".join(str(d) for d in tensor.shape.tolist())
        print(f"tensor {tensor.name}|{tensor.tensor_type.name}|{dims}")
        data = np.ascontiguousarray(tensor.data)
        gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32).tofile(os.path.join(folder, f"{i}.f32"))


if __name__ == "__main__":
    {"blocks": blocks, "write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
