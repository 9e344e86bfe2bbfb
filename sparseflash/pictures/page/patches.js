// Patches: cached images of 256 x 256 cells, a cell being a token or width x height blocks.

const PATCH = 256;  // cells a side; a multiple of every block size
const packed = ([r, g, b]) => (0xff000000 | b << 16 | g << 8 | r) >>> 0;
const { empty: EMPTY_COLOUR, full: FULL_COLOUR, partial: PARTIAL_COLOUR, masked: MASKED_COLOUR } = page.colours;
const patches = new Map();
const diffs = [new Float64Array(PATCH * (PATCH + 2)), new Float64Array(PATCH * (PATCH + 2))];

function patch(level, px, py, keep) {
  const key = `${pattern} ${level.name} ${px} ${py}`;
  let image = patches.get(key);
  if (image) patches.delete(key);  // put back last: the map is in order of use
  else {
    image = document.createElement("canvas");
    image.width = image.height = PATCH;
    const own = image.getContext("2d"), pixels = own.createImageData(PATCH, PATCH);
    (level.tokens ? paintTokens : paintBlocks)(new Uint32Array(pixels.data.buffer), level, px, py);
    own.putImageData(pixels, 0, 0);
  }
  patches.set(key, image);
  for (const old of patches.keys()) {
    if (patches.size <= keep) break;
    patches.delete(old);
  }
  return image;
}

function paintTokens(pixels, level, px, py) {
  const full = packed(FULL_COLOUR), yes = packed(PARTIAL_COLOUR), no = packed(MASKED_COLOUR);
  const col0 = px * PATCH / bk, col1 = col0 + PATCH / bk;
  const row0 = py * PATCH / bq, row1 = Math.min(rows, row0 + PATCH / bq);
  pixels.fill(packed(EMPTY_COLOUR));
  for (let row = row0; row < row1; row++) {
    for (let run = firstRun(row, col0); run < lastRun(row) && runStart[run] < col1; run++) {
      const begin = Math.max(runStart[run], col0), end = Math.min(runStop[run], col1), code = runCode[run];
      for (let i = 0; i < bq; i++) {
        const line = ((row - row0) * bq + i) * PATCH - col0 * bk;
        if (code === FULL) pixels.fill(full, line + begin * bk, line + end * bk);
        else for (let col = begin; col < end; col++) {
          for (let j = 0; j < bk; j++) pixels[line + col * bk + j] = bit(code, i, j) ? yes : no;
        }
      }
    }
  }
}

/** Colours mixed from what a cell holds, paler the less it holds, but never so pale that a single block is lost. */
function paintBlocks(pixels, level, px, py) {
  const { width, height } = level, col0 = px * PATCH * width, row0 = py * PATCH * height;
  const col1 = Math.min(cols, col0 + PATCH * width), row1 = Math.min(rows, row0 + PATCH * height);
  for (const diff of diffs) diff.fill(0);
  for (let row = row0; row < row1; row++) {
    const line = Math.floor((row - row0) / height) * (PATCH + 2);
    for (let run = firstRun(row, col0); run < lastRun(row) && runStart[run] < col1; run++) {
      // Differences along the line, so that a run costs the same however long it is.
      const diff = diffs[runCode[run] === FULL ? 0 : 1];
      const begin = Math.max(runStart[run], col0) - col0, end = Math.min(runStop[run], col1) - col0;
      const first = Math.floor(begin / width), last = Math.floor((end - 1) / width);
      const missing = begin - first * width, spare = (last + 1) * width - end;
      diff[line + first] += width - missing;
      diff[line + first + 1] += missing;
      diff[line + last] -= spare;
      diff[line + last + 1] -= width - spare;
    }
  }
  for (let y = 0; y < PATCH; y++) {
    const high = clamp(rows - row0 - y * height, 0, height);
    for (let x = 0, full = 0, partial = 0; x < PATCH; x++) {
      full += diffs[0][y * (PATCH + 2) + x];
      partial += diffs[1][y * (PATCH + 2) + x];
      const stored = full + partial, blocks = high * clamp(cols - col0 - x * width, 0, width);
      const ink = page.least_ink + (1 - page.least_ink) * stored / blocks;
      pixels[y * PATCH + x] = packed(EMPTY_COLOUR.map((empty, c) => stored === 0 ? empty :
        Math.round(empty + ink * ((full * FULL_COLOUR[c] + partial * PARTIAL_COLOUR[c]) / stored - empty))));
    }
  }
}
