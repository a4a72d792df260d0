// The operations that Python calls as torch.ops.srcfast.*, against libtorch's stable ABI: one build serves torch 2.11 and later, and
// every Python. They run on CPUs; on GPUs the kernels of kernels/srcfast_kernels run.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(srcfast, library) {
  library.def("pack_sizes(Tensor sizes, int budget, int max_items, Tensor(a!) items, Tensor(b!) offsets) -> int");
  library.def("nf4_quantize(Tensor weight, Tensor codes, int blocksize, Tensor(a!) packed, Tensor(b!) absmax) -> ()");
  library.def(
      "nf4_dequantize(Tensor packed, Tensor codes, Tensor absmax, Tensor scale_codes, Tensor? nested_absmax, Tensor? offset, "
      "int blocksize, Tensor(a!) out) -> ()");
  library.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor prompt_keys, Tensor prompt_values, Tensor(a!) own_keys, "
      "Tensor(b!) own_values, Tensor prompt_lengths, Tensor places, Tensor lengths, float scale, int window, float softcap, "
      "Tensor(c!) out) -> ()");
}
