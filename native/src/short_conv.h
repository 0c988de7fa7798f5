// A short convolution: out = c * (the convolution of b * u), each channel by itself over the last tokens of a request.
#pragma once
#include <cstdint>

namespace pagoda {

// Consecutive tokens, `n` channels; b, u and c stand `width` floats apart in a row of `in`. past [kernel - 1][n] are the
// inputs of the convolution before, to which those of these tokens are added; taps [kernel][width].
inline void short_conv(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t tokens, int64_t n,
                       int64_t width, const float* taps, int kernel, float* past) {
  const int before = kernel - 1;
  for (int64_t t = 0; t < tokens; t++, in += in_stride, out += out_stride)
    for (int64_t i = 0; i < n; i++) {
      const float now = in[i] * in[width + i];
      float sum = 0.0f;
      for (int j = 0; j < before; j++) {
        float& at = past[j * n + i];
        sum += at * taps[j * width + i];
        at = j + 1 < before ? past[(j + 1) * n + i] : now;
      }
      out[i] = (sum + now * taps[before * width + i]) * in[2 * width + i];
    }
}

}  // namespace pagoda
