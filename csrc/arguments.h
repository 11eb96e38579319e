// Checks of operator arguments, on every device. spade_kernels/ops/_arguments.py has the same ones for kernels written
// in Python. A violation throws an error that names the operator, the argument and what was expected; after the checks
// of an operator, its kernel reads and writes nothing but the arguments and the results.
//
// The values of index tensors are compared with what they index. On a CPU that always happens, because it costs little
// beside the reads that use them. On a GPU the host would have to wait for the values: there it happens only if the
// environment variable SPADE_KERNELS_CHECK_INDICES is set to 1.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "tensors.h"

namespace spade {

using Shape = std::initializer_list<int64_t>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kNotEmpty = -1;                   // in a Shape: any size but 0
constexpr int64_t kMostEntries = int64_t{1} << 31;  // the most that a window index holds

// The size of a dimension; 0 if t has too few dimensions, which the check of the shape then reports.
int64_t size_of(const Tensor& t, int64_t d);
std::string to_string(Sizes shape);

// The arguments of one call of an operator; all tensors must be on the device of the first.
class __attribute__((visibility("hidden"))) Arguments {  // hidden, because torch's Tensor is
 public:
  Arguments(const char* op, const Tensor& first) : op_(op), first_(first) {}

  [[noreturn]] void fail(const std::string& what) const;
  void require(bool holds, const char* what) const {
    if (!holds) fail(what);
  }
  void floats(const char* name, const Tensor& t, Shape shape) const;
  void floats(const char* name, const MaybeTensor& t, Shape shape) const {
    if (t) floats(name, *t, shape);
  }
  // Checks that t is int64 of this shape, with values in [low, high).
  void index(const char* name, const Tensor& t, Shape shape, int64_t low, int64_t high) const;
  // Checks the offsets of `count` segments, which have `entries` entries in all, or fewer if not `exactly`.
  void bounds(const char* name, const Tensor& t, int64_t count, int64_t entries, bool exactly = true) const;
  // Checks the segments, or that there are none: a forward takes segments only for its backward.
  void segments(const MaybeTensor& indices, const MaybeTensor& offsets, int64_t count, int64_t entries) const;
  void integer(const char* name, int64_t value, int64_t least, int64_t most) const;

 private:
  void tensor(const char* name, const Tensor& t, Shape shape) const;

  const char* op_;
  const Tensor& first_;
};

}  // namespace spade
