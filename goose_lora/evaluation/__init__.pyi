"""The public names of goose_lora.evaluation."""
