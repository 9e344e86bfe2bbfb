// The arguments of a call, its threads, and each thread's working memory.
#pragma once
#include <sched.h>
#include <stdlib.h>
#include "vectors.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define OUT_OF_BOUNDS(at, size) ASAN_POISON_MEMORY_REGION(at, size)
#define UNWRITTEN(at, size) ASAN_UNPOISON_MEMORY_REGION(at, size), memset(at, 0x7f, size)
#else
#define OUT_OF_BOUNDS(at, size) (void)0
#define UNWRITTEN(at, size) (void)0
#endif

// native.py fills in the fields in this order; each has eight bytes. Tensors are [batch, heads, tokens, dim]; strides are
// in elements, of the first three dims, and the last one is 1. Shape legend: P patterns, nQ / nK block rows /
// columns, T tiles, BQ x BK tokens a block, W = ceil(BK / 32), W' = ceil(BQ / 32).
struct Problem {
  const void *q, *k, *v;
  void* out;
  float* lse;                            // [B, Hq, N], natural log, of the keys alone
  const void* dout;
  const float* dlse;                     // [B, Hq, N] or none
  void *dq, *dk, *dv;                    // [B, H, tokens, dim], contiguous
  float* dq_sum;                         // sums of dQ of `held` key heads where dq cannot hold them, or none
  float *delta, *lse2;                   // [B, Hq, N]: rowsum(dO O) - dlse, and lse in base 2
  int32_t* turns;                        // [B, Hq, nQ], 0 at first
  const float* slopes;                   // with slope_b, slope_h between those of samples and heads; or none
  const float* sinks;                    // [Hq] or none
  const float* bias;                     // with bias_b, bias_h, bias_n, bias_m of pairs, or with reach of distances; or none
  float* bias_sums;                      // see bias.h
  const int32_t *row_ranges, *row_full_indices, *row_partial_indices, *row_partial_tiles, *row_order;
  const int32_t *col_ranges, *col_full_indices, *col_partial_indices, *col_partial_tiles;
  const int32_t* pattern_of;             // with pattern_b, pattern_h between those of samples and heads
  const uint32_t* bits;                  // [T, BQ, W]: bit j of word w of query i: sees it key 32 w + j?
  const uint32_t* seen_keys;             // [T, W]: those of them that any query sees
  const uint32_t* turned;                // [T, BK, W']: the same from the side of the keys
  const uint64_t *row_cells, *col_cells; // [T, panels]: which G lines of the other side any lane of a panel meets
  const int64_t* lengths;                // decode: [B]; of q the last ones stand there. Or none.
  float* parts;                          // decode: what items leave to be merged
  int64_t sq[3], sk[3], sv[3], so[3], sdo[3];
  int64_t B, Hq, Hkv, N, M, D, V, BQ, BK, nQ, nK;
  int64_t slope_b, slope_h, pattern_b, pattern_h, q_offset;
  int64_t bias_b, bias_h, bias_n, bias_m, reach;  // reach -1: of pairs
  int64_t bias_samples, bias_heads, bias_rows;    // of a bias's gradient: its dims before the last, rows 1 or N
  int64_t first_col, cols;                        // likewise: block columns of this call
  int64_t kind;                          // of numbers: 0 float, 1 bf16, 2 fp16
  int64_t held;                          // key heads at a time in the backward
  int64_t chunk, chunks;                 // decode: entries of an item, and items a row
  int64_t dropping, limit, seed_low, seed_high;  // dropout keeps hashes below limit, of 2^24
  int64_t threads;
  double scale, softcap;                 // softcap 0: none
};

// Threads are torch's, through its C function torch_parallel_for, which the loader of this library passes in.
typedef void (*Range)(int64_t, int64_t, void*);
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, Range, void*);
static ParallelFor parallel_for = nullptr;

// Run work() once on each thread. Torch may run some of these in succession on fewer threads, or all on this one, so work
// takes its items from a counter, and an item may wait only for items taken before it.
template <class F> static void on_each(long threads, const F& work) {
  if (!parallel_for || threads <= 1) return work();
  const Range some = [](int64_t first, int64_t last, void* context) {
    for (; first < last; first++) (*(const F*)context)();
  };
  if (parallel_for(0, threads, 1, some, (void*)&work)) work();
}

// A counter that threads take items from, in ascending order.
struct Items {
  int64_t next = 0, count;
  explicit Items(int64_t n) : count(n) {}
  bool take(int64_t& item) {
    item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    return item < count;
  }
};
// Run work(i) for i < n; each thread takes several consecutive i at a time.
template <class F> static void over(long threads, int64_t n, const F& work) {
  const int64_t each = 256;
  Items items((n + each - 1) / each);
  on_each(threads, [&] {
    for (int64_t item; items.take(item);)
      for (int64_t i = item * each; i < n && i < (item + 1) * each; i++) work(i);
  });
}

// A thread's memory, kept between calls until the thread ends. It is allocated before a thread takes its first item: if
// that fails, the other threads do the work; if it fails in all threads, the call fails.
struct Scratch {
  char* base;
  size_t size, used;
  bool leaves;  // with its thread
  template <class T = float> T* take(size_t count) {
    T* p = (T*)(base + used);
    UNWRITTEN(p, count * sizeof(T));
    used += (count * sizeof(T) + 63 + 128) / 64 * 64;  // two lines apart: panels would share sets of a cache
    return p;
  }
};
// The function that C++'s runtime calls for thread_local objects; pthread's keys would need glibc 2.34.
#if defined(__GLIBC__)
extern "C" int __cxa_thread_atexit_impl(void (*)(void*), void*, void*);
extern "C" void* __dso_handle;
static bool at_thread_end(void (*f)(void*), void* x) { return !__cxa_thread_atexit_impl(f, x, &__dso_handle); }
#else
static bool at_thread_end(void (*)(void*), void*) { return false; }
#endif
static Scratch* scratch(size_t floats, int pieces) {
  static thread_local Scratch own{nullptr, 0, 0, false};
  const size_t need = (floats * 4 + (size_t)pieces * 256 + 4095) / 4096 * 4096;
  if (own.size < need) {
    free(own.base);
    own.base = (char*)aligned_alloc(4096, need);
    own.size = own.base ? need : 0;
    if (!own.leaves) own.leaves = at_thread_end([](void* s) { free(((Scratch*)s)->base), *(Scratch*)s = {}; }, &own);
  }
  own.used = 0;
  OUT_OF_BOUNDS(own.base, own.size);
  return own.base ? &own : nullptr;
}

static INLINE long up(long n, long to) { return (n + to - 1) / to * to; }
static INLINE long at_most(long a, long b) { return a < b ? a : b; }

struct Head {
  long b, h, hk;    // sample, query head, key head
  long pattern;
  float slope;
  const float* bias;  // of its pairs, or of distance 0; or none
};
static INLINE Head head_of(const Problem& a, long b, long h) {
  const float slope = a.slopes ? a.slopes[b * a.slope_b + h * a.slope_h] : 0.f;
  const float* bias = a.bias ? a.bias + b * a.bias_b + h * a.bias_h + (a.reach < 0 ? 0 : a.reach) : nullptr;
  return {b, h, h / (a.Hq / a.Hkv), a.pattern_of[b * a.pattern_b + h * a.pattern_h], slope, bias};
}
// The bias of a pair.
static INLINE float bias_of(const Problem& a, const Head& at, long query, long key) {
  if (a.reach < 0) return at.bias[query * a.bias_n + key * a.bias_m];
  const long apart = key - query - a.q_offset;
  return at.bias[apart < -a.reach ? -a.reach : apart > a.reach ? a.reach : apart];
}
// A score with its bias: -inf hides the pair, whatever the score is.
static INLINE vf biased(vf x, vf bias) { return bias == all(-INFINITY) ? bias : x + bias; }
static INLINE uint32_t row_key(const Problem& a, const Head& at, long query) {
  const uint32_t key = absorbed(absorbed(0, (uint32_t)a.seed_low), (uint32_t)a.seed_high);
  return absorbed(absorbed(key, (uint32_t)(at.b * a.Hq + at.h)), absorbed(0, (uint32_t)query));
}
static INLINE bool keeps(const Problem& a, uint32_t row, long key) {
  return (int64_t)(mixed(row + (uint32_t)(key + 1) * GOLDEN) >> 8) < a.limit;
}
static INLINE float keep_scale(const Problem& a) { return a.dropping ? (float)(16777216.0 / (double)a.limit) : 1.f; }
// Whether a score in base 2 is more than a product times the factor. (Also for a factor of 0 or nearly 0, times which -inf
// would not hide a pair.)
static INLINE bool featured(const Problem& a) {
  return a.softcap || a.slopes || a.bias || a.dropping || !(a.scale * LOG2_E >= 1.17549435e-38f);
}

// Lines x [n][dim] as panels [panel][dim or dim / 2][PW], one line per lane; 0 in lanes without a line.
template <class T, bool P> static void pack_panels(const T* x, long stride, int n, int dim, float* to) {
  const int words = P ? dim / 2 : dim;
  for (int first = 0; first < n; first += PW, to += (long)PW * words)
    for (int lane = 0; lane < PW; lane++) {
      const T* line = x + (long)(first + lane) * stride;
      if (first + lane >= n)
        for (int d = 0; d < words; d++) to[d * PW + lane] = 0;
      else if constexpr (P)
        for (int d = 0; d < words; d++) memcpy(&to[d * PW + lane], line + 2 * d, 4);
      else
        for (int d = 0; d < words; d++) to[d * PW + lane] = wide(line[d]);
    }
}
// Lines x [n][dim] of bf16 as pairs of lines [ceil(n / 2)][dim]
static void pack_pairs(const bf16* x, long stride, int n, int dim, float* to) {
  for (int k = 0; k < n; k += 2) {
    const bf16 *first = x + (long)k * stride, *second = first + stride;
    pair* line = (pair*)to + (long)k / 2 * dim;
    for (int d = 0; d < dim; d++) line[d] = first[d].bits | (k + 1 < n ? (uint32_t)second[d].bits << 16 : 0);
  }
}
// Lines x [n][dim] as floats [n][line]
template <class T> static void widen(const T* x, long stride, int n, int dim, float* to, long line, float factor = 1) {
  for (int k = 0; k < n; k++, x += stride, to += line) {
    for (int d = 0; d < dim; d++) to[d] = wide(x[d]) * factor;
    for (int d = dim; d < line; d++) to[d] = 0;
  }
}

// Lines of an operand as products read them: whole groups of G in place, a shorter last group in a copy padded with
// zeros.
struct Lines {
  const word* at;
  long line;        // words between lines
  const float* tail;
  long tail_line;
  int whole;        // groups that are read in place
  int each;         // lines of a group: G, or G / 2 pairs
  const word* group(int g) const { return g < whole ? at + (long)g * each * line : tail; }
  long step(int g) const { return g < whole ? line : tail_line; }
};
// `n` tokens in lines of `words` words; half as many lines, rounded up, if lines are pairs of tokens.
static Lines lines(const void* at, long line, int n, int words, bool pairs_of_lines, float* tail) {
  const int each = pairs_of_lines ? G / 2 : G, whole = n / G, rest = pairs_of_lines ? (n % G + 1) / 2 : n % G;
  Lines found{(const word*)at, line, tail, words, whole, each};
  if (rest) {
    memset(tail, 0, (size_t)each * words * 4);
    for (int r = 0; r < rest; r++) memcpy(tail + r * words, found.at + ((long)whole * each + r) * line, words * 4);
  }
  return found;
}

// to += x' y of the lines of some groups: y lies group after group as they are numbered, or where their numbers say.
template <bool P>
static INLINE void add_products(const Lines& x, const float* y, const int* numbers, int count, bool by_number, float* to, int dims) {
  constexpr int each = P ? G / 2 : G;
  for (int d = 0; d < dims; d += R) {
    vf acc[R][C] = {};
    for (int i = 0; i < count; i++) {
      const int g = numbers[i];
      product<P>(acc, x.group(g) + d, 1, x.step(g), each, y + (by_number ? g : i) * each * PW, PW);
    }
    UNROLL
    for (int r = 0; r < R; r++)
      UNROLL
      for (int c = 0; c < C; c++) {
        float* at = to + (d + r) * PW + c * VL;
        store(at, load(at) + acc[r][c]);
      }
  }
}

// The indices of the set bits of a word, and their number.
static INLINE int listed(uint64_t bits, int* numbers) {
  int n = 0;
  for (; bits; bits &= bits - 1) numbers[n++] = __builtin_ctzll(bits);
  return n;
}
