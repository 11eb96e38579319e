// The second convolution, computed at the distinct windows only, for as many columns at a time as stay in cache.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "calls.h"
#include "gemm.h"
#include "scratch.h"
#include "segments.h"
#include "vector.h"

namespace spade {
namespace {

// The weights of two convolutions with equal strides, as one with 2 * channels outputs: scale, then shift.
struct ModulationWeights {
  const void* gamma;  // element (c, d, t) at c * channel_step + d * depth_step + t * tap_step, acc
  const void* beta;
  int64_t channels, depth, num_taps;
  int64_t channel_step, depth_step, tap_step;
};

// table[r] = bias + sum over t of hidden[windows[r, t] - 1] @ weights[t], where a window entry of 0 adds nothing.
struct ModulationTableParams {
  const void* hidden;  // (num_hidden, depth), acc
  ModulationWeights weights;
  const void* panels;      // weights packed by pack_modulation_weight, or null
  const void* bias;        // (2 * channels), acc
  const int64_t* windows;  // (num_rows, num_taps)
  void* table;             // (num_rows, 2 * channels), acc
  int64_t num_hidden, num_rows;
};

struct ModulationTableGradParams {
  const void* grad;    // (num_rows, 2 * channels), acc
  const void* hidden;  // (num_hidden, depth), acc
  ModulationWeights weights;
  const int64_t* indices;  // uses of each (hidden row, tap), see SegmentSumParams
  const int64_t* offsets;  // (num_hidden * num_taps + 1)
  void* d_hidden;          // like hidden
  void* d_gamma;           // (channels, depth, num_taps), dense
  void* d_beta;
  int64_t num_hidden;
};

constexpr int64_t kColumns = kPanelColumns;
constexpr int64_t kInCache = int64_t{4} << 20;  // bytes of tap products worked on at a time
constexpr int64_t kTilesPerTask = 16;
constexpr int64_t kWindowsPerTask = 256;
constexpr int64_t kDepthBlock = 8;

int64_t num_panels(const ModulationWeights& w) {
  return ceil_div(2 * w.channels, kColumns);
}

int64_t panel_size(const ModulationWeights& w) {
  return w.num_taps * w.depth * kColumns;
}

// The (depth, taps) weights of output column `column`.
template <class A>
const A* column_of(const ModulationWeights& w, int64_t column) {
  return column < w.channels ? static_cast<const A*>(w.gamma) + column * w.channel_step
                             : static_cast<const A*>(w.beta) + (column - w.channels) * w.channel_step;
}

// Fills one panel, (taps, depth, kColumns), in blocks of depth that stay in cache. Columns past the last are zero.
template <class A>
void fill_panel(const ModulationWeights& w, int64_t panel, A* to) {
  const int64_t first = panel * kColumns, valid = std::min(kColumns, 2 * w.channels - first);
  if (valid < kColumns) std::fill_n(to, panel_size(w), A(0));
  for (int64_t block = 0; block < w.depth; block += kDepthBlock) {
    const int64_t end = std::min(block + kDepthBlock, w.depth);
    for (int64_t i = 0; i < valid; ++i) {
      const A* from = column_of<A>(w, first + i);
      for (int64_t d = block; d < end; ++d)
        for (int64_t t = 0; t < w.num_taps; ++t)
          to[(t * w.depth + d) * kColumns + i] = from[d * w.depth_step + t * w.tap_step];
    }
  }
}

// The panels [first, first + count) of the packed weights that the caller gives, or packed here if there are none.
template <class A>
class Panels {
 public:
  Panels(const ModulationTableParams& p, int64_t most)
      : weights_(p.weights), kept_(static_cast<const A*>(p.panels)), made_(kept_ ? 0 : most * panel_size(p.weights)) {}

  const A* get(int64_t first, int64_t count) const {
    const int64_t size = panel_size(weights_);
    if (kept_) return kept_ + first * size;
    parallel_for_chunks(count, 1,
                        [&](int64_t i, int64_t) { fill_panel(weights_, first + i, made_.data() + i * size); });
    return made_.data();
  }

 private:
  const ModulationWeights& weights_;
  const A* kept_;
  Scratch<A> made_;
};

// Multiplies a tile of rows, `depth` long, with one tap of a panel.
template <class A>
void multiply_tile(int64_t depth, const A* rows, const A* panel, A* out, int64_t out_row, bool add) {
  const Microkernel<A>& kernel = microkernel<A>();
  for (int64_t c = 0; c < kColumns; c += kernel.columns)
    kernel.tile(depth, rows, depth, panel + c, kColumns, out + c, out_row, add);
}

struct Gather {
  const int64_t* windows;
  int64_t num_taps;
};

// out[r] = bias + sum over t of products[windows[r, t] - 1, t], for rows [begin, end) and `valid` columns.
template <class A>
SPADE_INLINE void gather(const Gather& g, const A* products, const A* bias, int64_t begin, int64_t end, int64_t valid,
                         A* out, int64_t out_row) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t* window = g.windows + r * g.num_taps;
    A sum[kColumns] = {};
    for (int64_t t = 0; t < g.num_taps; ++t) {
      if (window[t] == 0) continue;
      const A* from = products + ((window[t] - 1) * g.num_taps + t) * kColumns;
      for (int64_t i = 0; i < kColumns; ++i) sum[i] += from[i];
    }
    A* to = out + r * out_row;
    if (valid == kColumns)
      for (int64_t i = 0; i < kColumns; ++i) to[i] = sum[i] + bias[i];
    else
      for (int64_t i = 0; i < valid; ++i) to[i] = sum[i] + bias[i];
  }
}

SPADE_TARGET_CLONES void gather_any(const Gather& g, const float* products, const float* bias, int64_t begin,
                                    int64_t end, int64_t valid, float* out, int64_t out_row) {
  gather(g, products, bias, begin, end, valid, out, out_row);
}
SPADE_TARGET_CLONES void gather_any(const Gather& g, const double* products, const double* bias, int64_t begin,
                                    int64_t end, int64_t valid, double* out, int64_t out_row) {
  gather(g, products, bias, begin, end, valid, out, out_row);
}

// Multiplies each hidden row with each tap's weights once, and then sums the products of every window's taps.
template <class A>
void by_tap_products(const ModulationTableParams& p) {
  const ModulationWeights& w = p.weights;
  const int64_t tile_rows = microkernel<A>().rows, tiles = ceil_div(p.num_hidden, tile_rows);
  const int64_t panels = num_panels(w), products_size = tiles * tile_rows * w.num_taps * kColumns;
  const int64_t group = std::clamp(kInCache / (products_size * static_cast<int64_t>(sizeof(A))), int64_t{1}, panels);
  const Scratch<A> products(group * products_size);
  const A* hidden = static_cast<const A*>(p.hidden);
  // The rows of the last, incomplete tile, followed by rows of zeros.
  const int64_t whole = p.num_hidden / tile_rows * tile_rows;
  const Scratch<A> rest(tile_rows * w.depth);
  std::fill_n(rest.data(), tile_rows * w.depth, A(0));
  std::copy_n(hidden + whole * w.depth, (p.num_hidden - whole) * w.depth, rest.data());

  const Panels<A> weights(p, group);
  const int64_t tile_tasks = ceil_div(tiles, kTilesPerTask), window_tasks = ceil_div(p.num_rows, kWindowsPerTask);
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t count = std::min(group, panels - first);
    const A* panel = weights.get(first, count);
    parallel_for_chunks(count * w.num_taps * tile_tasks, 1, [&](int64_t task, int64_t) {
      const int64_t begin = task % tile_tasks * kTilesPerTask, end = std::min(begin + kTilesPerTask, tiles);
      const int64_t t = task / tile_tasks % w.num_taps, j = task / tile_tasks / w.num_taps;
      const A* tap = panel + (j * w.num_taps + t) * w.depth * kColumns;
      for (int64_t i = begin; i < end; ++i)
        multiply_tile(w.depth, i * tile_rows < whole ? hidden + i * tile_rows * w.depth : rest.data(), tap,
                      products.data() + j * products_size + (i * tile_rows * w.num_taps + t) * kColumns,
                      w.num_taps * kColumns, false);
    });
    parallel_for_chunks(count * window_tasks, 1, [&](int64_t task, int64_t) {
      const int64_t begin = task % window_tasks * kWindowsPerTask, j = task / window_tasks;
      const int64_t column = (first + j) * kColumns;
      gather_any({p.windows, w.num_taps}, products.data() + j * products_size, static_cast<const A*>(p.bias) + column,
                 begin, std::min(begin + kWindowsPerTask, p.num_rows), std::min(kColumns, 2 * w.channels - column),
                 static_cast<A*>(p.table) + column, 2 * w.channels);
    });
  }
}

// The hidden rows of windows [first, first + count), side by side for each tap: (taps, rows, depth).
template <class A>
void gather_windows(const ModulationTableParams& p, int64_t first, int64_t count, int64_t rows, A* to) {
  const ModulationWeights& w = p.weights;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < w.num_taps; ++t) {
      const int64_t id = r < count ? p.windows[(first + r) * w.num_taps + t] : 0;
      const A* from = static_cast<const A*>(p.hidden) + (id - 1) * w.depth;
      A* row = to + (t * rows + r) * w.depth;
      id == 0 ? std::fill_n(row, w.depth, A(0)) : std::copy_n(from, w.depth, row);
    }
}

// Multiplies each window's hidden rows with the weights: as many products as in a dense convolution, none of them
// stored.
template <class A>
void by_windows(const ModulationTableParams& p) {
  const ModulationWeights& w = p.weights;
  const int64_t tile_rows = microkernel<A>().rows, panels = num_panels(w), tile_size = w.num_taps * w.depth * tile_rows;
  const Panels<A> weights(p, panels);
  const A* panel = weights.get(0, panels);
  const Scratch<A> tiles(kTilesPerTask * tile_size);
  for (int64_t top = 0; top < p.num_rows; top += kTilesPerTask * tile_rows) {
    const int64_t count = std::min(kTilesPerTask, ceil_div(p.num_rows - top, tile_rows));
    parallel_for_chunks(count, 1, [&](int64_t i, int64_t) {
      const int64_t first = top + i * tile_rows;
      gather_windows(p, first, std::min(tile_rows, p.num_rows - first), tile_rows, tiles.data() + i * tile_size);
    });
    parallel_for_chunks(panels, 1, [&](int64_t j, int64_t) {
      const int64_t column = j * kColumns, valid = std::min(kColumns, 2 * w.channels - column);
      const A* bias = static_cast<const A*>(p.bias) + column;
      A sums[kMostTileRows * kColumns];
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t t = 0; t < w.num_taps; ++t)
          multiply_tile(w.depth, tiles.data() + i * tile_size + t * w.depth * tile_rows,
                        panel + (j * w.num_taps + t) * w.depth * kColumns, sums, kColumns, t > 0);
        const int64_t first = top + i * tile_rows, last = std::min(first + tile_rows, p.num_rows);
        for (int64_t r = first; r < last; ++r) {
          A* to = static_cast<A*>(p.table) + r * 2 * w.channels + column;
          for (int64_t c = 0; c < valid; ++c) to[c] = sums[(r - first) * kColumns + c] + bias[c];
        }
      }
    });
  }
}

template <class A>
void table_of(const ModulationTableParams& p) {
  // If nearly every window has a hidden row of its own, products per hidden row are no fewer, and storing them takes
  // time.
  const bool no_reuse = 5 * p.num_rows <= 6 * p.num_hidden;
  no_reuse ? by_windows<A>(p) : by_tap_products<A>(p);
}

// Writes the weights of `columns` output columns, beginning with `first`, as (taps, columns, depth).
template <class A>
void columns_first(const ModulationWeights& w, int64_t first, int64_t columns, A* to) {
  parallel_for_chunks(columns, 1, [&](int64_t i, int64_t) {
    const A* from = column_of<A>(w, first + i);
    for (int64_t t = 0; t < w.num_taps; ++t)
      for (int64_t d = 0; d < w.depth; ++d)
        to[(t * columns + i) * w.depth + d] = from[d * w.depth_step + t * w.tap_step];
  });
}

// Writes the gradient (taps, columns, depth) of some output columns to d_gamma and d_beta.
template <class A>
void scatter_columns(const ModulationTableGradParams& p, int64_t first, int64_t columns, const A* from) {
  const ModulationWeights& w = p.weights;
  parallel_for_chunks(columns, 1, [&](int64_t i, int64_t) {
    const int64_t column = first + i;
    A* to = column < w.channels ? static_cast<A*>(p.d_gamma) + column * w.depth * w.num_taps
                                : static_cast<A*>(p.d_beta) + (column - w.channels) * w.depth * w.num_taps;
    for (int64_t t = 0; t < w.num_taps; ++t)
      for (int64_t d = 0; d < w.depth; ++d) to[d * w.num_taps + t] = from[(t * columns + i) * w.depth + d];
  });
}

template <class A>
void grad_of(Dtype dtype, const ModulationTableGradParams& p) {
  const ModulationWeights& w = p.weights;
  const int64_t all = 2 * w.channels, per_column = std::max(p.num_hidden * w.num_taps, int64_t{1});
  const int64_t fitting = kInCache / (per_column * static_cast<int64_t>(sizeof(A))) / kColumns * kColumns;
  const int64_t group = std::clamp(fitting, std::min(kColumns, all), all);
  const Scratch<A> tap_grads(per_column * group), weights(w.num_taps * group * w.depth),
      d_weights(w.num_taps * group * w.depth);
  for (int64_t first = 0; first < all; first += group) {
    const int64_t columns = std::min(group, all - first), width = w.num_taps * columns;
    segment_sum(dtype, {static_cast<const A*>(p.grad) + first, p.indices, p.offsets, tap_grads.data(),
                        p.num_hidden * w.num_taps, columns, all, w.num_taps});
    columns_first(w, first, columns, weights.data());
    gemm(p.num_hidden, w.depth, width, Matrix<A>{tap_grads.data(), width, 1}, Rows<A>{weights.data(), w.depth},
         static_cast<A*>(p.d_hidden), first > 0);
    gemm(width, w.depth, p.num_hidden, Matrix<A>{tap_grads.data(), 1, width},
         Rows<A>{static_cast<const A*>(p.hidden), w.depth}, d_weights.data());
    scatter_columns(p, first, columns, d_weights.data());
  }
}

template <class A>
void panels_of(const ModulationWeights& w, A* panels) {
  parallel_for_chunks(num_panels(w), 1, [&](int64_t i, int64_t) { fill_panel(w, i, panels + i * panel_size(w)); });
}

void modulation_table(Dtype dtype, const ModulationTableParams& p) {
  dtype == Dtype::f64 ? table_of<double>(p) : table_of<float>(p);
}

void modulation_table_grad(Dtype dtype, const ModulationTableGradParams& p) {
  dtype == Dtype::f64 ? grad_of<double>(dtype, p) : grad_of<float>(dtype, p);
}

void pack_modulation_weight(Dtype dtype, const ModulationWeights& weights, void* panels) {
  dtype == Dtype::f64 ? panels_of(weights, static_cast<double*>(panels))
                      : panels_of(weights, static_cast<float*>(panels));
}

// gamma and beta (C, depth, k, k) in the accumulation type, kept alive beside the parameters that point into them.
struct WeightsCall {
  Tensor gamma, beta;
  ModulationWeights params{};

  WeightsCall(const Tensor& gamma_in, const Tensor& beta_in, ScalarType acc)
      : gamma(as(gamma_in, acc)), beta(as(beta_in, acc)) {
    if (!(evenly_apart(gamma) && same_strides())) {
      gamma = torch::stable::contiguous(gamma);
      beta = torch::stable::contiguous(beta);
    }
    params = {gamma.const_data_ptr(),        beta.const_data_ptr(), gamma.size(0),   gamma.size(1),
              gamma.size(2) * gamma.size(3), gamma.stride(0),       gamma.stride(1), tap_step(gamma)};
  }

 private:
  bool same_strides() const {
    return gamma.stride(0) == beta.stride(0) && gamma.stride(1) == beta.stride(1) &&
           gamma.stride(2) == beta.stride(2) && gamma.stride(3) == beta.stride(3);
  }
};

// Checks the weights (C, depth, k, k) of gamma and beta.
void check_weights(const Arguments& a, const Tensor& gamma, const Tensor& beta, int64_t depth) {
  a.floats("gamma", gamma, {kNotEmpty, depth, kNotEmpty, kNotEmpty});
  a.floats("beta", beta, {gamma.size(0), gamma.size(1), gamma.size(2), gamma.size(3)});
}

int64_t num_taps_of(const Tensor& weight) {
  return weight.size(2) * weight.size(3);
}

Tensor modulation_table_op(const Tensor& hidden_in, const Tensor& gamma, const Tensor& beta, const Tensor& bias_in,
                           const Tensor& windows_in, const MaybeTensor& packed_weight_in, const MaybeTensor& indices,
                           const MaybeTensor& offsets) {
  const Arguments a("modulation_table", hidden_in);
  a.floats("hidden", hidden_in, {size_of(hidden_in, 0), kNotEmpty});
  check_weights(a, gamma, beta, hidden_in.size(1));
  const int64_t columns = 2 * gamma.size(0), num_taps = num_taps_of(gamma);
  a.floats("bias", bias_in, {columns});
  a.index("windows", windows_in, {size_of(windows_in, 0), num_taps}, 0, hidden_in.size(0) + 1);
  a.floats("packed_weight", packed_weight_in,
           {ceil_div(columns, kPanelColumns), num_taps, hidden_in.size(1), kPanelColumns});
  a.segments(indices, offsets, (hidden_in.size(0) + 1) * num_taps, windows_in.numel());
  const ScalarType acc = accumulator(hidden_in);
  const Tensor hidden = dense(hidden_in, acc), bias = dense(bias_in, acc), windows = dense(windows_in);
  const MaybeTensor packed_weight = dense(packed_weight_in, acc);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor table = torch::stable::new_empty(hidden, {windows.size(0), 2 * gamma.size(0)});
  modulation_table(dtype_of(table),
                   {hidden.const_data_ptr(), weights.params, data(packed_weight), bias.const_data_ptr(), ids(windows),
                    table.mutable_data_ptr(), hidden.size(0), windows.size(0)});
  return dense(table, hidden_in.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modulation_table_grad_op(const Tensor& grad_in, const Tensor& hidden_in,
                                                                    const Tensor& gamma, const Tensor& beta,
                                                                    const Tensor& indices_in,
                                                                    const Tensor& offsets_in) {
  const Arguments a("modulation_table_grad", grad_in);
  a.floats("hidden", hidden_in, {size_of(hidden_in, 0), kNotEmpty});
  check_weights(a, gamma, beta, hidden_in.size(1));
  a.floats("grad", grad_in, {size_of(grad_in, 0), 2 * gamma.size(0)});
  a.segments(indices_in, offsets_in, (hidden_in.size(0) + 1) * num_taps_of(gamma),
             grad_in.size(0) * num_taps_of(gamma));
  const ScalarType acc = accumulator(grad_in);
  const Tensor grad = dense(grad_in, acc), hidden = dense(hidden_in, acc);
  const Tensor indices = dense(indices_in), offsets = dense(offsets_in);
  const WeightsCall weights(gamma, beta, acc);
  const Tensor d_hidden = torch::stable::empty_like(hidden);
  const auto like_weight = [&] {
    return torch::stable::new_empty(hidden, {gamma.size(0), gamma.size(1), gamma.size(2), gamma.size(3)});
  };
  const Tensor d_gamma = like_weight(), d_beta = like_weight();
  // Uses of id 0, outside the image, come first and have no hidden row.
  modulation_table_grad(dtype_of(grad), {grad.const_data_ptr(), hidden.const_data_ptr(), weights.params, ids(indices),
                                         ids(offsets) + weights.params.num_taps, d_hidden.mutable_data_ptr(),
                                         d_gamma.mutable_data_ptr(), d_beta.mutable_data_ptr(), hidden.size(0)});
  return {d_hidden, d_gamma, d_beta, column_sum(grad, grad.size(0), grad.size(1))};
}

Tensor pack_modulation_weight_op(const Tensor& gamma, const Tensor& beta) {
  check_weights(Arguments("pack_modulation_weight", gamma), gamma, beta, kNotEmpty);
  const WeightsCall weights(gamma, beta, accumulator(gamma));
  const ModulationWeights& w = weights.params;
  const int64_t count = ceil_div(2 * w.channels, kPanelColumns);
  const Tensor packed_weight = torch::stable::new_empty(weights.gamma, {count, w.num_taps, w.depth, kPanelColumns});
  pack_modulation_weight(dtype_of(packed_weight), w, packed_weight.mutable_data_ptr());
  return packed_weight;
}

}  // namespace
}  // namespace spade

STABLE_TORCH_LIBRARY_IMPL(spade_kernels, CPU, m) {
  m.impl("modulation_table", TORCH_BOX(&spade::modulation_table_op));
  m.impl("modulation_table_grad", TORCH_BOX(&spade::modulation_table_grad_op));
  m.impl("pack_modulation_weight", TORCH_BOX(&spade::pack_modulation_weight_op));
}
