"""Pictures of block masks: figures with axes, pictures in notebooks, and pages to zoom into.

They read :class:`~sparseflash.patterns.mask_data.MaskData`; ``BlockMask`` asks for them inside of its methods, so that
patterns need numpy and scipy alone.
"""
