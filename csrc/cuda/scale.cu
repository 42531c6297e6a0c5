// The backward of ops that formed their gradient in the forward: the gradient times the factor that
// autograd hands over. The factor is read on the device; 1, the usual one, costs a few
// microseconds.
#include "csrc/cuda/row.cuh"

namespace spo {
namespace {

constexpr int kThreads = 512, kPieceGranules = 4096, kMaxBlocks = 132 * 8;

// Blocks take pieces of rows in turn.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor * (a.unscale ? *a.unscale : 1.0f);
  if (factor == 1) return;
  const int64_t piece = int64_t{kPieceGranules} * kPerGranule<T>;
  const int64_t pieces = ceil_div(a.vocab, piece);
  for (int64_t item = blockIdx.x; item < a.rows * pieces; item += gridDim.x) {
    const int64_t begin = item % pieces * piece, size = smaller(piece, a.vocab - begin);
    T* x = row_of<T>(a.grad, a.layout, item / pieces) + begin;
    const Split split = split_row(x, size);
    const int thread = threadIdx.x;
    if (thread < split.loose()) {
      const int64_t i = split.element(thread, size);
      from_float(to_float(x[i]) * factor, x + i);
    }
    Granule* granules = reinterpret_cast<Granule*>(x + split.head);
    for (int64_t g = thread; g < split.granules; g += kThreads) {
      const Granule granule = granules[g];
      float values[kPerGranule<T>];
      unpack<T>(granule, values);
#pragma unroll
      for (float& value : values) value *= factor;
      reinterpret_cast<Packed<T, T>*>(granules)[g] = pack<T, T>(values);
    }
  }
}

template <class T>
void launch_scale(const ScaleArgs& args) {
  const int64_t piece = int64_t{kPieceGranules} * kPerGranule<T>;
  LaunchShape shape;
  shape.blocks = std::min<int64_t>(args.rows * ceil_div(args.vocab, piece), kMaxBlocks);
  shape.threads = kThreads;
  launch(scale_rows<T>, shape, args.stream, args);
}

}  // namespace

void scale_cuda(const ScaleArgs& args) {
  if (args.dtype == kBFloat16) return launch_scale<BFloat16>(args);
  if (args.dtype == kFloat16) return launch_scale<Float16>(args);
  launch_scale<float>(args);
}

}  // namespace spo
