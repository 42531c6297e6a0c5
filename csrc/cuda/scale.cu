// The backward of ops that formed their gradient in the forward: the gradient times the factor that
// autograd hands over. The factor is read on the device; 1, the usual one, costs a few
// microseconds.
#include "csrc/cuda/row.cuh"

namespace spo {
namespace {

constexpr int kThreads = 512, kPieceGranules = 4096, kMaxBlocks = 132 * 8;

// Blocks take pieces of rows in turn.
template <class T, class U>
__global__ void __launch_bounds__(kThreads) scale_rows(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor * (a.unscale ? *a.unscale : 1.0f);
  if (factor == 1 && a.grad == a.out) return;
  const int64_t piece = int64_t{kPieceGranules} * kPerGranule<T>;
  const int64_t pieces = ceil_div(a.vocab, piece);
  for (int64_t item = blockIdx.x; item < a.rows * pieces; item += gridDim.x) {
    const int64_t row = item / pieces, begin = item % pieces * piece;
    const int64_t size = smaller(piece, a.vocab - begin);
    const T* in = row_of<T>(a.grad, a.layout, row) + begin;
    U* out = row_of<U>(a.out, a.layout, row) + begin;
    const Split split = split_row(in, size);
    const int thread = threadIdx.x;
    if (thread < split.loose()) {
      const int64_t i = split.element(thread, size);
      from_float(to_float(in[i]) * factor, out + i);
    }
    const Granule* granules = reinterpret_cast<const Granule*>(in + split.head);
    U* first = out + split.head;
    const bool aligned = reinterpret_cast<uintptr_t>(first) % sizeof(Packed<T, U>) == 0;
    for (int64_t g = thread; g < split.granules; g += kThreads) {
      const Granule granule = granules[g];
      float x[kPerGranule<T>];
      unpack<T>(granule, x);
#pragma unroll
      for (float& value : x) value *= factor;
      if (aligned) {
        reinterpret_cast<Packed<T, U>*>(first)[g] = pack<T, U>(x);
      } else {
#pragma unroll
        for (int i = 0; i < kPerGranule<T>; ++i) from_float(x[i], first + g * kPerGranule<T> + i);
      }
    }
  }
}

template <class T, class U = T>
void launch_scale(const ScaleArgs& args) {
  const int64_t piece = int64_t{kPieceGranules} * kPerGranule<T>;
  LaunchShape shape;
  shape.blocks = std::min<int64_t>(args.rows * ceil_div(args.vocab, piece), kMaxBlocks);
  shape.threads = kThreads;
  launch(scale_rows<T, U>, shape, args.stream, args);
}

}  // namespace

void scale_cuda(const ScaleArgs& args) {
  if (args.grad_dtype == kBFloat16) return launch_scale<BFloat16>(args);
  if (args.grad_dtype == kFloat16) return launch_scale<Float16>(args);
  if (args.out_dtype == kFloat16) return launch_scale<float, Float16>(args);
  if (args.out_dtype == kBFloat16) return launch_scale<float, BFloat16>(args);
  launch_scale<float>(args);
}

}  // namespace spo
