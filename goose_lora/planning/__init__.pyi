"""The public names of goose_lora.planning."""
