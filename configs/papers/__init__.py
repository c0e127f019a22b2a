"""Published models. A file is one of them, a few lines over its family (`_glam`, `_llama`, `_t5`, `_vit`).

`--config=configs/papers/mixtral_8x7b.py` is the model as published, to be planned or trained on a pod;
`--config=configs/papers/mixtral_8x7b.py:nano` has its components and layers at a size that trains on a laptop.
PUBLISHED in each file has the parameter counts of its source, as printed there; `differs` gives the reason where the
model that the source describes has another count.
"""
