// The Python module spo_kernels._C: argument structs with plain fields and one function per kernel.
// No torch header: Python passes tensor.data_ptr(), so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "csrc/cpu/isa.h"
#include "csrc/ops.h"

namespace py = pybind11;

namespace {

// Exposes a pointer field as an integer address; 0 is null.
template <class Args, class Pointer>
void pointer(py::class_<Args>& cls, const char* name, Pointer Args::* field) {
  cls.def_property(
      name, [field](const Args& args) { return reinterpret_cast<uintptr_t>(args.*field); },
      [field](Args& args, uintptr_t address) { args.*field = reinterpret_cast<Pointer>(address); });
}

// Exposes a RowLayout field as (block_rows, block_stride, row_stride).
template <class Args>
void layout(py::class_<Args>& cls, const char* name, spo::RowLayout Args::* field) {
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
}

using NoGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

// A kernel with a launcher per device; has_cuda says whether those for CUDA were built.
#ifdef SPO_HAS_CUDA
#define KERNEL(name)                              \
  m.def(#name "_cpu", &spo::name##_cpu, NoGil()); \
  m.def(#name "_cuda", &spo::name##_cuda, NoGil())
#else
#define KERNEL(name) m.def(#name "_cpu", &spo::name##_cpu, NoGil())
#endif

// `value`, `pointer` and `layout` take a field's name once and spell it twice.
#define VALUE(field) cls.def_readwrite(#field, &Args::field)
#define POINTER(field) pointer(cls, #field, &Args::field)
#define LAYOUT(field) layout(cls, #field, &Args::field)

static void bind_policy_loss(py::module_& m) {
  using Args = spo::PolicyLossArgs;
  py::class_<Args> cls(m, "PolicyLossArgs");
  cls.def(py::init<>());
  VALUE(rows), VALUE(vocab), VALUE(dtype), VALUE(dlogits_dtype), VALUE(dlogits_zeroed);
  VALUE(temperature_stride);
  VALUE(clip_eps_low), VALUE(clip_eps_high), VALUE(log_ratio_clamp), VALUE(kl_estimator);
  VALUE(num_threads);
  LAYOUT(logits_layout), LAYOUT(dlogits_layout);
  POINTER(logits), POINTER(dlogits), POINTER(token_ids), POINTER(old_logprobs);
  POINTER(advantages), POINTER(ref_logprobs), POINTER(temperature), POINTER(policy_mask);
  POINTER(kl_mask), POINTER(scales), POINTER(logprobs), POINTER(entropy), POINTER(stats);
  POINTER(stream);
  KERNEL(policy_loss);
}

static void bind_logprobs(py::module_& m) {
  using Args = spo::LogprobsArgs;
  py::class_<Args> cls(m, "LogprobsArgs");
  cls.def(py::init<>());
  VALUE(rows), VALUE(vocab), VALUE(dtype), VALUE(dlogits_dtype), VALUE(temperature_stride);
  VALUE(num_threads);
  LAYOUT(logits_layout), LAYOUT(dlogits_layout);
  POINTER(logits), POINTER(token_ids), POINTER(mask), POINTER(temperature), POINTER(logprobs);
  POINTER(entropy), POINTER(row_max), POINTER(row_logsum), POINTER(grad_logprobs);
  POINTER(grad_entropy), POINTER(dlogits);
  POINTER(stream);
  KERNEL(logprobs);
  KERNEL(logprobs_backward);
}

static void bind_segments(py::module_& m) {
  using Args = spo::SegmentsArgs;
  py::class_<Args> cls(m, "SegmentsArgs");
  cls.def(py::init<>());
  VALUE(tokens), VALUE(seqs), VALUE(log_threshold), VALUE(interval);
  POINTER(logprobs), POINTER(cu_seqlens), POINTER(cu_segments), POINTER(cu_seq_segments);
  POINTER(stream);
  KERNEL(segments);
}

static void bind_segment_advantages(py::module_& m) {
  using Args = spo::SegmentAdvantagesArgs;
  py::class_<Args> cls(m, "SegmentAdvantagesArgs");
  cls.def(py::init<>());
  VALUE(tokens), VALUE(segments), VALUE(seqs);
  POINTER(values), POINTER(cu_segments), POINTER(cu_seq_segments), POINTER(advantages);
  POINTER(stream);
  KERNEL(segment_advantages);
}

static void bind_tree(py::module_& m) {
  using Args = spo::TreeArgs;
  py::class_<Args> cls(m, "TreeArgs");
  cls.def(py::init<>());
  VALUE(nodes);
  POINTER(parent), POINTER(rewards), POINTER(in_value), POINTER(values);
  POINTER(stream);
  KERNEL(tree);
}

static void bind_tree_stats(py::module_& m) {
  using Args = spo::TreeStatsArgs;
  py::class_<Args> cls(m, "TreeStatsArgs");
  cls.def(py::init<>());
  VALUE(nodes);
  POINTER(parent), POINTER(values), POINTER(in_value), POINTER(counts), POINTER(variances);
  POINTER(stream);
  KERNEL(tree_stats);
}

static void bind_tree_advantages(py::module_& m) {
  using Args = spo::TreeAdvantagesArgs;
  py::class_<Args> cls(m, "TreeAdvantagesArgs");
  cls.def(py::init<>());
  VALUE(nodes), VALUE(leave_one_out), VALUE(scale_by_std), VALUE(eps);
  POINTER(parent), POINTER(values), POINTER(in_value), POINTER(advantages);
  POINTER(stream);
  KERNEL(tree_advantages);
}

static void bind_gae(py::module_& m) {
  using Args = spo::GaeArgs;
  py::class_<Args> cls(m, "GaeArgs");
  cls.def(py::init<>());
  VALUE(tokens), VALUE(seqs), VALUE(gamma), VALUE(lam);
  POINTER(rewards), POINTER(values), POINTER(cu_seqlens), POINTER(bootstrap_values);
  POINTER(advantages), POINTER(returns);
  m.def("gae_cpu", &spo::gae_cpu, NoGil());
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
  bind_policy_loss(m);
  bind_logprobs(m);
  bind_segments(m);
  bind_segment_advantages(m);
  bind_tree(m);
  bind_tree_stats(m);
  bind_tree_advantages(m);
  bind_gae(m);
}
