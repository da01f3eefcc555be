# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Times Taylor attention beside its peers on one CUDA GPU; first verifies, then times, then a table, a JSON and a plot.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/benchmark_taylor_attention.py [--output kernels/benchmarks/results]

Peers, all in the same run: plain PyTorch in chunks (quadratic inside a chunk, the same features between), causal softmax
attention by SDPA with heads of V, and, where flash-linear-attention is installed, its Based kernels with the normaliser on.
Each is timed twice: the wall time of a call, launches from Python included, and the time of its kernels alone, from the
profiler; what lies between is the host. Peak memory is that of forward and backward beside the inputs.
Limits: a device copy, counting bytes read and written, and a bf16 matrix product, both measured here.
"""

# ruff: noqa: E501

import argparse
import importlib.metadata
import json
import math
import pathlib

import torch
import triton
from triton.testing import do_bench

from based_kernels import taylor_attention, taylor_attention_step


SIZES = [(8, 2048, 64), (16, 8192, 64), (1, 32768, 64), (4, 8192, 112)]
STEPS = [(1, 64), (16, 64), (128, 64), (128, 112), (512, 64)]
H, D = 16, 16
F = (D + 1) * (D + 2) // 2
F_PAD = -(-F // 8) * 8


def features(x):
    y = torch.cat([x * D**-0.25, torch.ones_like(x[..., :1])], -1)
    a, b = torch.triu_indices(D + 1, D + 1, device=x.device)
    return y[..., a] * y[..., b], torch.where((a == b) & (a < D), 0.5, 1.0).to(x.dtype)


def plain(q, k, v, chunk=256):
    """Taylor attention in plain PyTorch: the same function, chunk by chunk, sums in float32."""
    outputs, state = [], 0.0
    for i in range(0, q.shape[1], chunk):
        qc, kc, vc = (x[:, i : i + chunk].transpose(1, 2) for x in (q, k, v))
        one = torch.cat([vc, torch.ones_like(vc[..., :1])], -1)
        s = (qc @ kc.mT).float() * D**-0.5
        mixed = ((1 + s + s * s / 2).tril().to(vc.dtype) @ one).float()
        phi_k, coefficient = features(kc)
        if i:
            mixed = mixed + ((features(qc)[0] * coefficient) @ state.to(vc.dtype)).float()
        state = state + (phi_k.mT @ one).float()
        outputs.append((mixed[..., :-1] / mixed[..., -1:].clamp(min=0.5)).to(v.dtype).transpose(1, 2))
    return torch.cat(outputs, 1)


def oracle(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT * D**-0.5
    w = (1 + s + s * s / 2).tril()
    return (w @ v / w.sum(-1, keepdim=True).clamp(min=0.5)).transpose(1, 2)


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def providers():
    table = {"ours": lambda q, k, v: taylor_attention(q, k, v)[0], "plain PyTorch": plain}
    try:
        from fla.ops.based import fused_chunk_based, parallel_based

        def heads_first(op):
            # releases differ in the layout they take: [B, H, T, D] with head_first, or [B, T, H, D]
            import inspect

            if "head_first" in inspect.signature(op).parameters:
                return lambda q, k, v: op(q, k, v, use_norm=True, head_first=False)
            return lambda q, k, v: op(q, k, v, use_norm=True)

        table["FLA parallel"] = heads_first(parallel_based)
        table["FLA fused_chunk"] = heads_first(fused_chunk_based)
    except ImportError as error:
        print(f"no flash-linear-attention: {error}")
    return table


def versions():
    found = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    try:
        found["flash-linear-attention"] = importlib.metadata.version("flash-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        found["flash-linear-attention"] = "none"
    return found


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def draw(B, T, V, dims=(D, D)):
    shapes = [(B, T, H, dims[0]), (B, T, H, dims[1]), (B, T, H, V)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def verify(name, op):
    q, k, v = draw(2, 700, 64)
    g = torch.randn_like(v)
    output = op(q, k, v)
    twin = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = oracle(*twin)
    errors = {"output": relative(output, want)}
    gradients = zip("qkv", torch.autograd.grad(output, (q, k, v), g), torch.autograd.grad(want, twin, g.double()))
    errors.update({f"d{letter}": relative(a, b) for letter, a, b in gradients})
    print(f"{name:16s} against float64:", {key: f"{value:.1e}" for key, value in errors.items()}, flush=True)
    return errors


def kernel_ms(call, calls=10):
    """What the GPU works for a call, whatever the host does between its kernels."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls / 1e3


def measure(op, q, k, v, g, quick):
    """-> milliseconds and bytes by name."""

    def forward():
        with torch.no_grad():
            op(q, k, v)

    def both():
        torch.autograd.grad(op(q, k, v), (q, k, v), g)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    rep = 40 if quick else 100
    return {
        "forward_ms": do_bench(forward, warmup=10, rep=rep, return_mode="median"),
        "forward_kernels_ms": kernel_ms(forward),
        "both_ms": do_bench(both, warmup=10, rep=1.5 * rep, return_mode="median"),
        "both_kernels_ms": kernel_ms(both),
        "peak_bytes": peak,
    }


def ceilings():
    x = torch.empty(2**30, dtype=torch.float32, device="cuda")
    y = torch.randn(2**30, device="cuda")
    copy = 8 * 2**30 / do_bench(lambda x=x, y=y: x.copy_(y), return_mode="median") / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copy, product = ceilings()
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": versions(),
        "copy_TB_s": copy,
        "product_TFLOP_s": product,
        "verified": {},
        "sequences": [],
        "steps": [],
    }
    ops = {}
    for name, op in providers().items():
        try:
            errors = verify(name, op)
        except Exception as error:  # a peer that fails is reported, not timed
            print(name, "failed:", repr(error)[:200])
            continue
        result["verified"][name] = errors
        if all(value < 5e-2 for value in errors.values()):
            ops[name] = op
        else:
            print(name, "is not right and is not timed")
    if "ours" not in ops:
        raise SystemExit("our kernels are wrong here")
    for B, T, V in SIZES:
        forward_bytes = 2 * B * T * H * (2 * D + 2 * V)
        backward_bytes = forward_bytes + 2 * B * T * H * (2 * (2 * D + V) + 2 * V)
        # per token: features of q and k into and out of the state, half a chunk of 32 for the rest; with backward, the
        # states of q k v (twice), k q g and q k g
        forward_flops = B * T * H * (4 * F * (V + 1) + 32 * (D + V))
        both_flops = B * T * H * (16 * F * (V + 1) + 32 * (6 * D + 4 * V))
        rows = []
        for name, op in {**ops, "SDPA causal": None}.items():
            if op is None:
                op, (q, k, v) = (
                    sdpa,
                    [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in draw(B, T, V, (V, V))],
                )
            else:
                q, k, v = draw(B, T, V)
            try:
                row = measure(op, q, k, v, torch.randn_like(v), name != "ours")
            except Exception as error:
                print(name, (B, T, V), "failed:", repr(error)[:200], flush=True)
                continue
            rows.append({"name": name, "B": B, "T": T, "V": V, **row})
            if name == "ours":
                forward, both = row["forward_ms"], row["both_ms"]
                rows[0]["forward_TFLOP_s"] = forward_flops / forward / 1e9
                rows[0]["forward_fraction_of_bytes"] = forward_bytes / copy / 1e9 / forward
                rows[0]["forward_fraction_of_product"] = forward_flops / product / 1e9 / forward
                rows[0]["both_TFLOP_s"] = both_flops / both / 1e9
                rows[0]["both_fraction_of_bytes"] = backward_bytes / copy / 1e9 / both
                rows[0]["both_fraction_of_product"] = both_flops / product / 1e9 / both
        print(f"\nB {B}, T {T}, V {V}")
        for row in rows:
            more = ""
            if row["name"] == "ours":
                more = f"  {fractions(row, 'forward')}; and backward {fractions(row, 'both')}"
            print(
                f"  {row['name']:16s} forward {row['forward_ms']:8.3f} ms {row['forward_ms'] / rows[0]['forward_ms']:6.2f}x"
                f" (kernels {row['forward_kernels_ms']:8.3f})"
                f"   and backward {row['both_ms']:8.3f} ms {row['both_ms'] / rows[0]['both_ms']:6.2f}x"
                f" (kernels {row['both_kernels_ms']:8.3f})"
                f"   {row['peak_bytes'] / 2**20:7.0f} MiB{more}",
                flush=True,
            )
        result["sequences"] += rows
    for B, V in STEPS:
        states = [torch.rand(B, H, V + 1, F_PAD, device="cuda") for _ in range(3)]
        q, k, v = (x.detach() for x in draw(B, 1, V))
        taylor_attention_step(q, k, v, states[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(30):
                taylor_attention_step(q, k, v, states[i % 3])
        ms = do_bench(graph.replay, return_mode="median") / 30
        rate = 2 * states[0].numel() * 4 / ms / 1e9
        result["steps"].append({"B": B, "V": V, "ms": ms, "TB_s": rate, "fraction_of_copy": rate / copy})
        print(f"step B {B:4d} V {V:4d}   {ms:.4f} ms   {rate:.2f} TB/s, {rate / copy:.0%} of the copy")
    print(f"\n{result['card']}, {result['versions']}, copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "taylor_attention.json").write_text(json.dumps(result, indent=1) + "\n")
    table(result, arguments.output / "taylor_attention.md")
    plot(result, arguments.output / "taylor_attention.png")


def fractions(row, key):
    return (
        f"{row[f'{key}_TFLOP_s']:.0f} TFLOP/s, {row[f'{key}_fraction_of_bytes']:.0%} of the bytes limit, "
        f"{row[f'{key}_fraction_of_product']:.0%} of the arithmetic limit"
    )


def table(result, path):
    names = list(dict.fromkeys(row["name"] for row in result["sequences"]))
    lines = [f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()), ""]
    lines += ["| B, T, V | pass | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for size in dict.fromkeys((row["B"], row["T"], row["V"]) for row in result["sequences"]):
        cells = {row["name"]: row for row in result["sequences"] if (row["B"], row["T"], row["V"]) == size}
        for label, key in (("forward", "forward"), ("and backward", "both")):
            values = [
                f"{cells[name][f'{key}_ms']:.3f} ({cells[name][f'{key}_kernels_ms']:.3f})" if name in cells else "-"
                for name in names
            ]
            lines.append(f"| {', '.join(map(str, size))} | {label} | " + " | ".join(values) + " |")
        values = [f"{cells[name]['peak_bytes'] / 2**20:.0f}" if name in cells else "-" for name in names]
        lines.append(f"| {', '.join(map(str, size))} | peak MiB | " + " | ".join(values) + " |")
    lines += [
        "",
        "Milliseconds, medians, bf16, 16 heads, D = 16; in brackets the kernels alone, means of the profiler.",
        "",
        f"Ours, of a copy of {result['copy_TB_s']:.2f} TB/s and a bf16 product of {result['product_TFLOP_s']:.0f} TFLOP/s:",
        "",
        "| B, T, V | forward | and backward |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['B']}, {row['T']}, {row['V']} | {fractions(row, 'forward')} | {fractions(row, 'both')} |"
        for row in result["sequences"]
        if row["name"] == "ours"
    ]
    lines += [
        "",
        "| step: B, V | ms | TB/s | of the copy |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['B']}, {r['V']} | {r['ms']:.4f} | {r['TB_s']:.2f} | {r['fraction_of_copy']:.0%} |"
        for r in result["steps"]
    ]
    path.write_text("\n".join(lines) + "\n")


def plot(result, path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib, no plot")
        return
    names = list(dict.fromkeys(row["name"] for row in result["sequences"]))
    sizes = list(dict.fromkeys((row["B"], row["T"], row["V"]) for row in result["sequences"]))
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2))
    for axis, key, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward and backward")):
        for i, name in enumerate(names):
            found = {(r["B"], r["T"], r["V"]): r[key] for r in result["sequences"] if r["name"] == name}
            values = [found.get(size, math.nan) for size in sizes]
            axis.bar([j + i * 0.8 / len(names) for j in range(len(sizes))], values, 0.8 / len(names), label=name)
        axis.set_yscale("log")
        axis.set_xticks(
            [j + 0.4 - 0.4 / len(names) for j in range(len(sizes))], [f"B {b}\nT {t}\nV {v}" for b, t, v in sizes]
        )
        axis.set_ylabel("ms")
        axis.set_title(f"{title}, bf16, 16 heads, {result['card']}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
