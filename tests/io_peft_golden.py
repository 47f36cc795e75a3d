#!/usr/bin/env python3
"""Golden LoRA adapters in PEFT's layout, written with NumPy alone.

io_peft_golden.py DIR   for every case NAME a folder DIR/NAME: adapter_config.json, adapter_model.safetensors, and for a
                        layer's q, k, v and down projection the weights w.<module>, inputs x.<module> and outputs
                        y.<module> = (W + s B A) x of a Hugging Face model (fp32, C order), and cases.txt with
                        NAME heads kv_heads head_size
"""

import json
import os
import struct
import sys

import numpy as np


def bf16(a):
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, kind):
    head, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = {"F32": t, "F16": t.astype(np.float16), "BF16": bf16(t)}[kind].tobytes()
        head[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def rounded(a, kind):
    if kind == "F16":
        return a.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        return (bf16(a).astype(np.uint32) << 16).view(np.float32)
    return a


def main(folder):
    rng = np.random.default_rng(5)
    heads, kv_heads, size, dim, ffn, tokens = 4, 2, 6, 24, 20, 3
    cases = []
    for kind in ("F32", "F16", "BF16"):
        for rslora in (False, True):
            name = f"{kind}{'_rslora' if rslora else ''}"
            cases.append(f"{name} {heads} {kv_heads} {size}")
            path = os.path.join(folder, name)
            os.makedirs(path)
            r, alpha = 5, 12
            shapes = {
                "self_attn.q_proj": (heads * size, dim),
                "self_attn.k_proj": (kv_heads * size, dim),
                "self_attn.v_proj": (kv_heads * size, dim),
                "mlp.down_proj": (dim, ffn),
            }
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": r,
                "lora_alpha": alpha,
                "lora_dropout": 0.05,
                "bias": "none",
                "use_rslora": rslora,
                "base_model_name_or_path": "somewhere/model",
                "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
                "inference_mode": True,
                "rank_pattern": {"k_proj": 3},
                "alpha_pattern": {"model.layers.0.mlp.down_proj": 7},
            }
            tensors = {}
            for module, (n, k) in shapes.items():
                rank = 3 if "k_proj" in module else r
                a = rounded(rng.normal(size=(rank, k)).astype(np.float32), kind)
                b = rounded(rng.normal(size=(n, rank)).astype(np.float32), kind)
                w = rng.normal(size=(n, k)).astype(np.float32)
                x = rng.normal(size=(k, tokens)).astype(np.float32)
                top = 7 if "down" in module else alpha
                scale = top / (np.sqrt(rank) if rslora else rank)
                y = w.astype(np.float64) @ x + scale * (b.astype(np.float64) @ (a.astype(np.float64) @ x))
                full = f"model.layers.0.{module}"
                tensors[f"base_model.model.{full}.lora_A.weight"] = a
                tensors[f"base_model.model.{full}.lora_B.weight"] = b
                for letter, m in (("w", w), ("x", x), ("y", y.astype(np.float32))):
                    m.tofile(os.path.join(path, f"{letter}.{full}"))
            write_safetensors(os.path.join(path, "adapter_model.safetensors"), tensors, kind)
            with open(os.path.join(path, "adapter_config.json"), "w") as f:
                json.dump(config, f)
    with open(os.path.join(folder, "cases.txt"), "w") as f:
        f.write("\n".join(cases) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
