"""A packed archive: true k-bit weight codes and integer thresholds, for any machine.

An int8 file stores a 2-bit weight in a byte. An archive stores it in 2 bits. It also
has the thresholds at which a layer's accumulator reaches the next output code, so that
an accelerator or a microcontroller needs neither scales nor rounding.

**File.** An `.npz` file: a ZIP of NumPy `.npy` files (deflated). `header.npy` is a
vector of uint8, a JSON object in UTF-8. The array `<array>` of layer number `<i>`, from
0 in the header's order, is `<i>.<array>.npy`. All arrays are little-endian and in C
order, last axis fastest. There are no pickled objects.

**Header.** `format` ("tf_lowbit archive"), `version` (1), `library` (version of
tf_lowbit), `options` (of the export), `notes` (differences from the trained network),
`inputs` and `outputs` (names of layers), and `layers` in an order of execution. A layer
has `name`, `type`, `inputs` (names of the layers that it reads, in order), `shape` (of
its output, without the batch; null is any size), `input_grid` (of its first input),
`grid` (of its output), `arrays` (name -> `[dtype, shape]`), and the settings of its
type. Tensors are (batch, height, width, channels), (batch, steps, channels) or
(batch, features).

**Grids.** A tensor with a grid holds integer codes `low..high`, which include 0. The
real value is `code * step`. A tensor with grid null is float32, or the integers of
an argmax. In the int8 file the same codes are `code + zero_point`, in a tensor of scale
`scale`, and `clamp` is the fused activation that clamps at `low`.

**Integer layers** `integer_conv`, `integer_depthwise`, `integer_dense`,
`integer_scale`, `integer_transposed` compute `A = sum(input code * weight code)` and
output

    low + (number of j with thresholds[channel, j] <= A).

Weights have the shape `weight_shape`: (height, width, inputs, channels) or (width,
inputs, channels) for conv; (height, width, inputs, multiplier) or (width, inputs,
multiplier) for depthwise, where output channel `i * multiplier + m` reads input channel
i; (inputs, channels) for dense, over the last axis; (channels,) for scale, one factor
per channel; (height, width, channels, inputs) for transposed. Convolutions correlate
(no flip), with `strides`, `dilation` and `padding`, which pads with code 0. If a conv's
`inputs` are fewer than its input's channels, it is grouped: consecutive groups of input
channels give consecutive, equal groups of output channels. In each axis of a transposed
convolution, output o reads input i by tap j if `i * stride + j = o + before`, and there
are `stride * inputs + excess` outputs (`before` and `excess` are settings, two numbers
each). The arrays:

| array | type, shape | content |
|---|---|---|
| weights | uint8, (ceil(count * bits / 8),) | packed indices; or see "constant" |
| steps | float32, (channels,) | the trained weight is `code * step`, without its sign |
| signs | int8, (channels,) | -1, 0 or 1: multiplies the channel's weight codes |
| thresholds | int32, (channels, high - low) | decision points, ascending in each row |
| biases, weight_scales | int32, float32, (channels,) | for int8 kernels, see below |

`weight_grid` and `bits` define the code of an index: "odd" is `2 index - (2^bits - 1)`;
"signed" is `index + weight_low`, up to `weight_high`. "constant" weights (of pooling
and rescaling) are unpacked int8 codes in `weight_shape`, without `steps`. Index number
i, in C order of the weights, occupies the bits `i * bits` to `i * bits + bits - 1` of
the byte stream, where bit b is bit `b % 8`, from the least significant, of byte
`b // 8`. A sign of -1 comes from a negative factor of a normalization. A sign of 0
means that the channel outputs one code for every input; its A is 0. A threshold at or
below the smallest possible A is always reached, one above the largest never.

An int8 kernel gets the same codes, up to a few near-ties of 8-bit outputs, from
`clip(round((upscale A + bias) * M), low, high)` with `M = input_grid.scale *
weight_scale / grid.scale` and weights multiplied by sign and `upscale`. `kernel` names
its arithmetic ("xnnpack": float32, half to even; "builtin" and "tflm": 31-bit fixed
point, of TFLite and of TFLite Micro). `storage` is the type of the int8 file's weights,
and `represents` is the trained network's tensor that the layer outputs.

**Other layers** keep codes and grid if their input has any.

| type | settings and arrays | output |
|---|---|---|
| input | | float32 |
| to_codes | | `round(clip(x * r, low, high))`, half to even; float32, r = 1 / step |
| to_values | | `code * step` |
| integer_add | ratios | `clip(round(a p/q + b r/s))` for [[p, q], [r, s]]; no ties |
| max_pool | pool_size, strides, padding | padding of "same" does not count |
| average_pool | pool_size, strides, padding | float; padding does not count |
| global_max_pool, global_average_pool | keepdims | over steps, or height and width |
| zero_pad | padding | [before, after] of width, or of both, or of all and channels |
| edge_pad | padding | rows and columns at each border, mirrored: `b a a b b a` |
| crop | cropping | [before, after] of width, or of height and of width |
| upsample | size | repeats: `size[0]` in height, `size[1]` in width; steps `size` |
| interpolate | size | `upsample`, bilinear between the pixels' centers; float |
| flatten, reshape | | C order; to `shape` |
| permute | dims | output axis i is input axis dims[i]; the batch is axis 0 |
| concatenate | axis | |
| add, multiply | | float |
| dot | axes | for each example `x y^T` for [2, 2], `x y` for [2, 1]; float |
| affine | gain, offset | `gain x + offset` per channel, float |
| argmax | | the place of the largest in the last axis, of equal ones the first |
| conv, depthwise, dense | strides, padding, dilation_rate; kernel, bias | float |
| transposed | strides, before, excess; kernel, bias | float |
| relu | max_value | `min(max(x, 0), max_value)`; null for no upper bound |
| leaky_relu, prelu | alpha | `alpha x` below 0; a setting, or an array |
| layer_norm | epsilon; gamma, beta | over the last axis, variance + epsilon; float |
| activation | activation | gelu, linear, relu, relu6, sigmoid, softmax, swish or tanh |

"gelu" is exact, `x (1 + erf(x / sqrt(2))) / 2`.

**Padding** "valid" is none. "same" gives `ceil(size / stride)` outputs and pads
`max((outputs - 1) * stride + (window - 1) * dilation + 1 - size, 0)` in total, half of
it before, rounded down, and the rest behind.
"""
