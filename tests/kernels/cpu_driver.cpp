// The compiled CPU kernel without Python: random problems against plain loops in double, for processors that are emulated.
#include <cstdio>
#include <random>
#include <vector>
#include "kernel.cpp"

static std::mt19937 dice(7);
static int below(int n) { return (int)(dice() % (unsigned)n); }
static float normal() { return std::normal_distribution<float>()(dice); }

struct Table {
  int N, M, BQ, BK, nQ, nK, tiles = 0;
  std::vector<char> seen;
  std::vector<int32_t> row_ranges, row_full_indices, row_partial_indices, row_partial_tiles, row_order, col_ranges, col_full_indices, col_partial_indices, col_partial_tiles;
  std::vector<uint32_t> bits, turned, seen_keys;
  std::vector<uint64_t> row_cells, col_cells;

  Table(int N, int M, int BQ, int BK) : N(N), M(M), BQ(BQ), BK(BK), nQ((N + BQ - 1) / BQ), nK((M + BK - 1) / BK), seen(N * M) {
    const int kind = below(4), width = 1 + below(60);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < M; j++)
        seen[i * M + j] = kind == 0 || (kind == 1 && j <= i) || (kind == 2 && abs(i - j) < width) || (kind == 3 && below(9) == 0);
    const int W = (BK + 31) / 32;
    std::vector<int> code(nQ * nK);  // 0 nothing, 1 FULL, tile + 2
    for (int r = 0; r < nQ; r++)
      for (int c = 0; c < nK; c++) {
        std::vector<uint32_t> tile(BQ * W), keys(W);
        bool every = (r + 1) * BQ <= N && (c + 1) * BK <= M, some = false;
        for (int i = 0; i < BQ && r * BQ + i < N; i++)
          for (int j = 0; j < BK && c * BK + j < M; j++)
            if (seen[(r * BQ + i) * M + c * BK + j]) some = true, tile[i * W + j / 32] |= 1u << j % 32, keys[j / 32] |= 1u << j % 32;
            else every = false;
        code[r * nK + c] = every ? 1 : some ? 2 + tiles++ : 0;
        if (some && !every) bits.insert(bits.end(), tile.begin(), tile.end()), seen_keys.insert(seen_keys.end(), keys.begin(), keys.end());
      }
    list(nQ, nK, [&](int line, int other) { return code[line * nK + other]; }, row_ranges, row_full_indices, row_partial_indices, row_partial_tiles);
    list(nK, nQ, [&](int line, int other) { return code[other * nK + line]; }, col_ranges, col_full_indices, col_partial_indices, col_partial_tiles);
    for (int r = 0; r < nQ; r++) row_order.push_back(r);
    turned.resize(tiles * BK * ((BQ + 31) / 32));
    row_cells.resize(tiles * (up(BQ, PW) / PW)), col_cells.resize(tiles * (up(BK, PW) / PW));
    sparseflash_turn(bits.data(), turned.data(), tiles, BQ, BK);
    sparseflash_cells(turned.data(), row_cells.data(), tiles, BK, BQ);
    sparseflash_cells(bits.data(), col_cells.data(), tiles, BQ, BK);
  }
  template <class F> static void list(int lines, int others, const F& code, std::vector<int32_t>& ranges, std::vector<int32_t>& full,
                                      std::vector<int32_t>& partial, std::vector<int32_t>& tile) {
    for (int line = 0; line < lines; line++) {
      ranges.push_back((int)full.size());
      for (int other = 0; other < others; other++)
        if (code(line, other) == 1) full.push_back(other);
      ranges.push_back((int)full.size()), ranges.push_back((int)partial.size());
      for (int other = 0; other < others; other++)
        if (code(line, other) > 1) partial.push_back(other), tile.push_back(code(line, other) - 2);
      ranges.push_back((int)partial.size());
    }
  }
};

template <class T> struct Tensor {
  int H, N, D;
  std::vector<T> x;
  Tensor(int H, int N, int D) : H(H), N(N), D(D), x((size_t)H * N * D) {
    for (T& each : x) narrow(normal(), each);
  }
  double at(int h, int n, int d) const { return wide(x[((size_t)h * N + n) * D + d]); }
  void describe(int64_t (&strides)[3]) const { strides[0] = (int64_t)H * N * D, strides[1] = (int64_t)N * D, strides[2] = D; }
};
template <class A, class B> static bool near(const char* name, const A& got, const std::vector<B>& want, double tolerance) {
  double largest = 1e-3, error = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double g = wide(got[i]), w = want[i];
    if (w == -INFINITY || g == w) { error = g == w ? error : INFINITY; continue; }
    largest = fmax(largest, fabs(w)), error = fabs(g - w) > error || g != g ? (g != g ? INFINITY : fabs(g - w)) : error;
  }
  if (error <= tolerance * largest) return true;
  printf("%s: error %g, largest %g\n", name, error, largest);
  return false;
}

template <class T> static bool tried(int kind, int D, int V, bool decoding) {
  const int Hkv = 1 + below(2), group = 1 + below(2), Hq = Hkv * group, sizes[] = {16, 32, 64, 128, 256};
  const int M = 1 + below(200), N = decoding ? M : 1 + below(200), length = 1 + below(M), fresh = decoding ? 1 + below(at_most(length, 16)) : N;
  const Table t(N, M, sizes[below(5)], sizes[below(5)]);
  const Tensor<T> q(Hq, fresh, D), k(Hkv, M, D), v(Hkv, M, V), dout(Hq, fresh, V);
  Tensor<T> out(Hq, fresh, V), dq(Hq, fresh, D), dk(Hkv, M, D), dv(Hkv, M, V);
  std::vector<float> lse(Hq * fresh), dlse(Hq * fresh), delta(Hq * fresh), lse2(Hq * fresh), dq_sum((size_t)Hq * fresh * D), slopes(Hq), sinks(Hq);
  std::vector<int32_t> turns(Hq * t.nQ), pattern(1);
  for (float& x : dlse) x = normal();
  for (float& x : slopes) x = normal() / 8;
  for (float& x : sinks) x = normal();
  const int64_t lengths[] = {length};
  Problem a{};
  a.q = q.x.data(), a.k = k.x.data(), a.v = v.x.data(), a.out = out.x.data(), a.lse = lse.data(), a.dout = dout.x.data(), a.dlse = dlse.data();
  a.dq = dq.x.data(), a.dk = dk.x.data(), a.dv = dv.x.data(), a.dq_sum = kind ? dq_sum.data() : nullptr;
  a.delta = delta.data(), a.lse2 = lse2.data(), a.turns = turns.data(), a.pattern_of = pattern.data();
  a.row_ranges = t.row_ranges.data(), a.row_full_indices = t.row_full_indices.data(), a.row_partial_indices = t.row_partial_indices.data(), a.row_partial_tiles = t.row_partial_tiles.data();
  a.row_order = t.row_order.data(), a.col_ranges = t.col_ranges.data(), a.col_full_indices = t.col_full_indices.data(), a.col_partial_indices = t.col_partial_indices.data();
  a.col_partial_tiles = t.col_partial_tiles.data(), a.bits = t.bits.data(), a.seen_keys = t.seen_keys.data(), a.turned = t.turned.data();
  a.row_cells = t.row_cells.data(), a.col_cells = t.col_cells.data(), a.lengths = lengths;
  q.describe(a.sq), k.describe(a.sk), v.describe(a.sv), out.describe(a.so), dout.describe(a.sdo);
  a.B = 1, a.Hq = Hq, a.Hkv = Hkv, a.N = fresh, a.M = M, a.D = D, a.V = V, a.BQ = t.BQ, a.BK = t.BK, a.nQ = t.nQ, a.nK = t.nK;
  a.kind = kind, a.held = Hkv, a.chunk = 1 + below(3), a.chunks = (t.nK + a.chunk - 1) / a.chunk, a.threads = 1, a.scale = 0.3;
  if (below(2)) a.softcap = 2;
  if (below(2)) a.slopes = slopes.data(), a.slope_h = 1;
  if (below(2) && decoding) a.sinks = sinks.data();
  if (below(2) && !decoding) a.dropping = 1, a.limit = 1 << 23, a.seed_low = 3, a.seed_high = 4;
  else a.limit = 1 << 24;
  std::vector<float> parts((size_t)Hq * fresh * a.chunks * (V + 2));
  a.parts = parts.data();
  if (decoding ? sparseflash_decode(&a) : sparseflash_forward(&a)) return false;
  if (!decoding && sparseflash_backward(&a)) return false;

  std::vector<double> o((size_t)Hq * fresh * V), l(Hq * fresh, -INFINITY), gq((size_t)Hq * fresh * D), gk((size_t)Hkv * M * D), gv((size_t)Hkv * M * V);
  for (int h = 0; h < Hq; h++)
    for (int i = 0; i < fresh; i++) {
      const int query = decoding ? length - fresh + i : i, hk = h / group, stop = decoding ? length : M, at = h * fresh + i;
      std::vector<double> p(M, -INFINITY), softcap_grad(M, 1), keep(M, 1), dp(M);
      double total = 0, dot = 0;
      for (int j = 0; j < stop; j++) {
        if (!t.seen[query * M + j]) continue;
        double s = 0;
        for (int d = 0; d < D; d++) s += q.at(h, i, d) * k.at(hk, j, d);
        s *= a.scale;
        if (a.softcap) s = std::tanh(s / a.softcap), softcap_grad[j] = 1 - s * s, s *= a.softcap;
        p[j] = s - (a.slopes ? slopes[h] * abs(query - j) : 0);
        total += exp(p[j]);
        if (a.dropping) keep[j] = keeps(a, row_key(a, {0, h, hk, 0, 0}, i), j) ? 2 : 0;
      }
      if (total > 0) l[at] = log(total);
      const double share = a.sinks ? total / (total + exp((double)sinks[h])) : 1;
      for (int j = 0; j < M; j++) {
        p[j] = total > 0 ? exp(p[j]) / total : 0;
        for (int d = 0; d < V; d++) {
          o[(size_t)at * V + d] += p[j] * keep[j] * share * v.at(hk, j, d);
          gv[((size_t)hk * M + j) * V + d] += p[j] * keep[j] * dout.at(h, i, d);
          dp[j] += dout.at(h, i, d) * v.at(hk, j, d) * keep[j];
        }
        dot += p[j] * dp[j];
      }
      for (int j = 0; j < M; j++)
        for (int d = 0; d < D; d++) {
          const double ds = p[j] * (dp[j] - dot + dlse[at]) * softcap_grad[j] * a.scale;
          gq[(size_t)at * D + d] += ds * k.at(hk, j, d), gk[((size_t)hk * M + j) * D + d] += ds * q.at(h, i, d);
        }
    }
  const double tolerance = kind == 0 ? 2e-5 : kind == 1 ? 2e-2 : 3e-3;
  bool well = near("out", out.x, o, tolerance) & near("lse", lse, l, kind == 0 ? 2e-5 : 1e-4);
  if (!decoding) well = well & near("dq", dq.x, gq, tolerance) & near("dk", dk.x, gk, tolerance) & near("dv", dv.x, gv, tolerance);
  if (!well) printf("kind %d, D %d, V %d, N %d, M %d, blocks %d x %d, %s\n", kind, D, V, N, M, t.BQ, t.BK, decoding ? "decode" : "attention");
  return well;
}

int main(int, char** arguments) {
  const int count = atoi(arguments[1]), dims[] = {1, 7, 8, 13, 16, 32, 40, 64, 96};
  int wrong = 0;
  for (int i = 0; i < count; i++) {
    const int kind = i % 3, D = dims[below(9)], V = below(2) ? D : dims[below(9)];
    const bool decoding = i % 4 == 3;
    wrong += !(kind == 0 ? tried<float>(0, D, V, decoding) : kind == 1 ? tried<bf16>(1, D, V, decoding) : tried<fp16>(2, D, V, decoding));
  }
  printf("%d problems, %d wrong, panels of %d\n", count, wrong, PW);
  return wrong != 0;
}
