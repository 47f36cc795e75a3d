#!/usr/bin/env python3
"""Golden GPTQ and AWQ checkpoints, packed one code at a time with NumPy alone.

io_checkpoint_golden.py DIR   for every case NAME: NAME.safetensors, NAME.json (its config), NAME.values (the weights that
                              it stands for, outputs x inputs, fp32), and cases.txt with the names
"""

import json
import struct
import sys

import numpy as np

TYPES = {"int32": "I32", "float16": "F16", "float32": "F32", "uint16": "BF16"}


def write_safetensors(path, tensors):
    head, data = {}, b""
    for name, t in tensors.items():
        raw = np.ascontiguousarray(t).tobytes()
        head[name] = {
            "dtype": TYPES[str(t.dtype)],
            "shape": list(t.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def pack_stream(codes, bits):
    """Codes along axis 0 to int32 words: code i has bits i*bits ... of a stream, lowest first."""
    n, width = codes.shape
    out = np.zeros((n * bits // 32, width), np.uint32)
    for column in range(width):
        stream = 0
        for i in range(n):
            stream |= int(codes[i, column]) << (i * bits)
        for w in range(out.shape[0]):
            out[w, column] = stream >> (32 * w) & 0xFFFFFFFF
    return out.view(np.int32)


def pack_3bit_as_autogptq(codes):
    """AutoGPTQ's own description of 3 bits: ten codes, one in two parts, ten, one in two parts, ten."""
    n, width = codes.shape
    out = np.zeros((n * 3 // 32, width), np.uint64)
    row = i = 0
    c = codes.astype(np.uint64)
    while row < out.shape[0]:
        for j in range(10):
            out[row] |= c[i + j] << np.uint64(3 * j)
        out[row] |= (c[i + 10] & 3) << np.uint64(30)
        out[row + 1] |= c[i + 10] >> np.uint64(2)
        for j in range(10):
            out[row + 1] |= c[i + 11 + j] << np.uint64(3 * j + 1)
        out[row + 1] |= (c[i + 21] & 1) << np.uint64(31)
        out[row + 2] |= c[i + 21] >> np.uint64(1)
        for j in range(10):
            out[row + 2] |= c[i + 22 + j] << np.uint64(3 * j + 2)
        row += 3
        i += 32
    return out.astype(np.uint32).view(np.int32)


def gptq(rng, bits, inputs, outputs, group, version, symmetric=False, act_order=False, scale="float16"):
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = rng.integers(0, 2**bits, (groups, outputs))
    zeros[0, :2] = [0, 2**bits - 1]  # the corners: version 1 stores 0 as the highest code
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = rng.standard_normal((groups, outputs)).astype(np.float32) * 0.01
    stored_scales = scales.astype(np.float16)
    if scale == "float32":
        stored_scales = scales
    if scale == "bfloat16":
        stored_scales = (scales.view(np.uint32) >> 16).astype(np.uint16)
    exact = stored_scales.astype(np.float32)
    if scale == "bfloat16":
        exact = (stored_scales.astype(np.uint32) << 16).view(np.float32)
    g_idx = np.arange(inputs) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    words = pack_stream(codes, bits)
    if bits == 3:
        assert (words == pack_3bit_as_autogptq(codes)).all()
    tensors = {
        "layer.qweight": words,
        "layer.qzeros": np.ascontiguousarray(pack_stream(stored.T, bits).T),
        "layer.scales": stored_scales,
        "layer.g_idx": g_idx.astype(np.int32),
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": act_order,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    values = exact[g_idx] * (codes - zeros[g_idx]).astype(np.float32)
    return tensors, config, values.T


def awq(rng, inputs, outputs, group, symmetric=False):
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = np.full((groups, outputs), 8) if symmetric else rng.integers(0, 16, (groups, outputs))
    scales = (rng.standard_normal((groups, outputs)) * 0.01).astype(np.float16)

    def pack(x):
        out = np.zeros((x.shape[0], outputs // 8), np.uint32)
        for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            out |= x[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return out.view(np.int32)

    g = np.arange(inputs) // size
    values = scales.astype(np.float32)[g] * (codes - zeros[g]).astype(np.float32)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    tensors = {"layer.qweight": pack(codes), "layer.qzeros": pack(zeros), "layer.scales": scales}
    return tensors, config, values.T


def main(folder):
    rng = np.random.default_rng(5)
    cases = {}
    for bits in (2, 3, 4, 8):
        for version in (1, 2):
            name = f"gptq{bits}v{version}"
            cases[name] = gptq(rng, bits, 128, 32, 32, version)
            cases[name + "sym"] = gptq(rng, bits, 128, 64, 64, version, symmetric=True)
            cases[name + "act"] = gptq(rng, bits, 160, 32, 64, version, act_order=True)
            cases[name + "row"] = gptq(rng, bits, 96, 32, -1, version)
    cases["gptq4f32"] = gptq(rng, 4, 64, 16, 16, 1, scale="float32")
    cases["gptq4bf16"] = gptq(rng, 4, 64, 16, 32, 2, scale="bfloat16", act_order=True)
    cases["gptq4one"] = gptq(rng, 4, 8, 8, -1, 1)
    cases["awq"] = awq(rng, 128, 40, 32)
    cases["awqsym"] = awq(rng, 80, 8, 64, symmetric=True)
    cases["awqrow"] = awq(rng, 7, 16, -1)
    for name, (tensors, config, values) in cases.items():
        write_safetensors(f"{folder}/{name}.safetensors", tensors)
        with open(f"{folder}/{name}.json", "w") as f:
            json.dump(config, f)
        values.astype(np.float32).tofile(f"{folder}/{name}.values")
    with open(f"{folder}/cases.txt", "w") as f:
        f.write("\n".join(cases) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
