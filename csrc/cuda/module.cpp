// spade_kernels._C_cuda: importing it registers the CUDA kernels; build_info() says how they were built.
// This file does not ask for PyTorch's stable ABI: some releases of PyTorch hide their pybind11 from files that do.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <sources.h>  // written by setup.py

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["nvcc"] = SPADE_NVCC_TEXT;
  info["architectures"] = SPADE_ARCHITECTURES_TEXT;
  info["torch_target"] = TORCH_TARGET_VERSION_TEXT;
  info["sources"] = SPADE_SOURCES_TEXT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.def("build_info", &build_info, "How the CUDA kernels were built.");
}
