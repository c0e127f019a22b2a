"""x"""
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.seed = 0
    c.mesh = dict(data=2, expert=4)
    c.model = dict(
        D=96, N=2, H=4, A=24,
        ffn="GLU(F=256, activation='gelu')",
        layout="every 2",
        position="relative",
        remat=False,
        moe=dict(E=16, router="Top2(second='always')", experts="MLP(F=192)", dispatch="Scatter(capacity_factor=1.25)",
                 losses=dict(load_balance=0.01, router_z=0.001)),
    )
    c.data = dict(source="Corpus()", tokenizer="Bytes()", L=64, B=32)
    c.optim = dict(optimizer="AdamW(weight_decay=0.1)", schedule="Cosine(peak=3e-3, warmup=200)", clip=1.0)
    c.run = dict(steps=2000, log_every=50, eval_every=1000, eval_windows=1024, save_every=1000)
    return c
