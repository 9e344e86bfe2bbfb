// The walk over block columns: dQ, dK and dV in one pass, five products per entry.
//
// Lanes are keys: K' and V' are packed once per column, Q and dO are read in place, dK' and dV' stay in scratch memory
// until the column is done. dQ is accumulated in place, each block row in the order of its columns: a column waits for its
// turn. So results do not depend on the number of threads, and no sum is atomic. The last column of a row also rounds it
// to its dtype, and checks that it is finite.
#pragma once
#include "exact.h"

static INLINE void pause(int& spins) {
  if (++spins > 2000) sched_yield();
#if defined(__x86_64__)
  else _mm_pause();
#endif
}
// How many of the ascending numbers list[first] to list[last - 1] are below x.
static INLINE long below(const int32_t* list, long first, long last, int32_t x) {
  const long start = first;
  while (first < last) {
    const long middle = (first + last) / 2;
    if (list[middle] < x) first = middle + 1;
    else last = middle;
  }
  return first - start;
}

// T, P and F as in Rows.
// BIAS: for the gradient of a bias, dS is the gradient by scores after the cap, and nothing is summed here.
template <class T, bool P, bool F, bool BIAS = false> struct Column {
  const Problem& a;
  const int k_words, v_words, k_dims, v_dims, k_line;  // k_line: of keys as products for dQ read them
  const float factor;
  float *k, *v, *dk, *dv, *k_lines, *weights, *dp, *scores, *softcap_grad, *q_copy, *do_copy, *q_tail, *do_tail, *lse_tail, *delta_tail;
  float *q_pair_tail, *do_pair_tail;
  float* ds[64];       // of each panel: dS of the rows' G groups, queries one after another
  uint64_t used[64];   // of each panel: which groups there are
  double* sums;
  int panels, size;    // of this column
  static constexpr int E = P ? 2 : 1;  // numbers a word
  const bool copies;
  const bool in_place;  // dq holds the sums

  static bool copied(const Problem& a) { return !P && (sizeof(T) == 2 || a.D % G || a.V % G); }
  static size_t floats(const Problem& a) {
    const long all_lanes = up(a.BK, PW), rows = up(a.BQ, G), D = up(a.D, PW), V = up(a.V, PW);
    return all_lanes * (2 * D + 2 * V) + all_lanes * D + rows * PW * 4 + rows * all_lanes + (rows + 2 * G) * (D + V) + 2 * G + 4 * (D + V);
  }
  static constexpr int pieces = 20 + 32;
  Column(const Problem& a, Scratch& s)
      : a(a), k_words(P ? a.D / 2 : a.D), v_words(P ? a.V / 2 : a.V), k_dims(up(a.D, G)), v_dims(up(a.V, G)),
        k_line(up(a.D, PW)), factor(F ? 1.f : (float)(a.scale * LOG2_E)), copies(copied(a)), in_place(!a.dq_sum) {
    const long all_lanes = up(a.BK, PW), rows = up(a.BQ, G);
    k = s.take(all_lanes * k_words), v = s.take(all_lanes * v_words);
    dk = s.take(all_lanes * k_dims), dv = s.take(all_lanes * v_dims);
    k_lines = s.take(all_lanes / E * k_line);
    weights = s.take(rows * PW), dp = s.take(rows * PW), scores = P ? s.take(rows * PW) : nullptr;
    softcap_grad = F ? s.take(rows * PW) : nullptr;
    for (int p = 0; p < all_lanes / PW; p++) ds[p] = s.take(rows * PW / E);
    q_copy = s.take(rows * k_dims), do_copy = s.take(rows * v_dims);
    q_tail = s.take(G * k_dims), do_tail = s.take(G * v_dims);
    q_pair_tail = s.take(G / 2 * k_dims), do_pair_tail = s.take(G / 2 * v_dims);
    lse_tail = s.take(G), delta_tail = s.take(G), sums = s.take<double>(a.D + a.V);
  }

  void begin(long b, long hk, long col) {
    size = at_most(a.BK, a.M - col * a.BK), panels = (size + PW - 1) / PW;
    const T *keys = line<T>(a.k, a.sk, b, hk, col * a.BK), *values = line<T>(a.v, a.sv, b, hk, col * a.BK);
    pack_panels<T, P>(keys, a.sk[2], size, a.D, k);
    pack_panels<T, P>(values, a.sv[2], size, a.V, v);
    if constexpr (BIAS) return;
    memset(k_lines, 0, (size_t)panels * PW / E * k_line * 4);
    if constexpr (P)
      for (int first = 0; first < size; first += 2)
        pack_pairs(keys + first * a.sk[2], a.sk[2], at_most(2, size - first), a.D, k_lines + first / 2 * k_line);
    else widen(keys, a.sk[2], size, a.D, k_lines, k_line, in_place ? (float)a.scale : 1.f);
    // 0 times NaN or infinity is NaN, so keys that no query sees are left out of the sums.
    for (int i = 0; i < size; i++)
      if (!seen_at_all(b, hk, col, i)) forget(i);
    memset(dk, 0, (size_t)panels * PW * k_dims * 4), memset(dv, 0, (size_t)panels * PW * v_dims * 4);
  }

  bool seen_at_all(long b, long hk, long col, int key) const {
    const long group = a.Hq / a.Hkv, words = (a.BK + 31) / 32;
    for (long h = hk * group; h < (hk + 1) * group; h++) {
      const int32_t* span = a.col_ranges + (head_of(a, b, h).pattern * a.nK + col) * 4;
      if (span[0] < span[1]) return true;
      for (long e = span[2]; e < span[3]; e++)
        if (a.seen_keys[a.col_partial_tiles[e] * words + key / 32] >> (key % 32) & 1) return true;
    }
    return false;
  }
  void forget(int key) {
    if constexpr (P)
      for (int d = 0; d < a.D; d++) ((pair*)k_lines)[(long)key / 2 * k_line + d] &= key % 2 ? 0xffff : 0xffff0000;
    else memset(k_lines + (long)key * k_line, 0, k_line * 4);
  }

  // One block of the column, in a block row of a query head; tile < 0: a FULL block.
  void meet(const Head& at, long col, long row, long tile) {
    const int n = at_most(a.BQ, a.N - row * a.BQ), groups = (n + G - 1) / G;
    const long first = (at.b * a.Hq + at.h) * a.N + row * a.BQ;
    const T* q = line<T>(a.q, a.sq, at.b, at.h, row * a.BQ);
    const T* dout = line<T>(a.dout, a.sdo, at.b, at.h, row * a.BQ);
    Lines q_rows, do_rows, q_sums, do_sums;  // for scores; for dK and dV
    if (copies) {
      widen(q, a.sq[2], n, a.D, q_copy, k_dims), widen(dout, a.sdo[2], n, a.V, do_copy, v_dims);
      q_rows = q_sums = lines(q_copy, k_dims, n, k_dims, false, q_tail);
      do_rows = do_sums = lines(do_copy, v_dims, n, v_dims, false, do_tail);
    } else {
      q_rows = q_sums = lines(q, a.sq[2] / E, n, k_words, false, q_tail);
      do_rows = do_sums = lines(dout, a.sdo[2] / E, n, v_words, false, do_tail);
    }
    if constexpr (P) {
      pack_pairs(q, a.sq[2], n, a.D, q_copy), pack_pairs(dout, a.sdo[2], n, a.V, do_copy);
      q_sums = lines(q_copy, a.D, n, a.D, true, q_pair_tail), do_sums = lines(do_copy, a.V, n, a.V, true, do_pair_tail);
    }
    const float *lse = a.lse2 + first, *delta = a.delta + first;
    for (int r = 0; r < G; r++) {
      const bool there = n / G * G + r < n;
      lse_tail[r] = there ? lse[n / G * G + r] : INFINITY, delta_tail[r] = there ? delta[n / G * G + r] : 0;
    }
    const uint64_t every = (1ull << groups) - 1;
    const long words = (a.BK + 31) / 32, all_panels = up(a.BK, PW) / PW;
    for (int p = 0; p < panels; p++) {
      used[p] = tile < 0 ? every : a.col_cells[tile * all_panels + p] & every;
      int numbers[64];
      const int count = listed(used[p], numbers);
      if (!count) continue;
      const uint32_t* bits = tile < 0 ? nullptr : a.bits + tile * a.BQ * words + p * PW / 32;
      for (int i = 0; i < count; i++) {
        const int g = numbers[i];
        const float *l = g < n / G ? lse + g * G : lse_tail, *d = g < n / G ? delta + g * G : delta_tail;
        for (int r = 0; r < G; r += R) weigh(p, i, g, r, at, col, row, q_rows, do_rows, l + r, d + r, bits, words);
      }
      if constexpr (BIAS) continue;
      add_products<P>(do_sums, P ? scores : weights, numbers, count, false, dv + (long)p * PW * v_dims, v_dims);
      add_products<P>(q_sums, P ? dp : ds[p], numbers, count, !P, dk + (long)p * PW * k_dims, k_dims);
    }
    if constexpr (!BIAS) take_turn(at, col, row, n, groups, first);
  }

  // P and dS of R queries of a group: row i G + r0 of what products for dV read, g G + r0 of what those for dQ do.
  INLINE void weigh(int p, int i, int g, int r0, const Head& at, long col, long row, const Lines& q_rows,
                    const Lines& do_rows, const float* lse, const float* delta, const uint32_t* bits, long words) {
    vf acc[R][C] = {};
    product<P>(acc, q_rows.group(g) + r0 * q_rows.step(g), q_rows.step(g), 1, k_words, k + (long)p * PW * k_words, PW);
    const bool edge = (p + 1) * PW > size;
    float* x = weights + (i * G + r0) * PW;
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int c = 0; c < C; c++) {
        vf s = acc[r][c];
        if constexpr (F) s = shaped(s, at, p * PW + c * VL + col * a.BK, row * a.BQ + g * G + r0 + r, softcap_grad + (i * G + r0 + r) * PW + c * VL);
        vf y = exp2(s * factor - lse[r], 1);  // a probability, whatever rounding makes of huge scores
        if (bits || edge) y = seen(bits, words, g * G + r0 + r, p, c, edge) ? y : all(0.f);
        store(x + r * PW + c * VL, y);
      }
    vf grad[R][C] = {};
    product<P>(grad, do_rows.group(g) + r0 * do_rows.step(g), do_rows.step(g), 1, v_words, v + (long)p * PW * v_words, PW);
    UNROLL
    for (int r = 0; r < R; r += 2)
      UNROLL
      for (int c = 0; c < C; c++) {
        float* at_lane = x + r * PW + c * VL;
        vf p0 = load(at_lane), p1 = load(at_lane + PW), g0 = grad[r][c], g1 = grad[r + 1][c];
        vf w0 = p0, w1 = p1;
        if (F && a.dropping) {
          const long key = col * a.BK + p * PW + c * VL, query = row * a.BQ + g * G + r0 + r;
          const vi k0 = stays(at, query, key), k1 = stays(at, query + 1, key);
          g0 = k0 ? g0 * all(keep_scale(a)) : all(0.f), g1 = k1 ? g1 * all(keep_scale(a)) : all(0.f);
          w0 = k0 ? w0 : all(0.f), w1 = k1 ? w1 : all(0.f);
        }
        vf s0 = p0 * (g0 - delta[r]), s1 = p1 * (g1 - delta[r + 1]);
        if (F && a.softcap && !BIAS) {
          const float* b = softcap_grad + (i * G + r0 + r) * PW + c * VL;
          s0 *= load(b), s1 *= load(b + PW);
        }
        if (F && a.bias) {  // pairs hidden by -inf, like those that the mask hides
          s0 = p0 == all(0.f) ? all(0.f) : s0, s1 = p1 == all(0.f) ? all(0.f) : s1;
        }
        if (bits || edge) {  // a hidden pair's product may not be finite, and 0 times it would be NaN
          s0 = seen(bits, words, g * G + r0 + r, p, c, edge) ? s0 : all(0.f);
          s1 = seen(bits, words, g * G + r0 + r + 1, p, c, edge) ? s1 : all(0.f);
        }
        if constexpr (P) {
          const int line = (i * (G / 2) + (r0 + r) / 2) * PW + c * VL;
          store(scores + line, paired(w0, w1)), store(dp + line, paired(s0, s1));
          bf16* to = (bf16*)ds[p] + (long)(g * G + r0 + r) * PW + c * VL;
          store_bf16(to, s0), store_bf16(to + PW, s1);
        } else {
          float* to = ds[p] + (g * G + r0 + r) * PW + c * VL;
          store(to, s0), store(to + PW, s1);
          if (F) store(at_lane, w0), store(at_lane + PW, w1);
        }
      }
  }
  INLINE vi seen(const uint32_t* bits, long words, int query, int p, int c, bool edge) const {
    uint32_t found = bits ? bits[at_most(query, a.BQ - 1) * words] >> (p * PW % 32) : ~0u;
    if (edge) found &= (uint32_t)((1ull << (size - p * PW)) - 1);
    return lanes(found, c);
  }
  INLINE vf shaped(vf x, const Head& at, long key, long query, float* bent) const {
    x *= all((float)a.scale);
    if (a.softcap) {
      x = tanh(x * all((float)(1 / a.softcap)));
      store(bent, all(1.f) - x * x);
      x *= all((float)a.softcap);
    }
    if (a.slopes) {
      vi apart;
      for (int i = 0; i < VL; i++) apart[i] = i;
      apart += (int32_t)(key - query - a.q_offset);
      apart = apart < 0 ? -apart : apart;
      x -= all(at.slope) * __builtin_convertvector(apart, vf);
    }
    if (a.bias) x = biased(x, biases(at, key, query));
    return x * all(LOG2_E);
  }
  // Those of VL keys from `key` on; of keys and queries past the end, of any.
  INLINE vf biases(const Head& at, long key, long query) const {
    query = at_most(query, a.N - 1);
    const long apart = key - query - a.q_offset;
    if (a.reach < 0 ? a.bias_m == 1 && key + VL <= a.M : apart >= -a.reach && apart + VL - 1 <= a.reach)
      return load(at.bias + (a.reach < 0 ? query * a.bias_n + key : apart));
    vf found;
    for (int i = 0; i < VL; i++) found[i] = bias_of(a, at, query, at_most(key + i, a.M - 1));
    return found;
  }
  INLINE vi stays(const Head& at, long query, long key) const {
    vu number;
    for (int i = 0; i < VL; i++) number[i] = i;
    const vu hash = mixed(row_key(a, at, query) + (number + (uint32_t)(key + 1)) * GOLDEN) >> 8;
    return (vi)hash < (int32_t)a.limit;
  }

  // Add this column's part of dQ to a block row, after all columns before it.
  void take_turn(const Head& at, long col, long row, int n, int groups, long first) {
    int32_t* turn = a.turns + (at.b * a.Hq + at.h) * a.nQ + row;
    const int32_t* span = a.row_ranges + (at.pattern * a.nQ + row) * 4;
    const long rank = below(a.row_full_indices, span[0], span[1], col) + below(a.row_partial_indices, span[2], span[3], col);
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank;) pause(spins);
    const long heads = a.held * (a.Hq / a.Hkv), index = at.b * a.Hq + at.h;
    float* sum = in_place ? (float*)a.dq + first * a.D : a.dq_sum + (index % heads * a.N + row * a.BQ) * a.D;
    for (int g = 0; g < groups; g++) {
      bool none = true;
      for (int p = 0; p < panels; p++) none &= !(used[p] >> g & 1);
      if (none) continue;
      for (int r0 = 0; r0 < G; r0 += R)
        for (int d = 0; d < a.D; d += PW) {
          vf acc[R][C] = {};
          for (int p = 0; p < panels; p++)
            if (used[p] >> g & 1)
              product<P>(acc, (const word*)ds[p] + (g * G + r0) * (PW / E), PW / E, 1, PW / E, k_lines + (long)p * PW / E * k_line + d, k_line);
          for (int r = 0; r < R && g * G + r0 + r < n; r++) {
            float* to = sum + (long)(g * G + r0 + r) * a.D + d;
            if (d + PW <= a.D)
              for (int c = 0; c < C; c++) store(to + c * VL, load(to + c * VL) + acc[r][c]);
            else
              for (int i = 0; i < a.D - d; i++) to[i] += acc[r][i / VL][i % VL];
          }
        }
    }
    if (rank + 1 == span[1] - span[0] + span[3] - span[2]) {
      T* dq = (T*)a.dq + first * a.D;
      for (int i = 0; i < n; i++) {
        bool finite = true;
        for (long d = 0; d < a.D; d++) finite &= sum[i * a.D + d] - sum[i * a.D + d] == 0;
        if (!finite) exact_dq(a, at, row * a.BQ + i, sums, dq + i * a.D);
        else if (!in_place)
          for (long d = 0; d < a.D; d++) narrow(sum[i * a.D + d] * (float)a.scale, dq[i * a.D + d]);
      }
    }
    __atomic_store_n(turn, (int32_t)(rank + 1), __ATOMIC_RELEASE);
  }

  void finish(long b, long hk, long col) {
    T *to_k = (T*)a.dk + ((b * a.Hkv + hk) * a.M + col * a.BK) * a.D, *to_v = (T*)a.dv + ((b * a.Hkv + hk) * a.M + col * a.BK) * a.V;
    for (int p = 0; p < panels; p++) {
      uint32_t doubtful = 0;
      for (int c = 0; c < C; c++) {
        vi bad{};
        for (int d = 0; d < a.D; d++) bad |= unlike_itself(load(dk + (long)p * PW * k_dims + d * PW + c * VL));
        for (int d = 0; d < a.V; d++) bad |= unlike_itself(load(dv + (long)p * PW * v_dims + d * PW + c * VL));
        if (any(bad))
          for (int i = 0; i < VL; i++) doubtful |= (uint32_t)(bad[i] != 0) << (c * VL + i);
      }
      for (int i = p * PW; i < size && i < (p + 1) * PW; i++) {
        T *k_out = to_k + i * a.D, *v_out = to_v + i * a.V;
        if (doubtful >> (i % PW) & 1) {
          exact_dkv(a, b, hk, col * a.BK + i, sums, k_out, v_out);
          continue;
        }
        const float *x = dk + (long)p * PW * k_dims + i % PW, *y = dv + (long)p * PW * v_dims + i % PW;
        for (long d = 0; d < a.D; d++) narrow(x[d * PW] * (float)a.scale, k_out[d]);
        for (long d = 0; d < a.V; d++) narrow(y[d * PW] * (F ? keep_scale(a) : 1.f), v_out[d]);
      }
    }
  }
};

template <class T, bool P, bool F> static int backward(const Problem& a) {
  typedef Column<T, P, F> Walk;
  const long group = a.Hq / a.Hkv, all_heads = a.B * a.Hkv;
  int ran = 1;
  for (long first = 0; ran && first < all_heads; first += a.held) {
    const long heads = at_most(a.held, all_heads - first);
    // The values per query. dQ is 0 until a column adds to it.
    over(a.threads, heads * group * a.N, [&](int64_t i) {
      const long at = first * group * a.N + i, b = at / (a.Hq * a.N), h = at / a.N % a.Hq, query = at % a.N;
      const T *dout = line<T>(a.dout, a.sdo, b, h, query), *out = line<T>(a.out, a.so, b, h, query);
      float sum[PW] = {};
      for (long d = 0; d < a.V; d++) sum[d % PW] += wide(dout[d]) * wide(out[d]);
      float total = 0;
      for (int d = 0; d < PW; d++) total += sum[d];
      a.delta[at] = total - (a.dlse ? a.dlse[at] : 0.f);
      a.lse2[at] = a.lse[at] == -INFINITY ? INFINITY : a.lse[at] * LOG2_E;
      memset((T*)a.dq + at * a.D, 0, a.D * sizeof(T));
      if (a.dq_sum) memset(a.dq_sum + i * a.D, 0, a.D * 4);
    });
    // With many heads a thread takes whole heads, and nothing waits. Otherwise threads take columns in ascending order, of
    // all heads in turn; a column waits only for earlier ones of its head, which have been taken before it.
    const bool whole = heads % a.threads == 0 || heads >= 8 * a.threads;
    Items items(whole ? heads : heads * a.nK);
    ran = 0;
    on_each(a.threads, [&] {
      Scratch* s = scratch(Walk::floats(a), Walk::pieces);
      if (!s) return;
      __atomic_store_n(&ran, 1, __ATOMIC_RELAXED);
      Walk column(a, *s);
      for (int64_t item; items.take(item);) {
        const long head = first + item % heads, b = head / a.Hkv, hk = head % a.Hkv;
        for (long col = whole ? 0 : item / heads; col < a.nK; col++) {
          column.begin(b, hk, col);
          for (long h = hk * group; h < (hk + 1) * group; h++) {
            const Head at = head_of(a, b, h);
            const int32_t* span = a.col_ranges + (at.pattern * a.nK + col) * 4;
            for (long e = span[0]; e < span[1]; e++) column.meet(at, col, a.col_full_indices[e], -1);
            for (long e = span[2]; e < span[3]; e++) column.meet(at, col, a.col_partial_indices[e], a.col_partial_tiles[e]);
          }
          column.finish(b, hk, col);
          if (!whole) break;
        }
      }
    });
  }
  return ran ? 0 : 1;
}
