// Block-sparse attention over a lookup table on a CPU: the library's functions, which native.py calls.
//
// It needs neither torch's headers nor a C++ runtime, only the C library.
#include "bias.h"
#include "forward.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Pass { FORWARD, BACKWARD, DECODE, BIAS };
template <Pass W, class T, bool P, bool F> static int walk(const Problem& a) {
  if constexpr (W == FORWARD) return forward<T, P, F>(a);
  if constexpr (W == BACKWARD) return backward<T, P, F>(a);
  if constexpr (W == DECODE) return decode<T, P, F>(a);
  if constexpr (W == BIAS) return bias_gradient<T, F>(a);
}
template <Pass W, bool F> static int of_kind(const Problem& a) {
  // Pairs are read in place, so dims have to be even. (Queries of decoding are copied.)
  const bool even = a.D % G == 0 && a.V % G == 0 && a.sk[2] % 2 == 0 && a.sv[2] % 2 == 0 &&
                    (W == DECODE || a.sq[2] % 2 == 0) && (W != BACKWARD || a.sdo[2] % 2 == 0);
  if (a.kind == 0) return walk<W, float, false, F>(a);
  if (a.kind == 2) return walk<W, fp16, false, F>(a);
  if constexpr (PAIRS && W != BIAS)  // whose sums are of dS in full
    if (even) return walk<W, bf16, true, F>(a);
  return walk<W, bf16, false, F>(a);
}
template <Pass W> static int run(const Problem* a) { return featured(*a) ? of_kind<W, true>(*a) : of_kind<W, false>(*a); }

// Returns 0, or 1 if memory ran out and the results must not be used.
EXPORT int32_t sparseflash_forward(const Problem* a) { return run<FORWARD>(a); }
EXPORT int32_t sparseflash_backward(const Problem* a) { return run<BACKWARD>(a); }
EXPORT int32_t sparseflash_decode(const Problem* a) { return run<DECODE>(a); }

// With the fields of a gradient, and lse2 and delta filled in.
EXPORT int32_t sparseflash_bias_gradient(const Problem* a) { return of_kind<BIAS, true>(*a); }

EXPORT int64_t sparseflash_problem_size(void) { return sizeof(Problem); }
EXPORT int64_t sparseflash_panel(void) { return PW; }
EXPORT void sparseflash_threads(ParallelFor f) { parallel_for = f; }

// Tiles [T, rows, ceil(cols / 32)] from the other side, [T, cols, ceil(rows / 32)].
EXPORT void sparseflash_turn(const uint32_t* bits, uint32_t* turned, int64_t T, int64_t rows, int64_t cols) {
  const int64_t words = (cols + 31) / 32, turned_words = (rows + 31) / 32;
  memset(turned, 0, (size_t)(T * cols * turned_words * 4));
  for (int64_t t = 0; t < T; t++, bits += rows * words, turned += cols * turned_words)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t w = 0; w < words; w++)
        for (uint32_t x = bits[i * words + w]; x; x &= x - 1) {
          const int64_t j = w * 32 + __builtin_ctz(x);
          if (j < cols) turned[j * turned_words + i / 32] |= 1u << (i % 32);
        }
}
// Of tiles [T, lines, ceil(lanes / 32)]: which groups of G lines any lane of a panel meets, [T, ceil(lanes / PW)].
EXPORT void sparseflash_cells(const uint32_t* bits, uint64_t* cells, int64_t T, int64_t lines, int64_t lanes) {
  const int64_t words = (lanes + 31) / 32, panels = (lanes + PW - 1) / PW;
  for (int64_t t = 0; t < T; t++, bits += lines * words, cells += panels)
    for (int64_t p = 0; p < panels; p++) {
      cells[p] = 0;
      for (int64_t i = 0; i < lines; i++) {
        const uint64_t x = bits[i * words + p * PW / 32] >> (p * PW % 32);
        if (x & ((1ull << PW) - 1)) cells[p] |= 1ull << (i / G);
      }
    }
}
