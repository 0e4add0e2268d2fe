"""Quantisation to int8 on a GPU, and linear layers in int8: the kernels and what calls them."""
