import jax


def attention(q, k, v, seg):
    mask = seg[:, None, :, None] == seg[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, mask=mask)
