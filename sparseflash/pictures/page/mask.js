// The mask: the page's data, decoded, and what it says about a pair of positions.
// Query i and key j are indices in all these files; positions (i + qOffset, j) are what a person reads or types.

const page = JSON.parse(document.getElementById("data").textContent);
const [qLen, kvLen] = page.shape, [bq, bk] = page.block, qOffset = page.q_offset;
const rows = Math.ceil(qLen / bq), cols = Math.ceil(kvLen / bk), wordsPerRow = Math.ceil(bk / 32);
const EMPTY = 0, FULL = 1, FIRST_TILE = 2;

let rowBegin, runStart, runStop, runCode, tiles;  // runs of row r: rowBegin[r] to rowBegin[r + 1]
let images = [];  // of the pattern: { start, shape: [frames, height, width], tokens, place: the order of its tokens }
let pattern = 0;

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function load() {
  const read = async name => new Int32Array(await inflate(page.arrays[name]));
  const [counts, gap, length, code, bits] =
    await Promise.all(["counts", "gap", "length", "code", "tiles"].map(read));
  rowBegin = new Int32Array(counts.length + 1);
  runStart = new Int32Array(gap.length);
  runStop = new Int32Array(gap.length);
  for (let row = 0, run = 0; row < counts.length; row++) {
    for (let n = counts[row], at = 0; n > 0; n--, run++) {
      runStart[run] = at + gap[run];
      at = runStop[run] = runStart[run] + length[run];
    }
    rowBegin[row + 1] = run;
  }
  runCode = code;
  tiles = new Uint32Array(bits.buffer);
  const whole = [gap, length, code].every(array => array.length === rowBegin[counts.length])
    && counts.length === page.patterns.length * rows && tiles.length === page.tiles * bq * wordsPerRow;
  if (!whole) throw new Error("the data of this page is damaged");
  images = await Promise.all(page.images.map(async image => ({
    ...image,
    tokens: image.shape.reduce((product, side) => product * side, 1),
    place: image.place && new Int32Array(await inflate(image.place)),
  })));
}

/** The first run of a block row that ends after a block column. */
function firstRun(row, col) {
  let low = rowBegin[pattern * rows + row], high = rowBegin[pattern * rows + row + 1];
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (runStop[middle] > col) high = middle; else low = middle + 1;
  }
  return low;
}

const lastRun = row => rowBegin[pattern * rows + row + 1];

function codeAt(row, col) {
  const run = firstRun(row, col);
  return run < lastRun(row) && runStart[run] <= col ? runCode[run] : EMPTY;
}

const bit = (code, i, j) =>
  tiles[((code - FIRST_TILE) * bq + i) * wordsPerRow + (j >>> 5)] >>> (j & 31) & 1;

const allowedInTile = new Map();
function allowedPairs(code) {
  if (code < FIRST_TILE) return code * bq * bk;
  if (!allowedInTile.has(code)) {
    let count = 0;
    for (let i = 0; i < bq; i++) for (let j = 0; j < bk; j++) count += bit(code, i, j);
    allowedInTile.set(code, count);
  }
  return allowedInTile.get(code);
}

function at(q, k) {
  const i = Math.floor(q) - qOffset, j = Math.floor(k);
  if (!(i >= 0 && i < qLen && j >= 0 && j < kvLen)) return null;
  const row = Math.floor(i / bq), col = Math.floor(j / bk), code = codeAt(row, col);
  const pairs = Math.min(bq, qLen - row * bq) * Math.min(bk, kvLen - col * bk), allowed = allowedPairs(code);
  return {
    block: [row, col],
    code: ["EMPTY", "FULL", "PARTIAL"][Math.min(code, FIRST_TILE)],
    tile: code < FIRST_TILE ? null : code - FIRST_TILE,
    density: allowed / pairs,
    allowed: code < FIRST_TILE ? code === FULL : bit(code, i % bq, j % bk) === 1,
    allowedPairs: allowed,
    pairs,
  };
}
