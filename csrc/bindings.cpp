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

// `value`, `pointer` and `layout` take a field's name once and spell it twice.
#define VALUE(field) cls.def_readwrite(#field, &Args::field)
#define POINTER(field) pointer(cls, #field, &Args::field)
#define LAYOUT(field) layout(cls, #field, &Args::field)

static void bind_policy_loss(py::module_& m) {
  using Args = spo::PolicyLossArgs;
  py::class_<Args> cls(m, "PolicyLossArgs");
  cls.def(py::init<>());
  VALUE(rows), VALUE(vocab), VALUE(dtype), VALUE(dlogits_zeroed), VALUE(temperature_stride);
  VALUE(clip_eps_low), VALUE(clip_eps_high), VALUE(log_ratio_clamp), VALUE(kl_estimator);
  VALUE(num_threads);
  LAYOUT(logits_layout), LAYOUT(dlogits_layout);
  POINTER(logits), POINTER(dlogits), POINTER(token_ids), POINTER(old_logprobs);
  POINTER(advantages), POINTER(ref_logprobs), POINTER(temperature), POINTER(policy_mask);
  POINTER(kl_mask), POINTER(scales), POINTER(logprobs), POINTER(entropy), POINTER(stats);
  m.def("policy_loss_cpu", &spo::policy_loss_cpu, NoGil());
}

static void bind_logprobs(py::module_& m) {
  using Args = spo::LogprobsArgs;
  py::class_<Args> cls(m, "LogprobsArgs");
  cls.def(py::init<>());
  VALUE(rows), VALUE(vocab), VALUE(dtype), VALUE(temperature_stride), VALUE(num_threads);
  LAYOUT(logits_layout), LAYOUT(dlogits_layout);
  POINTER(logits), POINTER(token_ids), POINTER(mask), POINTER(temperature), POINTER(logprobs);
  POINTER(entropy), POINTER(row_max), POINTER(row_logsum), POINTER(grad_logprobs);
  POINTER(grad_entropy), POINTER(dlogits);
  m.def("logprobs_cpu", &spo::logprobs_cpu, NoGil());
  m.def("logprobs_backward_cpu", &spo::logprobs_backward_cpu, NoGil());
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
}
