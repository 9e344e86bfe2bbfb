// The gradient of a bias: dS, summed over the pairs that share an element.
//
// A work item is a block column of one head of the bias: it visits the rows of every sample and query head that share this
// head in order, so results do not depend on the number of threads. dS is added to:
//
//   of pairs      bias_sums [bias_samples, bias_heads, bias_rows, M], 0 at first; no other item writes there;
//   of distances  bias_sums [cols, bias_heads, 2 reach + 1], 0 at first; a row per item.
#pragma once
#include "backward.h"

template <class T, bool F> static void add_bias(const Problem& a, const Column<T, false, F, true>& column, long col, long row, float* to) {
  const int n = at_most(a.BQ, a.N - row * a.BQ);
  for (int p = 0; p < column.panels; p++)
    for (int i = 0; i < n; i++) {
      if (!(column.used[p] >> (i / G) & 1)) continue;
      const float* ds = column.ds[p] + i * PW;
      const long query = row * a.BQ + i, key = col * a.BK + p * PW, apart = key - query - a.q_offset + a.reach;
      const int lanes = at_most(PW, column.size - p * PW);
      float* at = a.reach < 0 ? to + (a.bias_rows > 1 ? query * a.M : 0) + key : to + apart;
      if (a.reach < 0 || (apart >= 0 && apart + lanes <= 2 * a.reach + 1))
        for (int j = 0; j < lanes; j++) at[j] += ds[j];
      else
        for (int j = 0; j < lanes; j++) to[apart + j < 0 ? 0 : at_most(apart + j, 2 * a.reach)] += ds[j];
    }
}

template <class T, bool F> static int bias_gradient(const Problem& a) {
  typedef Column<T, false, F, true> Walk;
  const long owners = a.bias_samples * a.bias_heads, group = a.Hq / a.Hkv;
  const long heads = a.Hq / a.bias_heads, samples = a.B / a.bias_samples;  // that share a head of the bias
  const long room = a.reach < 0 ? a.bias_rows * a.M : 2 * a.reach + 1;
  Items items(owners * a.cols);
  int ran = 0;
  on_each(a.threads, [&] {
    Scratch* s = scratch(Walk::floats(a), Walk::pieces);
    if (!s) return;
    __atomic_store_n(&ran, 1, __ATOMIC_RELAXED);
    Walk column(a, *s);
    for (int64_t item; items.take(item);) {
      const long owner = item % owners, col = a.first_col + item / owners;
      float* to = a.bias_sums + (a.reach < 0 ? owner : item) * room;
      for (long member = 0; member < samples * heads; member++) {
        const long b = owner / a.bias_heads + member / heads, h = owner % a.bias_heads + member % heads;
        const Head at = head_of(a, b, h);
        const int32_t* span = a.col_ranges + (at.pattern * a.nK + col) * 4;
        if (span[0] >= span[1] && span[2] >= span[3]) continue;
        column.begin(b, h / group, col);
        for (long e = span[0]; e < span[1]; e++)
          column.meet(at, col, a.col_full_indices[e], -1), add_bias(a, column, col, a.col_full_indices[e], to);
        for (long e = span[2]; e < span[3]; e++)
          column.meet(at, col, a.col_partial_indices[e], a.col_partial_tiles[e]), add_bias(a, column, col, a.col_partial_indices[e], to);
      }
    }
  });
  return ran ? 0 : 1;
}
