"""Pictures of block masks: figures with axes, pictures in notebooks, and pages to zoom into.

They read :class:`~sparseflash.patterns.mask_data.MaskData`; ``BlockMask`` imports them inside its methods, so patterns
need only numpy and scipy.
"""
