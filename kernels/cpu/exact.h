// One row or one column at a time, in double and in plain loops, over only the pairs that the mask allows.
//
// The fast kernels multiply hidden pairs by 0, and add in float: a NaN or infinity in a hidden pair, or an intermediate
// sum that overflows float, gives a result that is not finite. Every such result is recomputed here, and stays only if it
// is correct.
#pragma once
#include "problem.h"

template <class T> static INLINE double dot(const T* x, const T* y, long n) {
  double sums[8] = {};
  long d = 0;
  for (; d + 8 <= n; d += 8)
    for (int i = 0; i < 8; i++) sums[i] += (double)wide(x[d + i]) * (double)wide(y[d + i]);
  for (; d < n; d++) sums[0] += (double)wide(x[d]) * (double)wide(y[d]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}
static INLINE void narrow_to(double x, float& to) { to = (float)x; }
template <class T> static INLINE void narrow_to(double x, T& to) { narrow((float)x, to); }

// A score (natural log) and its derivative by the scaled product.
struct Scored { double score, softcap_grad; };
static INLINE Scored scored(const Problem& a, double product, const Head& at, long query, long key) {
  double s = product * a.scale, softcap_grad = 1;
  if (a.softcap) {
    const double t = __builtin_tanh(s / a.softcap);
    s = a.softcap * t, softcap_grad = 1 - t * t;
  }
  const long distance = query + a.q_offset - key;
  if (at.slope) s -= at.slope * (double)(distance < 0 ? -distance : distance);
  if (at.bias) {
    const double bias = bias_of(a, at, query, key);
    s = bias == -INFINITY ? bias : s + bias;
  }
  return {s, softcap_grad};
}

// f(key) for each key below `bound` that query i of a block row sees.
template <class F> static void keys_of(const Problem& a, long pattern, long row, long i, long bound, const F& f) {
  const int32_t* span = a.row_ranges + (pattern * a.nQ + row) * 4;
  const long W = (a.BK + 31) / 32;
  for (long e = span[0]; e < span[1]; e++)
    for (long j = 0, first = (long)a.row_full_indices[e] * a.BK; j < a.BK && first + j < bound; j++) f(first + j);
  for (long e = span[2]; e < span[3]; e++) {
    const uint32_t* bits = a.bits + ((long)a.row_partial_tiles[e] * a.BQ + i) * W;
    for (long j = 0, first = (long)a.row_partial_indices[e] * a.BK; j < a.BK && first + j < bound; j++)
      if (bits[j / 32] >> (j % 32) & 1) f(first + j);
  }
}
// f(query) for each query that sees key j of a block column.
template <class F> static void queries_of(const Problem& a, long pattern, long col, long j, const F& f) {
  const int32_t* span = a.col_ranges + (pattern * a.nK + col) * 4;
  const long W = (a.BK + 31) / 32;
  for (long e = span[0]; e < span[1]; e++)
    for (long i = 0, first = (long)a.col_full_indices[e] * a.BQ; i < a.BQ && first + i < a.N; i++) f(first + i);
  for (long e = span[2]; e < span[3]; e++) {
    const uint32_t* bits = a.bits + (long)a.col_partial_tiles[e] * a.BQ * W + j / 32;
    for (long i = 0, first = (long)a.col_partial_indices[e] * a.BQ; i < a.BQ && first + i < a.N; i++)
      if (bits[i * W] >> (j % 32) & 1) f(first + i);
  }
}

template <class T> static INLINE const T* line(const void* x, const int64_t (&s)[3], long b, long h, long token) {
  return (const T*)x + b * s[0] + h * s[1] + token * s[2];
}
static INLINE double sink_share(const Problem& a, long h, double lse) {  // of the keys
  return a.sinks ? 1 / (1 + exp((double)a.sinks[h] - lse)) : 1;
}

// Output and lse of the query at position `query`, which is row `at` of q. sums: V doubles.
template <class T>
static void exact_out(const Problem& a, const Head& head, long query, long at, long bound, double* sums, T* out, float* lse) {
  const T* q = line<T>(a.q, a.sq, head.b, head.h, at);
  double top = -INFINITY, total = 0;
  bool any = false;
  const auto score = [&](long key) {
    return scored(a, dot(q, line<T>(a.k, a.sk, head.b, head.hk, key), a.D), head, query, key).score;
  };
  for (long d = 0; d < a.V; d++) sums[d] = 0;
  const uint32_t keys = row_key(a, head, query);
  keys_of(a, head.pattern, query / a.BQ, query % a.BQ, bound, [&](long key) {
    const double s = score(key);
    any |= !a.bias || s != -INFINITY;
    if (s == -INFINITY) return;
    if (!(s <= top)) {  // larger, or NaN, which stays
      const double fade = total == 0 ? 0 : exp(top - s);
      top = s, total *= fade;
      for (long d = 0; d < a.V; d++) sums[d] *= fade;
    }
    const double p = exp(s - top);
    total += p;
    if (a.dropping && !keeps(a, keys, key)) return;
    const T* v = line<T>(a.v, a.sv, head.b, head.hk, key);
    for (long d = 0; d < a.V; d++) sums[d] += p * (double)wide(v[d]);
  });
  const double log_sum = any ? top + log(total) : -INFINITY;
  const double factor = any ? keep_scale(a) / total * sink_share(a, head.h, log_sum) : 0;
  *lse = (float)log_sum;
  for (long d = 0; d < a.V; d++) narrow_to(any ? sums[d] * factor : 0, out[d]);
}

// P and dS (without the factor scale) of a pair.
struct Pair { double p, ds, kept; };
template <class T> static Pair differentiated(const Problem& a, const Head& head, long query, long key, double delta) {
  const T* q = line<T>(a.q, a.sq, head.b, head.h, query);
  const T* k = line<T>(a.k, a.sk, head.b, head.hk, key);
  const long at = (head.b * a.Hq + head.h) * a.N + query;
  const Scored s = scored(a, dot(q, k, a.D), head, query, key);
  if (a.bias && s.score == -INFINITY) return {0, 0, 0};
  const double p = exp(s.score - a.lse[at]);
  const bool stays = !a.dropping || keeps(a, row_key(a, head, query), key);
  const double factor = stays ? keep_scale(a) : 0;
  const double dp =
      stays ? dot(line<T>(a.dout, a.sdo, head.b, head.h, query), line<T>(a.v, a.sv, head.b, head.hk, key), a.V) : 0;
  return {p, p * (dp * factor - delta) * s.softcap_grad, p * factor};
}
template <class T> static double exact_delta(const Problem& a, const Head& head, long query) {
  const long at = (head.b * a.Hq + head.h) * a.N + query;
  const double sum =
      dot(line<T>(a.dout, a.sdo, head.b, head.h, query), line<T>(a.out, a.so, head.b, head.h, query), a.V);
  return sum - (a.dlse ? (double)a.dlse[at] : 0);
}

// dQ of a query. sums: D doubles.
template <class T> static void exact_dq(const Problem& a, const Head& head, long query, double* sums, T* dq) {
  const double delta = exact_delta<T>(a, head, query);
  for (long d = 0; d < a.D; d++) sums[d] = 0;
  keys_of(a, head.pattern, query / a.BQ, query % a.BQ, a.M, [&](long key) {
    const double ds = differentiated<T>(a, head, query, key, delta).ds;
    const T* k = line<T>(a.k, a.sk, head.b, head.hk, key);
    for (long d = 0; d < a.D; d++) sums[d] += ds * (double)wide(k[d]);
  });
  for (long d = 0; d < a.D; d++) narrow_to(sums[d] * a.scale, dq[d]);
}

// dK and dV of a key. sums: D + V doubles.
template <class T> static void exact_dkv(const Problem& a, long b, long hk, long key, double* sums, T* dk, T* dv) {
  const long group = a.Hq / a.Hkv;
  for (long d = 0; d < a.D + a.V; d++) sums[d] = 0;
  for (long h = hk * group; h < (hk + 1) * group; h++) {
    const Head head = head_of(a, b, h);
    queries_of(a, head.pattern, key / a.BK, key % a.BK, [&](long query) {
      const Pair pair = differentiated<T>(a, head, query, key, exact_delta<T>(a, head, query));
      const T* q = line<T>(a.q, a.sq, b, h, query);
      const T* dout = line<T>(a.dout, a.sdo, b, h, query);
      for (long d = 0; d < a.D; d++) sums[d] += pair.ds * (double)wide(q[d]);
      if (pair.kept != 0)
        for (long d = 0; d < a.V; d++) sums[a.D + d] += pair.kept * (double)wide(dout[d]);
    });
  }
  for (long d = 0; d < a.D; d++) narrow_to(sums[d] * a.scale, dk[d]);
  for (long d = 0; d < a.V; d++) narrow_to(sums[a.D + d], dv[d]);
}
