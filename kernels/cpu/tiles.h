// Products of bf16 in the tiles of AMX, TILE x TILE results at a time: four tiles of 16 x 16.
//
// With SPARSEFLASH_EMULATED_TILES the tiles are plain C, for tests on processors without AMX.
#pragma once
#include "problem.h"

constexpr int TILE = 32;
#if defined(SPARSEFLASH_EMULATED_TILES)
constexpr bool TILES = true;
static thread_local float tile_of[8][16][16];
#define TILE_ZERO(t) memset(tile_of[t], 0, 1024)
#define TILE_LOAD(t, at, bytes) \
  for (int i = 0; i < 16; i++) memcpy(tile_of[t][i], (const char*)(at) + i * (long)(bytes), 64)
#define TILE_STORE(t, at, bytes) \
  for (int i = 0; i < 16; i++) memcpy((char*)(at) + i * (long)(bytes), tile_of[t][i], 64)
static void TILE_MULTIPLY(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        const uint32_t x = bits_of(tile_of[a][m][k]), y = bits_of(tile_of[b][k][n]);
        tile_of[c][m][n] += float_of(x << 16) * float_of(y << 16) + float_of(x & 0xffff0000) * float_of(y & 0xffff0000);
      }
}
static bool tiles_begin() { return true; }
static void tiles_end() {}
#elif defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
constexpr bool TILES = true;
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, at, bytes) _tile_loadd(t, at, bytes)
#define TILE_STORE(t, at, bytes) _tile_stored(t, at, bytes)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
// The operating system saves tiles only on request, which each thread that uses them makes once.
static bool tiles_begin() {
  static thread_local int allowed = -1;
  if (allowed < 0) allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  if (!allowed) return false;
  struct { uint8_t palette, row, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
  _tile_loadconfig(&shapes);
  return true;
}
static void tiles_end() { _tile_release(); }
#else
constexpr bool TILES = false;
#define TILE_ZERO(t)
#define TILE_LOAD(t, at, bytes)
#define TILE_STORE(t, at, bytes)
#define TILE_MULTIPLY(c, a, b)
static bool tiles_begin() { return false; }
static void tiles_end() {}
#endif

// Holds a thread's tiles for the lifetime of this object.
struct Tiles {
  const bool on;
  explicit Tiles(bool wanted) : on(TILES && wanted && tiles_begin()) {}
  ~Tiles() {
    if (on) tiles_end();
  }
  Tiles(const Tiles&) = delete;
};

// Results 0 to 3; x in 4 and 5, y in 6 and 7.
static INLINE void tile_zero() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}
// += x y of lines x [TILE][TILE] of bf16, `bytes` from one to the next, and lines of pairs y [TILE / 2][PW].
static INLINE void tile_add([[maybe_unused]] const uint16_t* x, [[maybe_unused]] long bytes, [[maybe_unused]] const float* y) {
  TILE_LOAD(4, x, bytes);
  TILE_LOAD(5, (const char*)x + 16 * bytes, bytes);
  TILE_LOAD(6, y, PW * 4);
  TILE_LOAD(7, y + 16, PW * 4);
  TILE_MULTIPLY(0, 4, 6);
  TILE_MULTIPLY(1, 4, 7);
  TILE_MULTIPLY(2, 5, 6);
  TILE_MULTIPLY(3, 5, 7);
}
static INLINE void tile_store([[maybe_unused]] float* to) {  // [TILE][PW]
  TILE_STORE(0, to, PW * 4);
  TILE_STORE(1, to + 16, PW * 4);
  TILE_STORE(2, to + 16 * PW, PW * 4);
  TILE_STORE(3, to + 16 * PW + 16, PW * 4);
}
