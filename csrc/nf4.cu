// Double dequantisation of NF4 in one pass: 16 bytes of codes a thread are loaded at once, 16 bytes of values are stored at once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kNestedBlocksize = 256;

__device__ inline void round_to(float value, float& out) { out = value; }
__device__ inline void round_to(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void round_to(float value, __half& out) { out = __float2half_rn(value); }

// scale of a byte's block; products and sum are rounded one by one, as bitsandbytes does
__device__ inline float scale_at(
    int64_t byte, int64_t half_blocksize, const void* absmax, const float* scale_codes, const float* nested_absmax, const float* offset) {
  const int64_t block = byte / half_blocksize;
  if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
  const float code = __ldg(scale_codes + static_cast<const uint8_t*>(absmax)[block]);
  return __fadd_rn(__fmul_rn(code, __ldg(nested_absmax + block / kNestedBlocksize)), __ldg(offset));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(
    const uint8_t* __restrict__ packed, const float* __restrict__ codes, const void* __restrict__ absmax,
    const float* __restrict__ scale_codes, const float* __restrict__ nested_absmax, const float* __restrict__ offset,
    int64_t half_blocksize, int64_t count, T* __restrict__ out) {
  __shared__ float values[16];
  __shared__ uint4 tile[kThreads];
  if (threadIdx.x < 16) values[threadIdx.x] = codes[threadIdx.x];
  const int64_t bytes = (count + 1) / 2;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads) * 16;  // byte of this block of threads
  const bool whole = first + kThreads * 16 <= count / 2;
  if (whole) tile[threadIdx.x] = reinterpret_cast<const uint4*>(packed + first)[threadIdx.x];
  __syncthreads();
  if (!whole) {
    for (int64_t byte = first + threadIdx.x; byte < bytes && byte < first + kThreads * 16; byte += kThreads) {
      const float scale = scale_at(byte, half_blocksize, absmax, scale_codes, nested_absmax, offset);
      round_to(__fmul_rn(values[packed[byte] >> 4], scale), out[2 * byte]);
      if (2 * byte + 1 < count) round_to(__fmul_rn(values[packed[byte] & 15], scale), out[2 * byte + 1]);
    }
    return;
  }
  // Through shared memory neighbours get neighbouring words, so that their stores are neighbours, too.
  constexpr int kWide = 16 / sizeof(T);  // values of a store
  const auto* words = reinterpret_cast<const uint32_t*>(tile);
#pragma unroll
  for (int round = 0; round < 4; ++round) {
    const int word = round * kThreads + threadIdx.x;
    const int64_t byte = first + 4 * word;  // a word lies within a block of at least 16 bytes
    const float scale = scale_at(byte, half_blocksize, absmax, scale_codes, nested_absmax, offset);
    alignas(16) T rounded[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = words[word] >> (8 * i) & 255;
      round_to(__fmul_rn(values[pair >> 4], scale), rounded[2 * i]);
      round_to(__fmul_rn(values[pair & 15], scale), rounded[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 8; i += kWide) {
      *reinterpret_cast<uint4*>(out + 2 * byte + i) = *reinterpret_cast<const uint4*>(rounded + i);
    }
  }
}

template <typename T>
void launch(
    const Tensor& packed, const Tensor& codes, const Tensor& absmax, const Tensor& scale_codes, const float* nested_absmax,
    const float* offset, int64_t blocksize, Tensor& out, cudaStream_t stream) {
  const int64_t count = out.numel();
  const int64_t grid = ((count + 1) / 2 + kThreads * 16 - 1) / (kThreads * 16);
  if (grid == 0) return;
  dequantize_kernel<T><<<grid, kThreads, 0, stream>>>(
      static_cast<const uint8_t*>(packed.data_ptr()), static_cast<const float*>(codes.data_ptr()), absmax.data_ptr(),
      static_cast<const float*>(scale_codes.data_ptr()), nested_absmax, offset, blocksize / 2, count, static_cast<T*>(out.data_ptr()));
  STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "the launch failed");
}

void nf4_dequantize(
    Tensor packed, Tensor codes, Tensor absmax, Tensor scale_codes, std::optional<Tensor> nested_absmax,
    std::optional<Tensor> offset, int64_t blocksize, Tensor out) {
  STD_TORCH_CHECK(packed.is_contiguous() && absmax.is_contiguous() && out.is_contiguous(), "contiguous tensors");
  STD_TORCH_CHECK(packed.numel() == (out.numel() + 1) / 2, "two codes a byte");
  const bool nested = nested_absmax.has_value() && offset.has_value();
  STD_TORCH_CHECK(absmax.scalar_type() == (nested ? ScalarType::Byte : ScalarType::Float), "scales of 8 bits where nested, else fp32");
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(packed.get_device_index(), &stream));
  const float* nested_data = nested ? static_cast<const float*>(nested_absmax->data_ptr()) : nullptr;
  const float* offset_data = nested ? static_cast<const float*>(offset->data_ptr()) : nullptr;
  const auto run = [&](auto zero) {
    launch<decltype(zero)>(
        packed, codes, absmax, scale_codes, nested_data, offset_data, blocksize, out, static_cast<cudaStream_t>(stream));
  };
  if (out.scalar_type() == ScalarType::Float) {
    run(float{});
  } else if (out.scalar_type() == ScalarType::BFloat16) {
    run(__nv_bfloat16{});
  } else {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Half, "fp32, bf16 or fp16");
    run(__half{});
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(srcfast, CUDA, library) {
  library.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}
