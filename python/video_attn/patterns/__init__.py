"""One file per pattern: a layout and a few numbers in, a BlockMask out. No kernel, no model."""
