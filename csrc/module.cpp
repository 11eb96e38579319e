// spade_kernels._C: importing it registers the CPU kernels; build_info() says how they were built.
// This file does not ask for PyTorch's stable ABI: some releases of PyTorch hide their pybind11 from files that do.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <sources.h>  // written by setup.py

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch_target"] = TORCH_TARGET_VERSION_TEXT;
  info["sources"] = SPADE_SOURCES_TEXT;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(SPADE_ONE_TARGET)
  info["instruction_sets"] = "x86-64-v4 (AVX-512), x86-64-v3 (AVX2), baseline";
#else
  info["instruction_sets"] = "baseline";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How the compiled kernels were built.");
}
