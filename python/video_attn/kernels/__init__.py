"""Triton kernels and their launches: no torch operators, no BlockMask, no choice of backend.

Importing this package does not import triton; its kernel files do. The first letters of a name say
what it is:

=============  ==================================================================================
``i_*``        a program id, a block or step index
``o_*``        a vector of offsets
``m_*``        a boolean mask
``n_*``        a count
``p_*``        a pointer, or a tensor of pointers
``b_*``        a block of values in registers; a load has its shape in a comment, ``# [BM, BD]``
``B H HQ G``   batch, key heads, query heads, query heads per key head
``D DV``       head dims of q/k and of v; ``BD BDV`` the same padded to a power of two
``BM BN``      rows of the tile a program owns, rows of one step over the other side
=============  ==================================================================================

Words of the attention kernels. A program *owns* a tile of one side (queries in forward and dq,
keys in dkv) and walks in *steps* of ``BN`` rows over the *other* side. Both sides are cut in
*slots*, the blocks of the mask; the first rows of a slot are valid, perhaps not all. First come the
*full* steps, whose rows are all valid, then those that need a mask. ``MODE`` says where the steps
come from:

- ``dense``: all of the sequence, or its causal part;
- ``steps``: a list of step numbers (``step_lists.py``);
- ``gather``: the rows of the listed slots one after the other, for slots that no step divides.
"""
