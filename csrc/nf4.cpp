// NF4 on the CPU, bit for bit as kernels/srcfast_kernels/nf4.py defines it: threads over blocks, vector instructions within.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SRCFAST_AVX2 1
#define SRCFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SRCFAST_CLONES
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNestedBlocksize = 256;
constexpr int64_t kMostBlocksize = 4096;
constexpr int64_t kGrain = 1 << 16;  // values that are worth a thread

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Dequantisation: a block has 16 different values, so they are rounded once and looked up ------------------------------------

template <typename T>
void look_up(const uint8_t* packed, int64_t count, const T* values, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t byte = packed[i / 2];
    out[i] = values[i % 2 == 0 ? byte >> 4 : byte & 15];
  }
}

#ifdef SRCFAST_AVX2

// 16 bytes, 32 codes, in the order of the values: the high half of a byte comes first.
__attribute__((target("avx2"))) inline void split(const uint8_t* packed, __m128i& first, __m128i& second) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
  first = _mm_unpacklo_epi8(high, low);
  second = _mm_unpackhi_epi8(high, low);
}

// Two-byte values: their lower and upper bytes are each a table of 16.
__attribute__((target("avx2"))) void look_up_avx2(const uint8_t* packed, int64_t count, const uint16_t* values, uint16_t* out) {
  alignas(16) uint8_t lower[16], upper[16];
  for (int code = 0; code < 16; ++code) {
    lower[code] = static_cast<uint8_t>(values[code]);
    upper[code] = static_cast<uint8_t>(values[code] >> 8);
  }
  const __m128i lower_table = _mm_load_si128(reinterpret_cast<const __m128i*>(lower));
  const __m128i upper_table = _mm_load_si128(reinterpret_cast<const __m128i*>(upper));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m128i codes[2];
    split(packed + i / 2, codes[0], codes[1]);
    for (int half = 0; half < 2; ++half) {
      const __m128i low = _mm_shuffle_epi8(lower_table, codes[half]), high = _mm_shuffle_epi8(upper_table, codes[half]);
      auto* place = reinterpret_cast<__m128i*>(out + i + 16 * half);
      _mm_storeu_si128(place, _mm_unpacklo_epi8(low, high));
      _mm_storeu_si128(place + 1, _mm_unpackhi_epi8(low, high));
    }
  }
  look_up(packed + i / 2, count - i, values, out + i);
}

__attribute__((target("avx2"))) void look_up_avx2(const uint8_t* packed, int64_t count, const float* values, float* out) {
  const __m256 negative = _mm256_loadu_ps(values), positive = _mm256_loadu_ps(values + 8);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m128i codes[2];
    split(packed + i / 2, codes[0], codes[1]);
    for (int part = 0; part < 4; ++part) {
      const __m128i eight = part % 2 == 0 ? codes[part / 2] : _mm_srli_si128(codes[part / 2], 8);
      const __m256i code = _mm256_cvtepu8_epi32(eight);
      const __m256 below = _mm256_permutevar8x32_ps(negative, code), above = _mm256_permutevar8x32_ps(positive, code);
      const __m256 chosen = _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
      _mm256_storeu_ps(out + i + 8 * part, chosen);
    }
  }
  look_up(packed + i / 2, count - i, values, out + i);
}

#endif

uint16_t bits(BFloat16 value) { return value.x; }
uint16_t bits(Half value) { return value.x; }
float bits(float value) { return value; }

// Rounded is the type of the weight, Bits what is looked up: its bits.
template <typename Rounded, typename Bits>
void dequantize(
    const uint8_t* packed, const float* codes, const Tensor& absmax, const float* scale_codes, const float* nested_absmax,
    const float* offset, int64_t blocksize, int64_t count, Bits* out) {
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / blocksize), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float scale = 0.0f;
      if (nested_absmax != nullptr) {
        // Rounded twice, as bitsandbytes does: this file is built without fused multiply-add.
        const float product = scale_codes[data<uint8_t>(absmax)[block]] * nested_absmax[block / kNestedBlocksize];
        scale = product + *offset;
      } else {
        scale = data<float>(absmax)[block];
      }
      Bits values[16];
      for (int code = 0; code < 16; ++code) values[code] = bits(static_cast<Rounded>(codes[code] * scale));
      const int64_t start = block * blocksize, length = std::min(blocksize, count - start);
#ifdef SRCFAST_AVX2
      if (__builtin_cpu_supports("avx2")) {
        look_up_avx2(packed + start / 2, length, values, out + start);
        continue;
      }
#endif
      look_up(packed + start / 2, length, values, out + start);
    }
  });
}

void nf4_dequantize(
    Tensor packed, Tensor codes, Tensor absmax, Tensor scale_codes, std::optional<Tensor> nested_absmax,
    std::optional<Tensor> offset, int64_t blocksize, Tensor out) {
  STD_TORCH_CHECK(packed.is_contiguous() && absmax.is_contiguous() && out.is_contiguous(), "contiguous tensors");
  STD_TORCH_CHECK(packed.numel() == (out.numel() + 1) / 2, "two codes a byte");
  const bool nested = nested_absmax.has_value() && offset.has_value();
  STD_TORCH_CHECK(absmax.scalar_type() == (nested ? ScalarType::Byte : ScalarType::Float), "scales of 8 bits where nested, else fp32");
  const float* nested_data = nested ? data<float>(*nested_absmax) : nullptr;
  const float* offset_data = nested ? data<float>(*offset) : nullptr;
  const auto run = [&](auto rounded, auto* values) {
    dequantize<decltype(rounded)>(
        data<uint8_t>(packed), data<float>(codes), absmax, data<float>(scale_codes), nested_data, offset_data, blocksize,
        out.numel(), values);
  };
  if (out.scalar_type() == ScalarType::Float) {
    run(float{}, data<float>(out));
  } else if (out.scalar_type() == ScalarType::BFloat16) {
    run(BFloat16{}, data<uint16_t>(out));
  } else {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Half, "fp32, bf16 or fp16");
    run(Half{}, data<uint16_t>(out));
  }
}

// Quantisation -----------------------------------------------------------------------------------------------------------------

// One block [count] of fp32 values, over its largest magnitude, as codes: how many middles between codes lie below a value.
SRCFAST_CLONES float quantize_block(float* values, int64_t count, const float* middles, int32_t* codes) {
  float absmax = 0.0f;
  for (int64_t i = 0; i < count; ++i) absmax = std::max(absmax, std::fabs(values[i]));
  // A product with the reciprocal, as in bitsandbytes: a division rounds differently. A block of zeros stays zero.
  const float inverse = 1.0f / std::max(absmax, 1e-38f);
  for (int64_t i = 0; i < count; ++i) values[i] *= inverse;
  for (int64_t i = 0; i < count; ++i) codes[i] = 0;
  for (int middle = 0; middle < 15; ++middle) {
    for (int64_t i = 0; i < count; ++i) codes[i] += values[i] > middles[middle] ? 1 : 0;
  }
  return absmax;
}

template <typename T>
void quantize(const T* weight, int64_t count, const float* codes, int64_t blocksize, uint8_t* packed, float* absmax) {
  float middles[15];
  for (int code = 0; code < 15; ++code) middles[code] = (codes[code] + codes[code + 1]) / 2.0f;
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / blocksize), [&](int64_t begin, int64_t end) {
    float values[kMostBlocksize];
    int32_t found[kMostBlocksize];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * blocksize, length = std::min(blocksize, count - start);
      for (int64_t i = 0; i < length; ++i) values[i] = static_cast<float>(weight[start + i]);
      absmax[block] = quantize_block(values, length, middles, found);
      if (length % 2 != 0) found[length] = 7;  // the code of 0 fills the last byte of an odd count
      for (int64_t i = 0; i < length; i += 2) packed[(start + i) / 2] = static_cast<uint8_t>(found[i] << 4 | found[i + 1]);
    }
  });
}

void nf4_quantize(Tensor weight, Tensor codes, int64_t blocksize, Tensor packed, Tensor absmax) {
  STD_TORCH_CHECK(weight.is_contiguous() && blocksize <= kMostBlocksize && blocksize % 2 == 0, "contiguous, blocks of at most 4096");
  const int64_t count = weight.numel();
  STD_TORCH_CHECK(packed.numel() == (count + 1) / 2 && absmax.numel() == (count + blocksize - 1) / blocksize, "room for all");
  const auto run = [&](const auto* values) {
    quantize(values, count, data<float>(codes), blocksize, data<uint8_t>(packed), data<float>(absmax));
  };
  if (weight.scalar_type() == ScalarType::Float) {
    run(data<float>(weight));
  } else if (weight.scalar_type() == ScalarType::BFloat16) {
    run(data<BFloat16>(weight));
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Half, "fp32, bf16 or fp16");
    run(data<Half>(weight));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srcfast, CPU, library) {
  library.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  library.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
}
