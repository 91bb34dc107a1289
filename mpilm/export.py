"""Write a trained model as the Hugging Face hub has Llama: python -m mpilm.export RUN_OR_CHECKPOINT --to DIR.

    python -m mpilm.export runs/demo --to demo-hf --dtype bf16

DIR then holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json, which transformers and whatever
else reads Llama's checkpoints open by its name. No weight is changed but by rounding to --dtype. The tokenizer makes of
a text the tokens that the model learned, and adds none, whatever it did for others.
"""

from __future__ import annotations

import argparse
import json
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mpilm import launch, startup
from mpilm.log import UserError, say

if TYPE_CHECKING:
    from mpilm.checkpoint import Reader

TOKENIZER_CONFIG = "tokenizer_config.json"


def main() -> None:
    """Read a checkpoint, write the folder; on rank 0."""
    parser = argparse.ArgumentParser(prog="python -m mpilm.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="run directory or checkpoint")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32, as "
                        "they are in a checkpoint)")
    parser.add_argument("--data.path", dest="data", default="",
                        help="dataset whose tokenizer comes along; default: the one it was trained on")
    options = parser.parse_args()
    with launch.session() as world:
        with startup.loading():
            from mpilm import resume

        reader = resume.open_run(options.path, world.comm)
        data = options.data or resume.config_of(reader).data.path
        resume.require_tokenizer(reader, data)
        launch.on_root(world.comm, lambda: write(reader, Path(data), options.to, options.dtype))
        say(f"{reader.path}: written to {options.to}")


def write(reader: Reader, data: Path, directory: Path, dtype: str) -> None:
    """Write the model of a checkpoint, in fp32 or bf16, with the tokenizer of the dataset at `data`.

    Raises:
        UserError: The folder is there already.
        OSError: The file system refuses.
    """
    import torch
    from tokenizers import Tokenizer

    from mpilm import resume
    from mpilm.data import tokenizer
    from mpilm.data._format import TOKENIZER, read_index
    from mpilm.model import hub
    from mpilm.model.precision import DTYPES
    from mpilm.model.shape import Shape

    if directory.exists():
        raise UserError(f"--to {directory}: there is something already. Name a folder that is not there yet.")
    shape, end = Shape(**reader.meta["shape"]), read_index(data).end_of_text
    tensors = {name: torch.from_numpy(reader.read(f"model.{name}", 0, prod(size))).view(size).to(DTYPES[dtype])
               for name, size in shape.tensors().items()}
    length = resume.config_of(reader).data.sequence_length
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    words = tokenizer.settle(Tokenizer.from_buffer((data / TOKENIZER).read_bytes()))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words.id_to_token(end),
                "model_max_length": length, "clean_up_tokenization_spaces": False}
    try:
        hub.save(unfinished, shape, tensors, max_length=length, end_of_text=end)
        (unfinished / TOKENIZER).write_text(json.dumps({**json.loads(words.to_str()), "post_processor": None}))
        (unfinished / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        unfinished.rename(directory)
    finally:    # whatever came in between
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    launch.command(main)
