// What the query under the pointer sees, at the places of the image or the frames that the keys are.

const SEEN_GAP = 1;  // pixels between frames

/** Which keys a query sees: a byte each. */
function keysSeen(i) {
  const seen = new Uint8Array(kvLen), row = Math.floor(i / bq);
  for (let run = firstRun(row, 0); run < lastRun(row); run++) {
    const code = runCode[run];
    if (code === FULL) seen.fill(1, runStart[run] * bk, runStop[run] * bk);
    else for (let col = runStart[run]; col < runStop[run]; col++) {
      for (let j = 0; j < bk && col * bk + j < kvLen; j++) seen[col * bk + j] = bit(code, i % bq, j);
    }
  }
  return seen;
}

/** The image that a query lies in; of a query beside them all, the first one. */
const imageOf = q => images.find(image => q >= image.start && q < image.start + image.tokens) || images[0];

/** Draw what a query sees; how much of the image and of the tokens beside it that is. */
function drawSeen(i) {
  const q = i + qOffset, image = imageOf(q), [frames, height, width] = image.shape;
  const across = Math.max(1, Math.min(frames, Math.round(Math.sqrt(frames * height / width))));
  const plot = element("seen"), seen = keysSeen(i);
  plot.width = across * (width + SEEN_GAP) - SEEN_GAP;
  plot.height = Math.ceil(frames / across) * (height + SEEN_GAP) - SEEN_GAP;
  const own = plot.getContext("2d"), drawn = own.createImageData(plot.width, plot.height);
  const pixels = new Uint32Array(drawn.data.buffer);
  const colours = [page.colours.unseen, FULL_COLOUR, page.colours.blind, PARTIAL_COLOUR].map(packed);
  let inside = 0;
  for (let place = 0; place < image.tokens; place++) {
    const key = image.start + (image.place ? image.place[place] : place);
    const frame = Math.floor(place / (height * width)), rest = place - frame * height * width;
    const y = Math.floor(frame / across) * (height + SEEN_GAP) + Math.floor(rest / width);
    const x = frame % across * (width + SEEN_GAP) + rest % width;
    inside += seen[key];
    pixels[y * plot.width + x] = colours[seen[key] + (key === q ? 2 : 0)];
  }
  own.putImageData(drawn, 0, 0);
  const all = seen.reduce((sum, one) => sum + one, 0), beside = kvLen - image.tokens;
  element("seen-text").textContent = `query ${number(q)} sees ${number(inside)} of ${number(image.tokens)} places`
    + (frames > 1 ? ` in ${number(frames)} frames` : "")
    + (beside ? `, ${number(all - inside)} of ${number(beside)} tokens beside` : "");
  return { start: image.start, inside, beside: all - inside };
}

function showSeen() {
  if (!images.length || !probe) return;  // the last one stays
  element("seen-part").hidden = false;
  drawSeen(probe.i);
}
