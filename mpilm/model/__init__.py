"""Language models in plain torch, without MPI: one file a kind (`--model.kind gpt` is `gpt.py`)."""
