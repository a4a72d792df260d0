// A decoding step's attention on the CPU in fp32: each row's newest position joins its own keys and values, then its queries see its
// sample's prompt and these under one softmax. As srcfast/generation/kv_cache.py defines it; no row pays for another's length.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // all that take or give vectors are inlined
#define SRCFAST_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define SRCFAST_CLONES
#endif
#define SRCFAST_INLINE inline __attribute__((always_inline))

namespace {

using torch::stable::Tensor;

constexpr int64_t kLanes = 16;
constexpr int64_t kTogether = 4;  // queries that share a load of a prompt's key or value

typedef float Lanes __attribute__((vector_size(64)));
typedef float Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(64)));

SRCFAST_INLINE Lanes load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
SRCFAST_INLINE void store(float* to, Lanes values) { *reinterpret_cast<Anywhere*>(to) = values; }

SRCFAST_INLINE float sum(Lanes values) {
  float parts[kLanes];
  store(parts, values);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// exp(x) of x <= 0 to about an ulp: 2^n times a polynomial in what is left (Cephes, S. L. Moshier); 0 below -87, near enough.
SRCFAST_INLINE Lanes exponential(Lanes x) {
  const Lanes least = Lanes{} - 87.0f;
  x = x > least ? x : least;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded product
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = Lanes{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Bits power = ((Bits)shifted - 0x4B400000) << 23;
  return (Lanes)((Bits)y + power);
}

struct Shape {
  int64_t heads, kv_heads, width, size, prompt_room, own_room;
  int64_t q_stride, k_stride, v_stride;  // from row to row
  float scale;
  int64_t window;  // newest positions that a row sees, its newest one included; 0: all
  float softcap;   // scores s become c tanh(s / c); 0: they don't
};

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Scores of N queries against B times 16 keys, of keys [d, room]; each query's scores are `apart` from the last one's.
template <int64_t N, int64_t B>
SRCFAST_INLINE void score_some(
    const float* const* q, const float* keys, int64_t room, const Shape& shape, float* scores, int64_t apart) {
  Lanes found[N][B] = {};
  for (int64_t j = 0; j < shape.size; ++j) {
    Lanes key[B];
    for (int64_t b = 0; b < B; ++b) key[b] = load(keys + j * room + b * kLanes);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t b = 0; b < B; ++b) found[n][b] += key[b] * q[n][j];
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t b = 0; b < B; ++b) store(scores + n * apart + b * kLanes, found[n][b] * shape.scale);
  }
}

template <int64_t N>
SRCFAST_INLINE void score(
    const float* const* q, const float* keys, int64_t room, int64_t length, const Shape& shape, float* scores, int64_t apart) {
  int64_t p = 0;
  for (; p + 4 * kLanes <= padded(length); p += 4 * kLanes) score_some<N, 4>(q, keys + p, room, shape, scores + p, apart);
  for (; p + 2 * kLanes <= padded(length); p += 2 * kLanes) score_some<N, 2>(q, keys + p, room, shape, scores + p, apart);
  if (p < length) score_some<N, 1>(q, keys + p, room, shape, scores + p, apart);
}

// Scores [count], a multiple of 16, to c tanh(s / c), c > 0.
SRCFAST_INLINE void cap(float* scores, int64_t count, float softcap) {
  const Lanes zero = {};
  for (int64_t p = 0; p < count; p += kLanes) {
    const Lanes x = load(scores + p) * (2.0f / softcap);
    const Lanes e = exponential(x > zero ? zero - x : x);  // exp(-2 |s / c|)
    const Lanes size = (1.0f - e) / (1.0f + e) * softcap;
    store(scores + p, x > zero ? size : zero - size);
  }
}

// Adds the values [n, d] weighted by each query's weights to its output [d]. Several sums side by side: one alone would wait for
// each product.
template <int64_t N>
SRCFAST_INLINE void add_values(
    const float* weights, int64_t apart, const float* values, int64_t length, int64_t size, float* const* out) {
  constexpr int64_t kSums = N < 3 ? 4 : 2;
  for (int64_t j = 0; j < size; j += kLanes) {
    Lanes found[N][kSums] = {};
    for (int64_t n = 0; n < N; ++n) found[n][0] = load(out[n] + j);
    int64_t p = 0;
    for (; p + kSums <= length; p += kSums) {
      for (int64_t s = 0; s < kSums; ++s) {
        const Lanes value = load(values + (p + s) * size + j);
        for (int64_t n = 0; n < N; ++n) found[n][s] += value * weights[n * apart + p + s];
      }
    }
    for (; p < length; ++p) {
      const Lanes value = load(values + p * size + j);
      for (int64_t n = 0; n < N; ++n) found[n][0] += value * weights[n * apart + p];
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t s = 1; s < kSums; ++s) found[n][0] += found[n][s];
      store(out[n] + j, found[n][0]);
    }
  }
}

// Scores [count], of which some are -inf, to weights; the sum of the weights.
SRCFAST_INLINE float exponentials(float* scores, int64_t count) {
  Lanes most = load(scores);
  for (int64_t p = kLanes; p < count; p += kLanes) {
    const Lanes other = load(scores + p);
    most = other > most ? other : most;
  }
  float greatest = most[0];
  for (int64_t i = 1; i < kLanes; ++i) greatest = std::max(greatest, most[i]);
  Lanes total = {};
  for (int64_t p = 0; p < count; p += kLanes) {
    const Lanes weight = exponential(load(scores + p) - greatest);
    store(scores + p, weight);
    total += weight;
  }
  return sum(total);
}

// One sample on one head of keys and values.
struct Sample {
  const float *q, *k, *v;
  const int64_t *places, *lengths;
  const float *prompt_keys, *prompt_values;  // [d, P], [P, d]
  float *own_keys, *own_values;              // [W, d, L], [W, L, d]
  int64_t prompt_length, head;
  float *scores, *out;
};

// N of its queries, from number `begin` on: query i is that of row i / group on the i % group-th of the head's queries.
template <int64_t N>
SRCFAST_INLINE void attend_some(const Sample& sample, const Shape& shape, int64_t begin) {
  const int64_t group = shape.heads / shape.kv_heads, size = shape.size, room = shape.own_room;
  const float hidden = -std::numeric_limits<float>::infinity();
  int64_t firsts[N], first = sample.prompt_length;  // positions of the prompt where each row's window begins
  for (int64_t n = 0; n < N; ++n) {
    const int64_t path = sample.prompt_length + sample.lengths[(begin + n) / group] + 1;
    firsts[n] = shape.window ? std::clamp<int64_t>(path - shape.window, 0, sample.prompt_length) : 0;
    first = std::min(first, firsts[n]);
  }
  first -= first % kLanes;
  const int64_t length_seen = sample.prompt_length - first, seen = padded(length_seen), apart = seen + room;
  const float* queries[N];
  float *outputs[N], sums[N];
  for (int64_t n = 0; n < N; ++n) {
    const int64_t row = (begin + n) / group, head = sample.head * group + (begin + n) % group;
    queries[n] = sample.q + row * shape.q_stride + head * size;
    outputs[n] = sample.out + (row * shape.heads + head) * size;
    std::fill(outputs[n], outputs[n] + size, 0.0f);
  }
  score<N>(queries, sample.prompt_keys + first, shape.prompt_room, length_seen, shape, sample.scores, apart);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t row = (begin + n) / group, length = sample.lengths[row] + 1;
    const int64_t own = sample.places[row] % shape.width * room * size;
    float *keys = sample.own_keys + own, *values = sample.own_values + own;
    const float* key = sample.k + row * shape.k_stride + sample.head * size;
    for (int64_t j = 0; j < size; ++j) keys[j * room + length - 1] = key[j];
    std::copy_n(sample.v + row * shape.v_stride + sample.head * size, size, values + (length - 1) * size);
    float* scores = sample.scores + n * apart;
    const int64_t unseen = shape.window ? std::max<int64_t>(length - shape.window, 0) : 0;
    score<1>(queries + n, keys, room, length, shape, scores + seen, apart);
    if (shape.softcap > 0.0f) cap(scores, seen + padded(length), shape.softcap);
    std::fill(scores, scores + firsts[n] - first, hidden);
    std::fill(scores + length_seen, scores + seen + unseen, hidden);
    std::fill(scores + seen + length, scores + seen + padded(length), hidden);
    sums[n] = exponentials(scores, seen + padded(length));
    add_values<1>(scores + seen, apart, values, length, size, outputs + n);
  }
  add_values<N>(sample.scores, apart, sample.prompt_values + first * size, length_seen, size, outputs);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < size; ++j) outputs[n][j] /= sums[n];
  }
}

// All queries of its rows `first` to `last`.
SRCFAST_CLONES void attend(const Sample& sample, const Shape& shape, int64_t first, int64_t last) {
  const int64_t group = shape.heads / shape.kv_heads;
  int64_t begin = first * group;
  for (; begin + kTogether <= last * group; begin += kTogether) attend_some<kTogether>(sample, shape, begin);
  const int64_t left = last * group - begin;
  if (left == 3) attend_some<3>(sample, shape, begin);
  if (left == 2) attend_some<2>(sample, shape, begin);
  if (left == 1) attend_some<1>(sample, shape, begin);
}

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// q [R, H, d], k and v [R, Hkv, d], contiguous within a row; prompt_keys [S, Hkv, d, P] and prompt_values [S, Hkv, P, d], P a multiple
// of 16; own_keys [S, Hkv, W, d, L] and own_values [S, Hkv, W, L, d], L one, too; prompt_lengths [S], places [R] ascending and lengths [R] int64: the newest position
// of row r is lengths[r]. Writes it, and out [R, H, d]. d is a multiple of 16. A row sees the last `window` positions of its path, 0
// for all, by scores under a soft cap, 0 for none.
void decode_attention(
    Tensor q, Tensor k, Tensor v, Tensor prompt_keys, Tensor prompt_values, Tensor own_keys, Tensor own_values,
    Tensor prompt_lengths, Tensor places, Tensor lengths, double scale, int64_t window, double softcap, Tensor out) {
  const int64_t rows = q.size(0);
  const Shape shape{q.size(1), k.size(1), own_keys.size(2), q.size(2), prompt_keys.size(3), own_keys.size(4),
                    q.stride(0), k.stride(0), v.stride(0), static_cast<float>(scale), window, static_cast<float>(softcap)};
  STD_TORCH_CHECK(shape.size % kLanes == 0 && shape.prompt_room % kLanes == 0 && shape.own_room % kLanes == 0, "d, P and L are multiples of 16");
  for (const Tensor* one : {&q, &k, &v}) {
    STD_TORCH_CHECK(one->stride(2) == 1 && one->stride(1) == shape.size, "rows are contiguous");
  }
  for (const Tensor* one : {&prompt_keys, &prompt_values, &own_keys, &own_values, &prompt_lengths, &places, &lengths, &out}) {
    STD_TORCH_CHECK(one->is_contiguous(), "contiguous tensors");
  }
  const auto* place_of = static_cast<const int64_t*>(places.data_ptr());
  const auto* length_of = static_cast<const int64_t*>(lengths.data_ptr());
  const auto* prompt_length_of = static_cast<const int64_t*>(prompt_lengths.data_ptr());
  std::vector<int64_t> bounds;  // where each sample's rows begin
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(length_of[row] >= 0 && length_of[row] < shape.own_room, "room for the newest position");
    STD_TORCH_CHECK(place_of[row] >= 0 && place_of[row] < own_keys.size(0) * shape.width, "places that there are");
    if (row == 0 || place_of[row] / shape.width != place_of[row - 1] / shape.width) bounds.push_back(row);
  }
  bounds.push_back(rows);
  const int64_t longest = *std::max_element(prompt_length_of, prompt_length_of + prompt_lengths.numel());
  STD_TORCH_CHECK(longest <= shape.prompt_room, "prompts that have room");
  const int64_t units = static_cast<int64_t>(bounds.size() - 1) * shape.kv_heads;
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(kTogether * (padded(longest) + shape.own_room));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t number = unit / shape.kv_heads, head = unit % shape.kv_heads;
      const int64_t slot = place_of[bounds[number]] / shape.width, place = slot * shape.kv_heads + head;
      const int64_t prompt = place * shape.size * shape.prompt_room, own = place * shape.width * shape.own_room * shape.size;
      const Sample sample{data(q), data(k), data(v), place_of, length_of, data(prompt_keys) + prompt,
                          data(prompt_values) + prompt, data(own_keys) + own, data(own_values) + own,
                          prompt_length_of[slot], head, scores.data(), data(out)};
      attend(sample, shape, bounds[number], bounds[number + 1]);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srcfast, CPU, library) {
  library.impl("decode_attention", TORCH_BOX(&decode_attention));
}
