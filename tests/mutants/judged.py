"""Mutants that no test can or need notice: (file, its line, the change) -> why. A line that changes is judged anew."""

from __future__ import annotations

SAME = "the same result"
SLOWER = "the same result, for more work"
WORDS = "where advice begins is a matter of taste"
LOOKS = "a little more of it: a matter of taste"

JUDGED: dict[tuple[str, str, str], str] = {
    ("patterns/tiles.py", "return -(-bk // 32)", "32  ->  33"): SAME + ": blocks have 16 to 256 keys",
    (
        "patterns/documents.py",
        "return np.concatenate([[0], self._edges, self._edges[-1:]])",
        "-1  ->  1",
    ): SAME + ": past the last document an interval ends before it begins",
    (
        "patterns/interval.py",
        "low, stop = self.existing(np.minimum(q, grid.q_offset + grid.q_len - 1), grid)",
        "grid.q_offset + grid.q_len - 1  ->  grid.q_offset + grid.q_len + 1",
    ): SAME + ": rows past the last query are emptied by the next line",
    ("patterns/butterfly.py", "cells = tokens // self.unit", "tokens // self.unit  ->  tokens * self.unit"): SLOWER,
    ("patterns/global_tokens.py", "stops = np.concatenate([zero + grid.cols, np.tile(cols + 1, grid.rows)])",
     "1  ->  2"): SLOWER + ": a candidate more",
    ("patterns/image.py", "return [(y0, y1, zero, zero + self.shape[1] - 1), (zero, zero + self.shape[0] - 1, x0, x1)]",
     "1  ->  2"): SAME + " of the first: a row's last pixel shares its block with a column that is reached",
    ("patterns/ordering.py", "half = side // 2", "side // 2  ->  side * 2"): SAME + ": two turns more, of nothing",
    ("patterns/pixels.py", "times = max(1, round(size / max(pixels.shape[:2])))", "2  ->  3"): (
        SAME + ": the third side is the three colours"
    ),
    (
        "patterns/pixels.py",
        "MASKED_COLOUR = (252, 238, 206)  # pairs of a partial block that are not allowed: computed, then dropped",
        "252  ->  253",
    ): LOOKS,
    (
        "patterns/pixels.py",
        "MASKED_COLOUR = (252, 238, 206)  # pairs of a partial block that are not allowed: computed, then dropped",
        "238  ->  239",
    ): LOOKS,
    (
        "patterns/pixels.py",
        "MASKED_COLOUR = (252, 238, 206)  # pairs of a partial block that are not allowed: computed, then dropped",
        "206  ->  207",
    ): LOOKS,
    ("patterns/pixels.py", "here = (row >= 0) & (row < rows[1] - rows[0]) & (start < stop)",
     "start < stop  ->  start <= stop"): SAME + ": a run of no blocks begins and ends in one pixel",
    (
        "patterns/pixels.py",
        "first = -(-np.arange(width + 2) * (cols[1] - cols[0]) // width)  # first block of each pixel",
        "2  ->  3",
    ): SAME + ": one entry that nothing reads",
    (
        "patterns/pixels.py",
        "pixels[np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)] = colour",
        "y + dy  ->  y - dy",
    ): SAME + ": a step to either side is taken",
    (
        "patterns/pixels.py",
        "pixels[np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)] = colour",
        "x + dx  ->  x - dx",
    ): SAME + ": a step to either side is taken",
    ("patterns/pixels.py", 'image.save(stream, "PNG", optimize=True)', "True  ->  False"): LOOKS + ", of bytes",
    ("patterns/drawing.py", "DPI = 150", "150  ->  151"): LOOKS,
    (
        "patterns/drawing.py",
        "total = above + tall + 2 * LINE  # the legend stands in the last two lines",
        "2  ->  3",
    ): LOOKS,
    ("patterns/drawing.py", "FigureCanvasAgg(drawn)", "FigureCanvasAgg(drawn)  ->  pass"): (
        SAME + ": savefig takes the canvas of the file's format"
    ),
    ("patterns/drawing.py", 'drawn.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)',
     "False  ->  True"): "whether a legend has a frame is a matter of taste",
    ("patterns/drawing.py", "LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26", "180  ->  181"): LOOKS,
    ("patterns/drawing.py", "LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26", "70  ->  71"): LOOKS,
    ("patterns/drawing.py", "LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26", "110  ->  111"): LOOKS,
    ("patterns/drawing.py", "LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26", "46  ->  47"): LOOKS,
    ("patterns/drawing.py", "LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26", "26  ->  27"): LOOKS,
    (
        "patterns/drawing.py",
        "kept = abs(high * room[1] / (wide * room[0]) - 1) < 0.02",
        "abs(high * room[1] / (wide * room[0]) - 1) < 0.02  ->  abs(high * room[1] / (wide * room[0]) - 1) <= 0.02",
    ): LOOKS,
    ("patterns/drawing.py", "return 1 << max(0, ceil(log2(span / max(2, pixels // 120))))", "120  ->  121"): LOOKS,
    ("patterns/viewer.py", "MAX_UNPACKED = 128 << 20  # bytes of runs and tiles that a browser has to hold",
     "128  ->  129"): LOOKS,
    ("patterns/viewer.py", "MAX_UNPACKED = 128 << 20  # bytes of runs and tiles that a browser has to hold",
     "20  ->  21"): "how much a browser is asked to hold is a matter of taste",
    ("patterns/viewer.py", "MAX_PAGE = 16 << 20  # bytes of the file", "16  ->  17"): LOOKS,
    ("patterns/viewer.py", "MAX_PAGE = 16 << 20  # bytes of the file",
     "20  ->  21"): "how much a browser is asked to read is a matter of taste",
    (
        "patterns/drawing.py",
        'axes.spines[:].set_position(("outward", 2))  # a frame on the edge would hide the first and last pixels',
        "2  ->  3",
    ): LOOKS,
    ("patterns/viewer.py", "first = np.flatnonzero(np.diff(runs.row, prepend=-1))", "1  ->  2"): (
        SAME + ": the first run differs from either"
    ),
    ("patterns/viewer.py", 'little = words.astype(words.dtype.newbyteorder("<"), copy=False)',
     "False  ->  True"): SLOWER,
    ("patterns/notebook.py", "SIZE = 320  # pixels on a side, about", "320  ->  321"): LOOKS,
    ("patterns/notebook.py", "FRAME = 160  # grey", "160  ->  161"): LOOKS,
    ("patterns/waste.py", "if density > mask.density / 2:",
     "density > mask.density / 2  ->  density >= mask.density / 2"): WORDS,
    ("patterns/constant.py", "id(of)  # makes torch.compile guard the graph with it",
     "id(of)  ->  pass"): "a guard of torch.compile, whose tests are left out here",
    ("patterns/evaluating.py", "kinds: Ints = compact * 4 + ragged",
     "compact * 4 + ragged  ->  compact * 4 - ragged"): SAME + ": kinds are told apart as before",
    ("patterns/dilated.py", "raise NotImplementedError",
     "raise NotImplementedError  ->  pass"): "a base class; nothing calls it",
    ("patterns/strided.py",
     "if self.stride * self.unit <= grid.bk or int((last - first).max()) + 1 >= self.stride:",
     "int((last - first).max()) + 1 >= self.stride  ->  int((last - first).max()) + 1 > self.stride"): (
        SLOWER + ": candidates are listed that are all blocks"
    ),
    ("patterns/cells.py", "LARGEST_KEY = 1 << 62", "1 << 62  ->  1 >> 62"): SLOWER + ": parts are numbered first",
    ("patterns/fixed.py",
     "ends = np.arange(1, (grid.kv_len - 1) // (self.stride * self.unit) + 2, dtype=np.int64) * self.stride",
     "grid.kv_len - 1  ->  grid.kv_len + 1"): SLOWER + ": a summary past the last key, which is dropped",
    ("sparseflash/tables.py", "bits = words if len(words) else np.zeros((1, *words.shape[1:]), np.uint32)",
     "1  ->  2"): SAME,
    ("sparseflash/tables.py", "common = others if alone.size else 0", "0  ->  1"): SAME + ": one unused entry",
    ("sparseflash/tables.py", "by_pattern = spans.reshape(patterns, -1, 4)", "1  ->  2"): SAME,
    ("sparseflash/packing.py", "places, end = [], 0", "0  ->  1"): SAME + ": the first tensor begins one step later",
    ("kernels/cpu_operands.py", "if gathers and self.x.stride()[1:] != (x.shape[2], 1):", "1  ->  2"): SLOWER,
    ("kernels/cpu_plan.py", "if len(some) >= BAND * apart and (moves == moves[0]).all() and moves[0, 1] >= 0:",
     "0  ->  1"): SAME + ": all moves are equal there",
    ("kernels/cpu.py", "dirty = self.masks.dirty and bool(part.masked)",
     "self.masks.dirty and bool(part.masked)  ->  self.masks.dirty or bool(part.masked)"): SLOWER,
    ("kernels/cpu.py", "return low > 2.0**-SOUND and high < 2.0**SOUND  # false for NaN",
     "2.0 ** SOUND  ->  2.0 * SOUND"): SLOWER + ": the careful way",
    ("kernels/cpu.py",
     "if samples > 1 and sum(x.nbytes for x in (*keys, *queries)) <= cpu_operands.KEYS_HELD:",
     "sum((x.nbytes for x in (*keys, *queries))) <= cpu_operands.KEYS_HELD  ->  "
     "sum((x.nbytes for x in (*keys, *queries))) < cpu_operands.KEYS_HELD"): SAME + ": copied or not",
    ("patterns/interval.py", "empty = c >= d", "c >= d  ->  c > d"): SAME + ": what is filled from c to c is nothing",
    ("patterns/runs.py", "if spread > max(4 * values.size, 1 << 16):",
     "spread > max(4 * values.size, 1 << 16)  ->  spread >= max(4 * values.size, 1 << 16)"): SAME,
    ("patterns/cells.py", "LARGEST_KEY = 1 << 62", "62  ->  63"): SAME + ": a key is below it, so int64 holds it still",
    ("patterns/cells.py", "if spread * width > LARGEST_KEY:",
     "spread * width > LARGEST_KEY  ->  spread * width >= LARGEST_KEY"): SAME,
    (
        "patterns/cells.py",
        "beyond = (grid.kv_len - 1) // self.unit + 1  # cells before and after all keys: products stay small",
        "1  ->  2",
    ): SAME + ": a cell behind all keys, either way, or a candidate more",
    (
        "patterns/cells.py",
        "return grid.expand_positions(rows, first * self.unit, last * self.unit + self.unit - 1)",
        "last * self.unit + self.unit - 1  ->  last * self.unit + self.unit + 1",
    ): SLOWER + ": a candidate more",
    (
        "patterns/evaluating.py",
        "ragged = 2 * ((rows + 1) * grid.bq > grid.q_len) + ((cols + 1) * grid.bk > grid.kv_len)",
        "(rows + 1) * grid.bq > grid.q_len  ->  (rows + 1) * grid.bq >= grid.q_len",
    ): SLOWER + ": a kind more",
    ("patterns/evaluating.py", "step = max(1, at_once // grid.cols)", "1  ->  2"): SAME + ": two rows at a time",
    ("patterns/tiles.py",
     "self._tiles.resize((max(len(self), len(self._tiles) * 3 // 2), *self._tiles.shape[1:]), refcheck=False)",
     "len(self._tiles) * 3  ->  len(self._tiles) // 3"): SLOWER + ": it grows more often",
    ("patterns/refinement.py", "index = np.int32 if max(2 * len(runs), rows, cols + 1) < 1 << 31 else np.int64",
     "cols + 1  ->  cols - 1"): SAME + " below two thousand million block columns",
    ("patterns/refinement.py", "matrix.has_canonical_format = True  # columns ascend, none twice: scipy need not look",
     "True  ->  False"): SLOWER,
    ("patterns/refinement.py", "portions = min(rows, -(-(a.col.size + b.col.size) // JUMPS_AT_ONCE)) or 1",
     "min  ->  max"): SLOWER + ": a portion is a row, or none",
    ("patterns/butterfly.py", "unit: int = 128", "128  ->  129"): SAME + ": `butterfly` names the unit",
    ("patterns/fixed.py", "unit: int = 1", "1  ->  2"): SAME + ": `fixed` names the unit",
    (
        "patterns/ordering.py",
        'return _token_order(_pair("shape", shape), order, _pair("tile", tile) if order == "tile" else (1, 1))',
        "1  ->  2",
    ): SAME + ": no other order looks at it",
}  # fmt: skip
