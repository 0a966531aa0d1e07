// The weight gradient of a convolution over one to three dimensions,
//
//   grad_weight[o, c, k] = sum over n and p of grad_output[n, o, p] x[n, c, s p + d k - padding],
//
// where the channels c that meet an output o are those of its group.
#pragma once
#include <cstdint>

namespace torchbp {

// Depth, height and width; dimensions that a tensor lacks come first and have size 1.
struct Conv {
  int64_t samples, groups, inputs, outputs;  // inputs and outputs: channels of one group
  int64_t out[3], kernel[3], stride[3], padding[3], dilation[3];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Where the elements of a batch of channels lie.
template <class T>
struct Planes {
  const T* data;
  int64_t sample, channel, step[3], size[3];
};

// Places of a dimension: place q is element `step * q - padding`, zero where there is none.
struct Window {
  int64_t size[3], step[3], padding[3];

  int64_t places() const { return size[0] * size[1] * size[2]; }
  // The places of dimension d that are there, of `elements`: from begin on, below end.
  int64_t begin(int d) const { return padding[d] > 0 ? (padding[d] + step[d] - 1) / step[d] : 0; }
  int64_t end(int d, int64_t elements) const {
    const int64_t last = (elements + padding[d] + step[d] - 1) / step[d];
    return last < size[d] ? last : size[d];
  }
};

// Any number of channels per group; for one channel per group.
template <class T>
void dense_grad_weight(const Conv&, const Planes<T>& grad_output, const Planes<T>& x,
                       T* grad_weight);
template <class T>
void depthwise_grad_weight(const Conv&, const Planes<T>& grad_output, const Planes<T>& x,
                           T* grad_weight);

}  // namespace torchbp
