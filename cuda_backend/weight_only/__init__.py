"""Linear layers whose weight alone is quantised, int8 in groups and NF4, for decoding and for QLoRA."""
