// The Python module spo_kernels._C: argument structs with plain fields and one function per kernel.
// No torch header: Python passes tensor.data_ptr(), so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "csrc/cpu/isa.h"
#include "csrc/ops.h"

namespace py = pybind11;

namespace {

// Exposes a field: a pointer as an integer address, 0 for null; a RowLayout as (block_rows,
// block_stride, row_stride); numbers as they are.
template <class Args, class Field>
void expose(py::class_<Args>& cls, const char* name, Field Args::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    cls.def_property(
        name, [field](const Args& args) { return reinterpret_cast<uintptr_t>(args.*field); },
        [field](Args& args, uintptr_t address) { args.*field = reinterpret_cast<Field>(address); });
  } else if constexpr (std::is_same_v<Field, spo::RowLayout>) {
    cls.def_property(
        name,
        [field](const Args& args) {
          const spo::RowLayout& rows = args.*field;
          return py::make_tuple(rows.block_rows, rows.block_stride, rows.row_stride);
        },
        [field](Args& args, const py::tuple& strides) {
          args.*field = {strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
                         strides[2].cast<int64_t>()};
        });
  } else {
    cls.def_readwrite(name, field);
  }
}

using NoGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

// A kernel with a launcher per device; has_cuda says whether those for CUDA were built. A checked
// one also tells how many bytes of workspace its launcher for CUDA takes.
#ifdef SPO_HAS_CUDA
#define KERNEL(name)                              \
  m.def(#name "_cpu", &spo::name##_cpu, NoGil()); \
  m.def(#name "_cuda", &spo::name##_cuda, NoGil())
#define CHECKED_KERNEL(name) \
  KERNEL(name);              \
  m.def(#name "_workspace", &spo::name##_workspace)
#else
#define KERNEL(name) m.def(#name "_cpu", &spo::name##_cpu, NoGil())
#define CHECKED_KERNEL(name) KERNEL(name)
#endif

// The Python class of an argument struct, from its list of fields.
#define EXPOSE(type, name, initial) expose(cls, #name, &Args::name);
#define EXPOSE_ARRAY(name, absent) expose(cls, #name, &Args::name);
#define STRUCT(name, ...)           \
  {                                 \
    using Args = spo::name;         \
    py::class_<Args> cls(m, #name); \
    cls.def(py::init<>());          \
    __VA_ARGS__                     \
  }

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of spo_kernels; the public functions are in Python.";
  m.attr("has_cuda") = py::bool_(
#ifdef SPO_HAS_CUDA
      true
#else
      false
#endif
  );
  m.def("cpu_isa", [] { return spo::isa_name(spo::chosen_isa()); });
  m.def("has_bf16_products", &spo::has_bf16_products);
  STRUCT(PolicyLossArgs, SPO_POLICY_LOSS_FIELDS(EXPOSE, EXPOSE_ARRAY))
  KERNEL(policy_prepare);
  KERNEL(policy_loss);
  KERNEL(policy_finish);
  KERNEL(policy_step);
#ifdef SPO_HAS_CUDA
  m.def("cuda_problem", &spo::cuda_problem);
  STRUCT(ScaleArgs, SPO_SCALE_FIELDS(EXPOSE))
  m.def("scale_cuda", &spo::scale_cuda, NoGil());
#endif
  STRUCT(LogprobsArgs, SPO_LOGPROBS_FIELDS(EXPOSE))
  KERNEL(logprobs);
  KERNEL(logprobs_backward);
  STRUCT(FixedMatmulArgs, SPO_FIXED_MATMUL_FIELDS(EXPOSE))
  m.def("matmul_fixed_cpu", &spo::matmul_fixed_cpu, NoGil());
  STRUCT(MatmulArgs, SPO_MATMUL_FIELDS(EXPOSE))
  m.def("matmul_bf16_cpu", &spo::matmul_bf16_cpu, NoGil());
  STRUCT(SegmentsArgs, SPO_SEGMENTS_FIELDS(EXPOSE))
  CHECKED_KERNEL(segments);
  STRUCT(SegmentAdvantagesArgs, SPO_SEGMENT_ADVANTAGES_FIELDS(EXPOSE))
  CHECKED_KERNEL(segment_advantages);
  STRUCT(TreeArgs, SPO_TREE_FIELDS(EXPOSE))
  CHECKED_KERNEL(tree);
  STRUCT(TreeStatsArgs, SPO_TREE_STATS_FIELDS(EXPOSE))
  CHECKED_KERNEL(tree_stats);
  STRUCT(TreeAdvantagesArgs, SPO_TREE_ADVANTAGES_FIELDS(EXPOSE))
  CHECKED_KERNEL(tree_advantages);
  STRUCT(GaeArgs, SPO_GAE_FIELDS(EXPOSE))
  m.def("gae_cpu", &spo::gae_cpu, NoGil());
}
