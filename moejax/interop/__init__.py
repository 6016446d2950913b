"""Other people's weights: Hugging Face checkpoints in and out.

Load one, and write what became of it:

    model = read_model_config("Mixtral-8x7B-v0.1")
    program = Program(model, Layout(mesh))
    params = load_hf("Mixtral-8x7B-v0.1", program).params
    save_hf("trained", program, params)
"""

from moejax.interop.families import FAMILIES, Family
from moejax.interop.load import Loaded, load_hf, read_model_config
from moejax.interop.rows import Row
from moejax.interop.save import save_hf, special_token_ids, tokenizer_files
from moejax.interop.upcycle import Upcycling

__all__ = [
    "FAMILIES",
    "Family",
    "Loaded",
    "Row",
    "Upcycling",
    "load_hf",
    "read_model_config",
    "save_hf",
    "special_token_ids",
    "tokenizer_files",
]
