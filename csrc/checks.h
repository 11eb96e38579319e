// What the operators require of their arguments, whatever the device. spade_kernels/checks.py requires the same where
// an operator's kernel is written in Python. A violation throws an error that names the operator, the argument and what
// was expected; after a check, kernels read and write nothing but the arguments and the results.
//
// The values of index tensors are compared with what they index. On a CPU that always happens, because it is free
// beside the reads through them. On a GPU the host would have to wait for the values: there it happens only if the
// environment variable SPADE_KERNELS_CHECK_INDICES is set to 1.
#pragma once

#include <string>

#include "tensors.h"

namespace spade {

void check_window_index(const Tensor& ids, torch::headeronly::IntHeaderOnlyArrayRef sizes, int64_t kernel_size,
                        int64_t stride, int64_t padding, int64_t levels);
void check_gather_sum(const Tensor& taps, const MaybeTensor& bias, const Tensor& windows, const MaybeTensor& indices,
                      const MaybeTensor& offsets);
void check_gather_sum_grad(const Tensor& grad, const Tensor& rows, const Tensor& indices, const Tensor& offsets,
                           int64_t num_taps);
void check_modulation_table(const Tensor& hidden, const Tensor& gamma, const Tensor& beta, const Tensor& bias,
                            const Tensor& windows, const MaybeTensor& packed_weight, const MaybeTensor& indices,
                            const MaybeTensor& offsets);
void check_modulation_table_grad(const Tensor& grad, const Tensor& hidden, const Tensor& gamma, const Tensor& beta,
                                 const Tensor& indices, const Tensor& offsets);
void check_pack_modulation_weight(const Tensor& gamma, const Tensor& beta);
void check_channel_stats(const Tensor& x);
void check_channel_stats_grad(const Tensor& x, const Tensor& mean, const Tensor& grad_mean, const Tensor& grad_m2);
void check_modulate(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                    const MaybeTensor& pixel_row, const MaybeTensor& image_offsets, const MaybeTensor& indices,
                    const MaybeTensor& offsets, int64_t upsample, const std::string& stats_scope);
void check_modulate_table_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                               const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& indices,
                               const MaybeTensor& offsets, int64_t upsample);
void check_modulate_input_grad(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                               const Tensor& table, const MaybeTensor& pixel_row, const MaybeTensor& mean_shift,
                               const MaybeTensor& mean_scale, int64_t upsample);
void check_pack_conv_weight(const Tensor& weight);
void check_conv(const Tensor& x, const Tensor& packed_weight, const Tensor& bias, const MaybeTensor& add);
void check_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& bias);
void check_conv3x3_input_grad(const Tensor& grad, const Tensor& weight);
void check_conv3x3_weight_grad(const Tensor& grad, const Tensor& x);
void check_modulate_conv(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& table,
                         const MaybeTensor& pixel_row, int64_t upsample, const Tensor& packed_weight,
                         const Tensor& bias, const MaybeTensor& add);

}  // namespace spade
