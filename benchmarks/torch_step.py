"""The step of 02 or 04 in torch: torch.compile, bfloat16, scaled_dot_product_attention. accelerator.py starts it.

    python benchmarks/torch_step.py SPEC.json       # written by accelerator.py; prints one line of JSON

The same model, batch and AdamW as the notebook's train_step: float32 masters and moments, bfloat16 copies for the
matmuls; norms, softmax and loss in float32. Layers that see the whole context use scaled_dot_product_attention with
is_causal. For a window, `sdpa` gives it a mask; `flex` uses flex_attention, which skips the blocks outside. What the
notebook's step does besides: the norm of the gradient; logits in float32, not rounded before the softcap.

With `weights`, a .npz of a notebook's parameters, tokens and losses, it compares losses in float32 in place of timing.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F


def rms_norm(x):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def norm_and_rope(x, cos, sin):  # [B, T, N, H]; cos, sin [T, 1, H/2]
    first, second = rms_norm(x.float()).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Model:
    """Functions of a spec: {'head_dim', 'windows', 'seq_len', 'softcap', 'dtype', 'attention', …}."""

    def __init__(self, spec, device):
        self.spec, self.dtype = spec, getattr(torch, spec["dtype"])
        T, H = spec["seq_len"], spec["head_dim"]
        angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
        self.cos, self.sin = (
            torch.tensor(f(angles), dtype=torch.float32, device=device)[:, None, :] for f in (np.cos, np.sin)
        )
        self.masks = {}
        for window in {w for w in spec["windows"] if w < T}:
            if spec["attention"] == "flex":
                from torch.nn.attention.flex_attention import create_block_mask

                def seen(b, h, t, s, window=window):
                    return (s <= t) & (t - s <= window)

                self.masks[window] = create_block_mask(seen, None, None, T, T, device=device)
            else:
                t, s = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)[None, :]
                self.masks[window] = (s <= t) & (t - s <= window)

    def attend(self, q, k, v, window):
        """q [B, T, N, H], k, v [B, T, K, H] → [B, T, N·H]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask, gqa = self.masks.get(window), q.shape[1] != k.shape[1]
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        elif self.spec["attention"] == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return y.transpose(1, 2).flatten(2)

    def loss(self, params, tokens, targets):
        """The mean loss of tokens [B, T], as the notebook's loss_fn."""
        spec, dtype = self.spec, self.dtype
        B, T = tokens.shape
        x = x0 = rms_norm(F.embedding(tokens, params["embed"])).to(dtype)
        for layer, window in zip(params["layers"], spec["windows"]):
            w = {name: value.to(dtype) if value.ndim > 1 else value for name, value in layer.items()}
            if "resid_scale" in w:
                x = (w["resid_scale"] * x.float() + w["x0_scale"] * x0.float()).to(dtype)
            h = rms_norm(x)
            q, k, v = ((h @ w[name].flatten(1)).view(B, T, -1, spec["head_dim"]) for name in "qkv")
            q, k = (norm_and_rope(y, self.cos, self.sin) for y in (q, k))
            x = x + self.attend(q, k, v, window) @ w["o"].flatten(0, 1)
            units = rms_norm(x) @ w["up"]
            units = F.silu(rms_norm(x) @ w["gate"]) * units if "gate" in w else F.relu(units).square()
            x = x + units @ w["down"]
        logits = (rms_norm(x) @ params["lm_head"].to(dtype)).float()
        logits = spec["softcap"] * torch.tanh(logits / spec["softcap"])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def new_params(spec, device):
    """Parameters with the shapes and about the initial values of the notebook's."""
    D, N, K, H, F_, V = (spec[name] for name in ("width", "heads", "kv_heads", "head_dim", "mlp", "vocab"))

    def weight(*shape, std=D**-0.5):
        return (std * torch.randn(shape, device=device)).requires_grad_()

    def layer():
        shapes = {"q": (D, N, H), "k": (D, K, H), "v": (D, K, H), "o": (N, H, D), "up": (D, F_), "down": (F_, D)}
        shapes |= {"gate": (D, F_)} if spec["gate"] else {}
        scalars = {} if spec["gate"] else {"resid_scale": 1.0, "x0_scale": 0.1}
        return {name: weight(*shape) for name, shape in shapes.items()} | {
            name: torch.tensor(value, device=device, requires_grad=True) for name, value in scalars.items()
        }

    layers = [layer() for _ in spec["windows"]]
    return {"embed": weight(V, D, std=0.01), "lm_head": weight(D, V, std=0.001), "layers": layers}


def make_step(spec, params, device, compiled=True):
    """Returns step(tokens, targets) → loss: one AdamW step on microbatches [A, B, T], in place."""
    model = Model(spec, device)
    loss_fn = torch.compile(model.loss) if compiled else model.loss
    layers = [w for layer in params["layers"] for w in layer.values()]
    rest = [params["embed"], *(w for w in layers if w.ndim == 0)]
    groups = [
        {"params": [w for w in layers if w.ndim > 1], "weight_decay": 0.1},
        {"params": [params["lm_head"]], "weight_decay": 0.1, "lr": spec["head_rate"] * spec["learning_rate"]},
        {"params": rest, "weight_decay": 0.0},
    ]
    betas = tuple(spec["betas"])
    optimizer = torch.optim.AdamW(groups, lr=spec["learning_rate"], betas=betas, eps=1e-8, fused=device == "cuda")

    def step(tokens, targets):
        total = 0.0
        for one, wanted in zip(tokens, targets):
            loss = loss_fn(params, one, wanted) / len(tokens)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def load_params(arrays):
    """Returns (params, rest) of {path: array}: layers/3/q is a weight of layer 3, all without embed etc. the rest."""
    params, rest = {"layers": []}, {}
    for path, value in arrays.items():
        parts = path.split("/")
        weight = torch.tensor(np.asarray(value))
        if parts[0] == "layers":
            index = int(parts[1])
            params["layers"] += [{} for _ in range(index + 1 - len(params["layers"]))]
            params["layers"][index][parts[2]] = weight.requires_grad_()
        elif parts[0] in ("embed", "lm_head"):
            params[parts[0]] = weight.requires_grad_()
        else:
            rest[path] = np.asarray(value)
    return params, rest


def compare(spec):
    """Losses of the same steps from the same weights, beside the notebook's; float32, on the CPU."""
    with np.load(spec["weights"]) as arrays:
        params, rest = load_params(dict(arrays))
    step = make_step(spec | {"dtype": "float32", "attention": "sdpa"}, params, "cpu", compiled=False)
    batches = [torch.tensor(rest[name], dtype=torch.long) for name in ("tokens", "targets")]
    losses = [float(step(*batches)) for _ in rest["losses"]]
    return {"losses": losses, "theirs": rest["losses"].tolist(), "apart": float(np.abs(rest["losses"] - losses).max())}


def measure(spec):
    """{'ms': median of the steps, each synchronized at both ends, 'queued_ms': without waits between, …}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    shape = spec["batch_shape"]
    tokens, targets = (torch.randint(spec["vocab"], shape, device=device) for _ in range(2))
    step = make_step(spec, new_params(spec, device), device)
    started = time.perf_counter()
    step(tokens, targets)
    wait()
    compile_s = time.perf_counter() - started
    for _ in range(3):
        loss = step(tokens, targets)
    seconds = []
    for _ in range(spec["steps"]):
        wait()
        started = time.perf_counter()
        loss = step(tokens, targets)
        wait()
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(spec["steps"]):
        loss = step(tokens, targets)
    wait()
    queued = (time.perf_counter() - started) / spec["steps"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "ms": 1e3 * statistics.median(seconds), "queued_ms": 1e3 * queued, "compile_s": compile_s, "peak_bytes": peak,
        "loss": float(loss), "torch": torch.__version__, "device": name,
    }  # fmt: skip


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    print(json.dumps(compare(spec) if "weights" in spec else measure(spec)), flush=True)
