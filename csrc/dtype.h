// The types of values that kernels take. Kernels do not take tensors but structs of pointers and sizes.
//
// Tensors are dense. Pixel tensors are channels-last: element (n, pixel, c) at (n * pixels + pixel) * channels + c.
// "acc" is the accumulation type: double for double, float for everything else. Segments are `indices, offsets` pairs:
// segment s takes the entries indices[offsets[s]] .. indices[offsets[s + 1] - 1], in that order.
#pragma once

namespace spade {

enum class Dtype { f32, f64, bf16, f16 };

}  // namespace spade
