"""Parameter-efficient fine-tuning: few trained numbers beside a frozen model."""
