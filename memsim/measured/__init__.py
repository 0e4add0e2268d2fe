"""What was measured, beside what the formulas say of it."""
