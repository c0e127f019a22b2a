"""Decoders with RMS norms, rotary positions, SwiGLU and untied embeddings: Mixtral, OLMoE, Qwen3, DeepSeekMoE.

Embedding and head count in the total and in the active parameters. Nothing is dropped: rows are sorted by expert, and
travel as many as there are.
"""

from ml_collections import ConfigDict

from configs.papers import _nano


def llama(
    shape: str,
    D: int,
    N: int,
    H: int,
    A: int,
    V: int,
    moe: dict,
    J: int | None = None,
    base: float = 10000.0,
    qk_norm: str = "none",
    B: int = 1024,
    microbatches: int = 2,
    optim: dict | None = None,
    mesh: dict | None = None,
    **model,
) -> ConfigDict:
    """A model of these sizes; `moe` has E, router, experts, losses and other fields that differ.

    B sequences of 4,096 tokens a step, in `microbatches` microbatches.
    """
    config = ConfigDict()
    config.seed = 0
    config.mesh = mesh or {"fsdp": -1}
    config.model = {
        **{"D": D, "N": N},
        "attention": f"MHA(H={H}, A={A}, J={J}, position=Rotary(base={base}), qk_norm={qk_norm!r})",
        "moe_layers": "all",
        "tied": False,
        "remat": "save_collectives",
        "dtype": "bfloat16",
        "moe": {"dispatch": "Sort()", "exchange": "RaggedAllToAll()", **moe},
        **model,
    }
    config.data = {
        "source": "Tfds(name='c4')",
        "tokenizer": f"SentencePiece(V={V})",
        "objective": "NextToken()",
        "L": 4096,
        "B": B,
        "microbatches": microbatches,
    }
    config.optim = optim or {
        "optimizer": "AdamW(b1=0.9, b2=0.95, weight_decay=0.1)",
        "schedule": "Cosine(peak=0.0003, warmup=2000)",
        "clip": 1.0,
    }
    config.run = {"steps": 250_000, "log_every": 100, "eval_every": 5000, "save_every": 1000}
    return _nano.shaped(config, shape)


def qwen3(shape: str, D: int, N: int, H: int, F: int) -> ConfigDict:
    """Qwen3 of these sizes, with four heads of keys and values of width 128, and 128 experts of width F."""
    moe = {
        "E": 128,
        "router": "TopK(K=8)",
        "experts": f"GLU(F={F}, activation='silu')",
        "losses": ("LoadBalance(0.001, 'sum')",),
    }
    return llama(shape, D, N, H, A=128, V=151_936, moe=moe, J=4, base=1e6, qk_norm="head")
