"""What must hold for every implementation of a cost model, family by family."""
