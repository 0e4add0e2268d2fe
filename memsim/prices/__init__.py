"""What a call of a reference moves, computes, keeps and sends, from shapes, dtypes and options alone."""
