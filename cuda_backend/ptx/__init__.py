"""Inline-PTX intrinsics for Hopper (``sm_90a``), one file per family of instructions.

Each intrinsic is one instruction, or one fixed chain of instructions, with the types it takes; the
kernels that use them live elsewhere.  Section titles in the docstrings are those of the PTX ISA 8.7
manual (chapter 9.7); the numbers of its sections move from release to release, the titles do not.
"""
