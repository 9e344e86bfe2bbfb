// The walk over block rows: attention, and decoding, whose lanes are the newest queries of all heads that share a key head.
//
// Lanes are queries: S' = K Q', O' = V' P'. So the largest score and the sum of a row are one lane of a vector, Q is
// packed once per block row, and K and V are read in place. The softmax moves its reference only if a score exceeds it by
// more than 8 (in base 2), so that sums and outputs are rarely rescaled.
#pragma once
#include "exact.h"
#include "tiles.h"

constexpr float LEAD = 8;  // by how much a score may pass the reference, in base 2
// A reference of this size has a rounding error of up to 32, and the products that it is subtracted from have none: beyond
// it weights could overflow float.
constexpr float HUGE_SCORE = 1 << 29;

// Which keys the lanes of a panel see: bit `shift + lane` of the word of a key. No words: all of them.
struct Hidden {
  const uint32_t* words;
  long stride;
  int shift;
  uint64_t groups;  // one bit per group of G keys: whether some lane sees it
  uint32_t of(long key) const { return words[key * stride] >> shift; }
};

// What scores may depend on, for each lane.
struct Lanes {
  int32_t* position;  // of its query, offset included
  float* slope;
  uint32_t* key;      // of dropout's row
};

// T: dtype of the operands. P: products of pairs of bf16. F: features.
template <class T, bool P, bool F> struct Rows {
  const Problem& a;
  const int words, dims;  // of q's panels; of the output's: V rounded up to whole products
  const float factor;     // from the products in `scores` to scores in base 2
  float *q, *out, *top, *sum, *scores, *weights, *k_copy, *v_copy, *k_tail, *v_tail;
  Lanes lane;
  float* biases;          // of a panel's lanes, [keys][PW]
  Head head{};            // whose they are: lanes are queries from `query` on
  long query = 0;
  int panels, lanes_used;
  // What is not read where it lies.
  const bool copies;
  const Tiles tiles;

  static int padded(const Problem& a) { return up(a.V, G); }
  static bool copied(const Problem& a) { return !P && (sizeof(T) == 2 || a.V % G); }

  static size_t floats(const Problem& a, long lanes) {
    const long all_lanes = up(lanes, PW), deepest = a.D > padded(a) ? a.D : padded(a);
    return all_lanes * (a.D + padded(a) + 5) + up(a.BK, TILE) * PW * (a.bias ? 3 : 2) + (a.BK + 2 * G) * deepest * 2;
  }
  Rows(const Problem& a, Scratch& s, long lanes)
      : a(a), words(P ? a.D / 2 : a.D), dims(padded(a)), factor(F ? 1.f : (float)(a.scale * LOG2_E)), copies(copied(a)),
        tiles(P && a.D % TILE == 0 && a.V % TILE == 0) {
    const long all_lanes = up(lanes, PW), deepest = a.D > dims ? a.D : dims;
    q = s.take(all_lanes * words), out = s.take(all_lanes * dims), top = s.take(all_lanes), sum = s.take(all_lanes);
    scores = s.take(up(a.BK, TILE) * PW), weights = P ? s.take(up(a.BK, TILE) / 2 * PW) : scores;
    k_copy = s.take(a.BK * deepest), v_copy = s.take(a.BK * deepest);
    k_tail = s.take(G * deepest), v_tail = s.take(G * deepest);
    lane = {s.take<int32_t>(all_lanes), s.take(all_lanes), s.take<uint32_t>(all_lanes)};
    biases = a.bias ? s.take(up(a.BK, TILE) * PW) : nullptr;
  }
  static constexpr int pieces = 14;

  void begin(long lanes) {
    lanes_used = lanes, panels = (lanes + PW - 1) / PW;
    memset(out, 0, (size_t)panels * PW * dims * 4);
    for (int i = 0; i < panels * PW; i++) top[i] = -INFINITY, sum[i] = 0;
    // Also of lanes without a query, whose contents could move the reference of the others.
    for (int i = lanes; i < panels * PW; i++) lane.position[i] = 0, lane.slope[i] = 0, lane.key[i] = 0;
  }
  void describe(long i, const Head& at, long position, long index) {
    if (F) lane.position[i] = position + a.q_offset, lane.slope[i] = at.slope, lane.key[i] = row_key(a, at, index);
  }

  // All panels meet the `n` first keys of a key block. hidden(panel) says what they do not see. Clean: what the values of
  // keys are that no lane sees does not matter, even if it is not finite.
  template <class H> void meet(long b, long hk, long block, int n, bool clean, const H& hidden) {
    const T* k = line<T>(a.k, a.sk, b, hk, block * a.BK);
    const T* v = line<T>(a.v, a.sv, b, hk, block * a.BK);
    if constexpr (TILES && P)
      if (tiles.on) return meet_in_tiles(k, v, n, clean, block * a.BK, hidden);
    const void *k_at = k, *v_at = v;
    long k_line = P ? a.sk[2] / 2 : a.sk[2], v_line = a.sv[2];
    if constexpr (P) pack_pairs(v, a.sv[2], n, a.V, v_copy), v_at = v_copy, v_line = a.V;
    if (copies || (clean && !P)) {
      widen(k, a.sk[2], n, a.D, k_copy, a.D), widen(v, a.sv[2], n, a.V, v_copy, dims);
      k_at = k_copy, v_at = v_copy, k_line = a.D, v_line = dims;
    }
    if (clean)
      for (int key = 0; key < n; key++)
        if (!seen(key, hidden)) forget(key);
    const Lines keys = lines(k_at, k_line, n, words, false, k_tail), values = lines(v_at, v_line, n, dims, P, v_tail);
    for (int p = 0; p < panels; p++) attend(p, keys, values, n, block * a.BK, hidden(p));
  }

  template <class H> bool seen(int key, const H& hidden) const {
    for (int p = 0; p < panels; p++) {
      const Hidden here = hidden(p);
      const uint32_t there = lanes_used >= (p + 1) * PW ? ~0u : (1u << (lanes_used - p * PW)) - 1;
      if (!here.words || (here.of(key) & there & (uint32_t)((1ull << PW) - 1))) return true;
    }
    return false;
  }
  void forget(int key) {
    if constexpr (P)
      for (int d = 0; d < a.V; d++) ((pair*)v_copy)[(long)key / 2 * a.V + d] &= key % 2 ? 0xffff : 0xffff0000;
    else memset(v_copy + (long)key * dims, 0, dims * 4);
  }

  // The same in tiles of TILE keys x TILE lanes. Of v_copy: V turned, [V][up(n, TILE)]; of k_copy: the last keys, where
  // they are fewer than a tile has.
  template <class H> void meet_in_tiles(const T* k, const T* v, int n, bool clean, long first, const H& hidden) {
    const int whole = n / TILE, room = up(n, TILE);
    uint16_t *turned = (uint16_t*)v_copy, *rest = (uint16_t*)k_copy;
    for (int key = 0; key < room; key++) {
      const bool there = key < n && !(clean && !seen(key, hidden));
      for (int d = 0; d < a.V; d++) turned[(long)d * room + key] = there ? v[key * a.sv[2] + d].bits : 0;
    }
    if (n % TILE) memset(rest, 0, TILE * a.D * 2);
    for (int key = whole * TILE; key < n; key++) memcpy(rest + key % TILE * a.D, k + key * a.sk[2], a.D * 2);
    for (int p = 0; p < panels; p++) {
      const Hidden here = hidden(p);
      int groups[64], count = 0;
      for (int t = 0; t < room / TILE; t++)
        if (here.groups >> t * (TILE / G) & ((1 << TILE / G) - 1))
          for (int g = 0; g < TILE / G; g++) groups[count++] = t * (TILE / G) + g;
      if (!count) continue;
      const float* panel = q + (long)p * PW * words;
      if (F && a.bias) read_biases(p, first, n);
      vf largest[C];
      for (int c = 0; c < C; c++) largest[c] = all(-INFINITY);
      for (int i = 0; i < count; i += TILE / G) {
        const int t = groups[i] / (TILE / G);
        const void* rows = t < whole ? (const void*)(k + (long)t * TILE * a.sk[2]) : rest;
        tile_zero();
        for (int d = 0; d < a.D; d += TILE) tile_add((const uint16_t*)rows + d, (t < whole ? a.sk[2] : a.D) * 2, panel + d / 2 * PW);
        tile_store(scores + i * G * PW);
        for (int r = 0; r < TILE; r += R) {
          float* to = scores + (i * G + r) * PW;
          vf acc[R][C];
          for (int j = 0; j < R; j++)
            for (int c = 0; c < C; c++) acc[j][c] = load(to + j * PW + c * VL);
          settle(acc, p, n, first, here, groups[i] + r / G, r % G, to, largest);
        }
      }
      raise(p, largest);
      exponentials(p, first, groups, count);
      for (int d = 0; d < dims; d += TILE) {
        // Scores are weights by now, and their memory free.
        tile_zero();
        for (int i = 0; i < count; i += TILE / G)
          tile_add(turned + (long)d * room + groups[i] * G, room * 2, weights + i * (G / 2) * PW);
        tile_store(scores);
        float* to = out + ((long)p * dims + d) * PW;
        for (int x = 0; x < TILE * PW; x += VL) store(to + x, load(to + x) + load(scores + x));
      }
    }
  }

  void attend(int p, const Lines& keys, const Lines& values, int n, long first, const Hidden& hidden) {
    int groups[64];
    const int count = listed(hidden.groups & ((1ull << (n + G - 1) / G) - 1), groups);
    if (!count) return;
    if (F && a.bias) read_biases(p, first, n);
    vf largest[C];
    for (int c = 0; c < C; c++) largest[c] = all(-INFINITY);
    for (int i = 0; i < count; i++)
      for (int r = 0; r < G; r += R) score(p, keys, n, first, hidden, groups[i], r, scores + (i * G + r) * PW, largest);
    raise(p, largest);
    exponentials(p, first, groups, count);
    // The part of a block is summed separately, which reduces the rounding error of long sums.
    add_products<P>(values, weights, groups, count, false, out + (long)p * PW * dims, dims);
  }

  // Scores of R keys of a group.
  INLINE void score(int p, const Lines& keys, int n, long first, const Hidden& hidden, int g, int r0, float* to, vf (&largest)[C]) {
    vf acc[R][C] = {};
    product<P>(acc, keys.group(g) + r0 * keys.step(g), keys.step(g), 1, words, q + (long)p * PW * words, PW);
    settle(acc, p, n, first, hidden, g, r0, to, largest);
  }
  INLINE void settle(vf (&acc)[R][C], int p, int n, long first, const Hidden& hidden, int g, int r0, float* to, vf (&largest)[C]) {
    if constexpr (F)
      for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) acc[r][c] = shaped(acc[r][c], p * PW + c * VL, first, g * G + r0 + r);
    if (hidden.words || (g + 1) * G > n)
      for (int r = 0; r < R; r++) {
        const int key = g * G + r0 + r;
        const uint32_t seen = key >= n ? 0 : hidden.words ? hidden.of(key) : ~0u;
        for (int c = 0; c < C; c++) acc[r][c] = lanes(seen, c) ? acc[r][c] : all(-INFINITY);
      }
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int c = 0; c < C; c++) {
        store(to + r * PW + c * VL, acc[r][c]);
        largest[c] = larger(largest[c], acc[r][c]);
      }
  }
  // The biases of a panel's lanes for the `n` keys from `first` on.
  void read_biases(int p, long first, int n) {
    for (int i = 0; i < PW; i++) {
      const long row = query + p * PW + i;
      float* to = biases + i;
      if (p * PW + i >= lanes_used)
        for (int key = 0; key < n; key++) to[key * PW] = 0;
      else if (a.reach < 0)
        for (int key = 0; key < n; key++) to[key * PW] = head.bias[row * a.bias_n + (first + key) * a.bias_m];
      else
        for (int key = 0; key < n; key++) to[key * PW] = bias_of(a, head, row, first + key);
    }
    for (long i = (long)n * PW; i < up(n, TILE) * PW; i++) biases[i] = 0;
  }
  // Scores in base 2 from products, for key `number` of the block that starts at `first`.
  INLINE vf shaped(vf x, int at, long first, int number) const {
    x *= all((float)a.scale);
    if (a.softcap) x = all((float)a.softcap) * tanh(x * all((float)(1 / a.softcap)));
    if (a.slopes) {
      vi apart = (vi)load(lane.position + at) - (int32_t)(first + number);
      apart = apart < 0 ? -apart : apart;
      x -= load(lane.slope + at) * __builtin_convertvector(apart, vf);
    }
    if (a.bias) x = biased(x, load(biases + number * PW + at % PW));
    return x * all(LOG2_E);
  }
  void raise(int p, const vf (&largest)[C]) {
    bool passed = false;
    for (int c = 0; c < C; c++) passed |= any(largest[c] * factor > load(top + p * PW + c * VL) + LEAD);
    if (!passed) return;
    for (int c = 0; c < C; c++) {
      float *t = top + p * PW + c * VL, *s = sum + p * PW + c * VL;
      const vf old = load(t), now = larger(old, largest[c] * factor);
      const vf fade = old == all(-INFINITY) ? all(0.f) : exp2(old - now);
      store(t, now), store(s, load(s) * fade);
      float* to = out + (long)p * PW * dims + c * VL;
      for (int d = 0; d < dims; d++, to += PW) store(to, load(to) * fade);
    }
  }
  INLINE void exponentials(int p, long first, const int* groups, int count) {
    for (int c = 0; c < C; c++) {
      const int at = p * PW + c * VL;
      const vf t = load(top + at), shift = t == all(-INFINITY) ? all(0.f) : -t;
      vf total = {};  // of this block alone, as for outputs
      for (int i = 0; i < count * G; i += 2) {
        float* x = scores + i * PW + c * VL;
        vf even = exp2(load(x) * factor + shift), odd = exp2(load(x + PW) * factor + shift);
        total += even + odd;
        if (F && a.dropping) {
          const long key = first + groups[i / G] * G + i % G;
          even = dropped(even, at, key), odd = dropped(odd, at, key + 1);
        }
        if (P) store(weights + i / 2 * PW + c * VL, paired(even, odd));
        else store(x, even), store(x + PW, odd);
      }
      store(sum + at, load(sum + at) + total);
    }
  }
  INLINE vf dropped(vf x, int at, long key) const {
    const vu hash = mixed((vu)load(lane.key + at) + ((uint32_t)(key + 1) * GOLDEN)) >> 8;
    return (vi)hash < (int32_t)a.limit ? x : all(0.f);
  }
  // Which lanes of a panel have results that are not finite, or weights of huge scores.
  uint32_t broken(int p) const {
    uint32_t found = 0;
    for (int c = 0; c < C; c++) {
      const vf t = load(top + p * PW + c * VL);
      vi bad = unlike_itself(load(sum + p * PW + c * VL)) | (t > all(HUGE_SCORE)) | (t < all(-HUGE_SCORE) & t != all(-INFINITY));
      const float* from = out + (long)p * PW * dims + c * VL;
      for (int d = 0; d < a.V; d++, from += PW) bad |= unlike_itself(load(from));
      if (any(bad))
        for (int i = 0; i < VL; i++) found |= (uint32_t)(bad[i] != 0) << (c * VL + i);
    }
    return lanes_used >= (p + 1) * PW ? found : found & ((1u << (lanes_used - p * PW)) - 1);
  }
  // Whether the walk has to be repeated with clean = true: 0 times a NaN among the values of hidden keys is NaN.
  bool again() const {
    for (int p = 0; p < panels; p++)
      if (broken(p)) return true;
    return false;
  }
  // Output of a lane, lse.
  void write(long i, long h, T* to, float* lse) const {
    const float* from = out + i / PW * PW * dims + i % PW;
    const float log_sum = (top[i] + log2f(sum[i])) * LN_2;
    const float share = keep_scale(a) / sum[i] * (a.sinks ? (float)sink_share(a, h, log_sum) : 1.f);
    *lse = log_sum;
    for (long d = 0; d < a.V; d++) narrow(from[d * PW] * share, to[d]);
  }
};

static Hidden nothing_hidden(int) { return {nullptr, 0, 0, ~0ull}; }

template <class T, bool P, bool F> static int forward(const Problem& a) {
  typedef Rows<T, P, F> Walk;
  const long turned_words = (a.BQ + 31) / 32, panels = up(a.BQ, PW) / PW;
  Items items(a.B * a.Hq * a.nQ);
  int ran = 0;
  on_each(a.threads, [&] {
    Scratch* s = scratch(Walk::floats(a, a.BQ) + 2 * a.V, Walk::pieces + 1);
    if (!s) return;
    __atomic_store_n(&ran, 1, __ATOMIC_RELAXED);
    Walk rows(a, *s, a.BQ);
    double* sums = s->take<double>(a.V);
    for (int64_t item; items.take(item);) {
      // Longest rows first; the same row of all heads in succession.
      const Head at = head_of(a, item % (a.B * a.Hq) / a.Hq, item % a.Hq);
      const long row = a.row_order[at.pattern * a.nQ + item / (a.B * a.Hq)], first = row * a.BQ;
      const int n = at_most(a.BQ, a.N - first);
      pack_panels<T, P>(line<T>(a.q, a.sq, at.b, at.h, first), a.sq[2], n, a.D, rows.q);
      rows.begin(n);
      for (int i = 0; i < n; i++) rows.describe(i, at, first + i, first + i);
      rows.head = at, rows.query = first;
      const int32_t* span = a.row_ranges + (at.pattern * a.nQ + row) * 4;
      const auto walk = [&](bool clean) {
        for (long e = span[0]; e < span[1]; e++) {
          const long block = a.row_full_indices[e];
          rows.meet(at.b, at.hk, block, at_most(a.BK, a.M - block * a.BK), false, nothing_hidden);
        }
        for (long e = span[2]; e < span[3]; e++) {
          const long block = a.row_partial_indices[e], tile = a.row_partial_tiles[e];
          const uint32_t* words = a.turned + tile * a.BK * turned_words;
          rows.meet(at.b, at.hk, block, at_most(a.BK, a.M - block * a.BK), clean, [&](int p) {
            return Hidden{words + p * PW / 32, turned_words, p * PW % 32, a.row_cells[tile * panels + p]};
          });
        }
      };
      walk(false);
      if (rows.again()) rows.begin(n), walk(true);
      T* out = (T*)a.out + at.b * a.so[0] + at.h * a.so[1] + first * a.so[2];
      float* lse = a.lse + (at.b * a.Hq + at.h) * a.N + first;
      for (int p = 0; p < rows.panels; p++) {
        const uint32_t broken = rows.broken(p);
        for (int i = p * PW; i < n && i < (p + 1) * PW; i++)
          if (broken >> (i % PW) & 1 || rows.top[i] == -INFINITY) exact_out(a, at, first + i, first + i, a.M, sums, out + i * a.so[2], lse + i);
          else rows.write(i, at.h, out + i * a.so[2], lse + i);
      }
    }
  });
  return ran ? 0 : 1;
}

// The newest N queries of each sample. A work item is some entries of the rows that contain them, for all query heads of a
// key head that share a pattern; a row that is split over several items is merged.
template <class T, bool P, bool F> static int decode(const Problem& a) {
  typedef Rows<T, P, F> Walk;
  const long group = a.Hq / a.Hkv, part = a.V + 2, turned_words = (a.BQ + 31) / 32;
  Items items(a.B * a.Hkv * a.chunks);
  int ran = 0;
  on_each(a.threads, [&] {
    Scratch* s = scratch(Walk::floats(a, group * a.N) + a.BK + group + PW * a.D, Walk::pieces + 3);
    if (!s) return;
    __atomic_store_n(&ran, 1, __ATOMIC_RELAXED);
    Walk rows(a, *s, group * a.N);
    uint32_t* words = s->take<uint32_t>(a.BK);
    int32_t* heads = s->take<int32_t>(group);
    T* lines_of_q = s->take<T>(PW * a.D);
    for (int64_t item; items.take(item);) {
      const long chunk = item % a.chunks, b = item / a.chunks / a.Hkv, hk = item / a.chunks % a.Hkv;
      const long length = a.lengths[b], start = length - a.N, bound = at_most(length, a.M);
      for (long lead = 0; lead < group; lead++) {
        const long pattern = head_of(a, b, hk * group + lead).pattern;
        long count = 0;
        bool first_of_pattern = true;
        for (long g = 0; g < group; g++)
          if (head_of(a, b, hk * group + g).pattern == pattern) {
            if (g < lead) first_of_pattern = false;
            heads[count++] = hk * group + g;
          }
        if (!first_of_pattern) continue;
        long stop;
        for (long at = start < 0 ? 0 : start; at < bound; at = stop) {
          const long row = at / a.BQ, skip = at % a.BQ;
          stop = at_most(bound, (row + 1) * a.BQ);
          const long n = stop - at, lanes = count * n;
          // A copy of the queries, one per lane.
          rows.begin(lanes);
          for (long first = 0; first < lanes; first += PW) {
            const long some = at_most(PW, lanes - first);
            for (long i = 0; i < some; i++) {
              const Head head = head_of(a, b, heads[(first + i) / n]);
              const long query = at + (first + i) % n;
              memcpy(lines_of_q + i * a.D, line<T>(a.q, a.sq, b, head.h, query - start), a.D * sizeof(T));
              rows.describe(first + i, head, query, query);
            }
            pack_panels<T, P>(lines_of_q, a.D, some, a.D, rows.q + first * rows.words);
          }
          const int32_t* span = a.row_ranges + (pattern * a.nQ + row) * 4;
          const long full = span[1] - span[0], entries = full + span[3] - span[2];
          const auto walk = [&](bool clean) {
            for (long e = chunk * a.chunk; e < entries && e < (chunk + 1) * a.chunk; e++) {
              const long block = e < full ? a.row_full_indices[span[0] + e] : a.row_partial_indices[span[2] + e - full];
              if (block * a.BK >= bound) continue;
              const int keys = at_most(a.BK, bound - block * a.BK);
              if (e < full) {
                rows.meet(b, hk, block, keys, false, nothing_hidden);
                continue;
              }
              const uint32_t* tile = a.turned + a.row_partial_tiles[span[2] + e - full] * a.BK * turned_words + skip / 32;
              rows.meet(b, hk, block, keys, clean, [&](int p) {
                Hidden hidden{words, 1, 0, 0};
                for (long key = 0; key < keys; key++) {
                  const uint32_t* at_key = tile + key * turned_words;
                  uint64_t seen = at_key[0];
                  if (skip % 32 + n > 32) seen |= (uint64_t)at_key[1] << 32;
                  seen >>= skip % 32;
                  words[key] = 0;
                  for (long i = p * PW; i < lanes && i < (p + 1) * PW; i++)
                    words[key] |= (uint32_t)(seen >> (i % n) & 1) << (i % PW);
                  if (words[key]) hidden.groups |= 1ull << key / G;
                }
                return hidden;
              });
            }
          };
          walk(false);
          if (rows.again()) rows.begin(lanes), walk(true);
          for (long i = 0; i < lanes; i++) {
            const long h = heads[i / n], query = at + i % n, line_of = (b * a.Hq + h) * a.N + query - start;
            float* to = a.parts + (line_of * a.chunks + chunk) * part;
            to[0] = rows.top[i], to[1] = rows.sum[i];
            for (long d = 0; d < a.V; d++) to[2 + d] = rows.out[i / PW * PW * rows.dims + d * PW + i % PW];
          }
        }
      }
    }
  });
  if (!ran) return 1;
  ran = 0;
  Items merged(a.B * a.Hq * a.N);
  on_each(a.threads, [&] {
    Scratch* s = scratch(2 * a.V, 1);
    if (!s) return;
    __atomic_store_n(&ran, 1, __ATOMIC_RELAXED);
    double* sums = s->take<double>(a.V);
    for (int64_t at; merged.take(at);) {
      const Head head = head_of(a, at / a.N / a.Hq, at / a.N % a.Hq);
      const long i = at % a.N, length = a.lengths[head.b], query = length - a.N + i;
      T* to = (T*)a.out + head.b * a.so[0] + head.h * a.so[1] + i * a.so[2];
      if (query < 0 || query >= a.M) {
        a.lse[at] = -INFINITY;
        for (long d = 0; d < a.V; d++) narrow(0.f, to[d]);
        continue;
      }
      const float* parts = a.parts + at * a.chunks * part;
      double top = -INFINITY, total = 0;
      for (long c = 0; c < a.chunks; c++) top = parts[c * part] > top ? parts[c * part] : top;
      for (long d = 0; d < a.V; d++) sums[d] = 0;
      bool doubtful = top == -INFINITY;
      for (long c = 0; c < a.chunks; c++) {
        const float* from = parts + c * part;
        doubtful |= !(from[1] - from[1] == 0);  // all of its scores may be NaN
        if (from[0] == -INFINITY) continue;
        doubtful |= from[0] > HUGE_SCORE || from[0] < -HUGE_SCORE;
        const double weight = ::exp2(from[0] - top);
        total += weight * from[1];
        for (long d = 0; d < a.V; d++) sums[d] += weight * from[2 + d];
      }
      doubtful |= total - total != 0;
      for (long d = 0; d < a.V; d++) doubtful |= sums[d] - sums[d] != 0;
      if (doubtful) {
        exact_out(a, head, query, i, at_most(length, a.M), sums, to, a.lse + at);
        continue;
      }
      a.lse[at] = (float)((top + ::log2(total)) * 0.69314718055994530942);
      const double share = sink_share(a, head.h, a.lse[at]) / total;
      for (long d = 0; d < a.V; d++) narrow_to(sums[d] * share, to[d]);
    }
  });
  return ran ? 0 : 1;
}
