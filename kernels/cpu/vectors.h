// Vectors of the instruction set that this is compiled for, and the matrix product that all of attention uses.
//
// A vector holds VL floats; a panel is C vectors side by side, PW lanes. Where the processor multiplies pairs of bf16
// (PAIRS), a "number" of an operand is a pair of neighbours along the sum, moved as 32 bits and never computed with.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16, C = 2, R = 8;
#elif defined(__AVX2__)
constexpr int VL = 8, C = 2, R = 4;
#else
constexpr int VL = 4, C = 2, R = 8;
#endif
constexpr int PW = VL * C;  // lanes of a panel, at most 32
constexpr int G = 8;        // lines of the other side that are processed or skipped together; R lines per product
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float vf_anywhere __attribute__((vector_size(VL * 4), aligned(1), may_alias));
typedef float word __attribute__((aligned(1), may_alias));  // a float, or a pair of bf16, at any address

typedef uint32_t pair __attribute__((may_alias));  // of bf16, in memory that holds floats
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
#if defined(__aarch64__)
typedef __fp16 half;  // g++ 12 has no other
#else
typedef _Float16 half;
#endif

static INLINE vf load(const void* p) { return *(const vf_anywhere*)p; }
static INLINE void store(void* p, vf x) { *(vf_anywhere*)p = x; }
static INLINE vf all(float x) { return x - vf{}; }
static INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
static INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

static INLINE float wide(float x) { return x; }
static INLINE float wide(bf16 x) { return float_of((uint32_t)x.bits << 16); }
static INLINE float wide(fp16 x) { half y; memcpy(&y, &x, 2); return (float)y; }
static INLINE void narrow(float x, float& to) { to = x; }
static INLINE void narrow(float x, bf16& to) {  // to the nearest, ties to even
  const uint32_t u = bits_of(x);
  to.bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
static INLINE void narrow(float x, fp16& to) { half y = (half)x; memcpy(&to, &y, 2); }

static INLINE bool any(vi m) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)m) != 0;
#else
  int32_t a = 0;
  for (int i = 0; i < VL; i++) a |= m[i];
  return a != 0;
#endif
}
static INLINE vi unlike_itself(vf x) { return x - x != all(0.f); }  // NaN and infinities

// Lanes of vector c whose bit is set in a word of PW bits.
static INLINE vi lanes(uint32_t bits, int c) {
  bits >>= c * VL;
#if defined(__AVX512F__)
  return (vi)_mm512_movm_epi32((__mmask16)bits);
#else
  vu bit;
  for (int i = 0; i < VL; i++) bit[i] = 1u << i;
  return ((vu{} + bits) & bit) != 0;
#endif
}

// 2^x to 2 ulp; 0 below 2^-126; NaN of NaN.
static INLINE vf exp2(vf x, float most = 128) {
  const vi none = x < all(-126.f);
  x = all(-126.f) > x ? all(-126.f) : x;
  x = all(most) < x ? all(most) : x;
  const vf magic = all(12582912.f);
  const vf n = x + magic;
  const vf f = x - (n - magic);
  vf p = all(1.3333558e-3f) + f * 1.5403530e-4f;
  p = all(9.6181291e-3f) + f * p;
  p = all(5.5504109e-2f) + f * p;
  p = all(2.4022651e-1f) + f * p;
  p = all(6.9314718e-1f) + f * p;
  p = all(1.f) + f * p;
#if defined(__AVX512F__)
  p = (vf)_mm512_scalef_ps((__m512)p, (__m512)(n - magic));
#else
  p = x != x ? x : (vf)((vi)p + (((vi)n) << 23));
#endif
  return none ? all(0.f) : p;
}

// tanh to 4 ulp: a series where 1 - 2 / (e^2x + 1) would cancel.
static INLINE vf tanh(vf x) {
  const vf size = (vf)((vi)x & 0x7fffffff), square = x * x;
  vf far = all(1.f) - all(2.f) / (exp2(size * all(2 * LOG2_E)) + all(1.f));
  far = (vf)((vi)far | ((vi)x & (int32_t)0x80000000));
  vf near = all(-1.45583438e-3f) + square * 5.9002744e-4f;
  near = all(3.5921280e-3f) + square * near;
  near = all(-8.8632355e-3f) + square * near;
  near = all(2.1869488e-2f) + square * near;
  near = all(-5.3968254e-2f) + square * near;
  near = all(1.3333333e-1f) + square * near;
  near = all(-3.3333333e-1f) + square * near;
  near = x + x * square * near;
  return x != x ? x : size < all(0.5f) ? near : far;
}

// acc[r][c] += sum over k < n of a(r, k) b[k][c]. In a, rows are `rows` words apart and steps of k `steps` words; b is n
// lines of `line` words each.
template <bool P> static INLINE vf multiply_add(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (P) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
  return acc + a * b;
}
template <bool P, int RR>
static INLINE void product(vf (&acc)[RR][C], const word* a, long rows, long steps, int n, const float* b, long line) {
  UNROLL
  for (int k = 0; k < n; k++) {
    vf panel[C];
    UNROLL
    for (int c = 0; c < C; c++) panel[c] = load(b + k * line + c * VL);
    UNROLL
    for (int r = 0; r < RR; r++) {
#if defined(__AVX512F__)
      const vf number = (vf)_mm512_set1_ps(a[r * rows + k * steps]);
#else
      const vf number = all(a[r * rows + k * steps]);
#endif
      UNROLL
      for (int c = 0; c < C; c++) acc[r][c] = multiply_add<P>(acc[r][c], number, panel[c]);
    }
  }
}

// Two lines of floats as one line of pairs of bf16, the first in the lower halves.
static INLINE vf paired(vf first, [[maybe_unused]] vf second) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vf)_mm512_permutexvar_epi16(order, both);
#else
  return first;
#endif
}
static INLINE void store_bf16([[maybe_unused]] bf16* to, [[maybe_unused]] vf x) {
#if defined(__AVX512BF16__)
  const __m256i y = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &y, 32);
#endif
}

// Dropout's hash: see kernels/dropout.py.
static INLINE vu mixed(vu x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}
static INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}
constexpr uint32_t GOLDEN = 0x9e3779b9u;
static INLINE uint32_t absorbed(uint32_t x, uint32_t y) { return mixed((x ^ y) + GOLDEN); }
