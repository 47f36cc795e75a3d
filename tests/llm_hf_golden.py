#!/usr/bin/env python3
"""Makes a Hugging Face Llama folder from a GGUF, with the PyPI package gguf for reading and NumPy for all else.

llm_hf_golden.py IN.gguf OUT [type=f32|f16|bf16] [shards=N] [layers=N] [quant=gptq1|gptq2|gptq1act|gptq2sym|awq] [pairs]

With quant the linear layers of the blocks are quantized to 4 bits in groups of 32 and stored as a checkpoint; OUT-decoded
then holds the values that they stand for, in F32.
"""

import json
import os
import sys

import gguf
import numpy as np

from io_checkpoint_golden import pack_stream

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "int32": "I32", "float16": "F16"}


def write_safetensors(path, tensors):
    """tensors: name -> (dtype, shape, bytes)"""
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, raw) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(head).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, raw in tensors.values():
            f.write(raw)


def stored(x, kind):
    x = np.ascontiguousarray(x, np.float32)
    if kind == "f16":
        return "F16", x.shape, x.astype(np.float16).tobytes()
    if kind == "bf16":
        return "BF16", x.shape, (x.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return "F32", x.shape, x.tobytes()


def unpermuted(w, heads):
    """GGUF's rows of q and k back to Hugging Face's: the reverse of llama.cpp's permute()."""
    n, k = w.shape
    return w.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def quantize(name, w, how):
    """-> tensors of a checkpoint, and the values that they stand for."""
    n, k = w.shape
    group = 32
    groups = -(-k // group)
    g_idx = np.arange(k) // group
    if how.endswith("act"):
        g_idx = np.random.default_rng(n * k).permutation(g_idx)
    scales = np.zeros((groups, n), np.float16)
    zeros = np.zeros((groups, n), np.int64)
    codes = np.zeros((k, n), np.int64)
    for g in range(groups):
        part = w[:, g_idx == g].astype(np.float64)
        if how.endswith("sym"):
            scale = np.maximum(np.abs(part).max(1) / 7, 1e-6).astype(np.float16)
            zero = np.full(n, 8)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = np.maximum((high - low) / 15, 1e-6).astype(np.float16)
            zero = np.clip(np.rint(-low / scale.astype(np.float64)), 0, 15).astype(np.int64)
        scales[g], zeros[g] = scale, zero
        codes[g_idx == g] = np.clip(np.rint(part / scale.astype(np.float64)[:, None]) + zero[:, None], 0, 15).T
    values = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)
    if how == "awq":
        def pack(x):
            out = np.zeros((x.shape[0], n // 8), np.uint32)
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out |= x[:, column::8].astype(np.uint32) << np.uint32(4 * i)
            return out.view(np.int32)
        out = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}
    else:
        kept = (zeros - 1) % 16 if how[4] == "1" else zeros
        out = {
            "qweight": pack_stream(codes, 4),
            "qzeros": np.ascontiguousarray(pack_stream(kept.T, 4).T),
            "scales": scales,
            "g_idx": g_idx.astype(np.int32),
        }
    tensors = {f"{name}.{part}": (TYPES[str(t.dtype)], t.shape, np.ascontiguousarray(t).tobytes()) for part, t in out.items()}
    return tensors, values.T


def tokenizer(field, pairs):
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": types[i] == 3}
        for i, t in enumerate(tokens)
        if types[i] in (3, 4)
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    out = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    if field("tokenizer.ggml.model") == "gpt2":
        merges = [m.split(" ") for m in field("tokenizer.ggml.merges")]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        out["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
        out["decoder"] = level
    else:
        # As transformers converts SentencePiece: every cut of every token, in the order of the tokens' scores.
        scores = field("tokenizer.ggml.scores")
        order = sorted((i for i in range(len(tokens)) if types[i] == 1), key=lambda i: (-scores[i], i))
        merges = []
        for i in order:
            t = tokens[i]
            merges += [[t[:c], t[c:]] for c in range(1, len(t)) if t[:c] in vocab and t[c:] in vocab]
        model["byte_fallback"], model["fuse_unk"] = True, True
        model["unk_token"] = next((t for i, t in enumerate(tokens) if types[i] == 2), None)
        out["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
        out["pre_tokenizer"] = None
        bos = tokens[field("tokenizer.ggml.bos_token_id")]
        out["post_processor"] = {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    model["vocab"] = vocab
    model["merges"] = merges if pairs else [" ".join(m) for m in merges]
    out["model"] = model
    return out


def main(source, folder, *options):
    given = dict(o.split("=") if "=" in o else (o, "1") for o in options)
    reader = gguf.GGUFReader(source)

    def field(key, otherwise=None):
        f = reader.get_field(key)
        return otherwise if f is None else f.contents()

    heads = field("llama.attention.head_count")
    kv_heads = field("llama.attention.head_count_kv", heads)
    tensors = {t.name: t for t in reader.tensors}
    layers = int(given.get("layers", field("llama.block_count")))
    kind = given.get("type", "f32")
    quant = given.get("quant")

    def value(name):
        t = tensors[name]
        return gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape([int(d) for d in reversed(t.shape)])

    names = [("token_embd.weight", "model.embed_tokens"), ("output_norm.weight", "model.norm")]
    if "output.weight" in tensors:
        names.append(("output.weight", "lm_head"))
    parts = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for i in range(layers):
        names += [(f"blk.{i}.{ours}.weight", f"model.layers.{i}.{theirs}") for ours, theirs in parts.items()]
    out, decoded = {}, {}
    for ours, theirs in names:
        x = value(ours)
        if ".attn_q." in ours:
            x = unpermuted(x, heads)
        if ".attn_k." in ours:
            x = unpermuted(x, kv_heads)
        if quant and ours.startswith("blk.") and x.ndim == 2 and x.shape[0] % 8 == 0 and x.shape[1] % 8 == 0:
            checkpoint, x = quantize(theirs, x, quant)
            out.update(checkpoint)
        else:
            out[theirs + ".weight"] = stored(x, kind)
        decoded[theirs + ".weight"] = stored(x, "f32")

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "hidden_size": field("llama.embedding_length"), "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"), "rope_scaling": None,
        "rms_norm_eps": float(field("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(field("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors, "vocab_size": len(value("token_embd.weight")),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"), "torch_dtype": "float32",
    }
    size = field("llama.attention.key_length")
    if size is not None:
        config["head_dim"] = size
    tokens = field("tokenizer.ggml.tokens")
    about = {"eos_token": tokens[field("tokenizer.ggml.eos_token_id")], "chat_template": field("tokenizer.chat_template", "")}
    for path, content in ((folder, out), (folder + "-decoded", decoded if quant else None)):
        if content is None:
            continue
        os.makedirs(path, exist_ok=True)
        if quant and path == folder:
            config["quantization_config"] = (
                {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
                if quant == "awq" else
                {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": quant.endswith("act"),
                 "sym": quant.endswith("sym"), "checkpoint_format": "gptq" if quant[4] == "1" else "gptq_v2"})
        else:
            config.pop("quantization_config", None)
        shards = int(given.get("shards", 1))
        if shards == 1:
            write_safetensors(f"{path}/model.safetensors", content)
        else:
            where = {}
            for s in range(shards):
                name = f"model-{s + 1:05}-of-{shards:05}.safetensors"
                part = {n: t for i, (n, t) in enumerate(content.items()) if i % shards == s}
                where.update({n: name for n in part})
                write_safetensors(f"{path}/{name}", part)
            with open(f"{path}/model.safetensors.index.json", "w") as f:
                json.dump({"metadata": {"total_size": 0}, "weight_map": where}, f)
        for name, content in (("config", config), ("tokenizer", tokenizer(field, "pairs" in given)),
                              ("tokenizer_config", about), ("generation_config", {"eos_token_id": field("tokenizer.ggml.eos_token_id")})):
            with open(f"{path}/{name}.json", "w", encoding="utf-8") as f:
                json.dump(content, f, ensure_ascii=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
