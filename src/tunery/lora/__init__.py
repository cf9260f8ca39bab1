"""The LoRA layer, attaching it to a model, and adapter files."""
