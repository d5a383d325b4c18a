"""Triton kernels, and nothing else: this package imports torch, triton and itself only.

| module      | kernels                                                                                          |
|-------------|--------------------------------------------------------------------------------------------------|
| `halo`      | the layout of feature maps, and the copies into it and out of it                                 |
| `conv`      | convolution + bias + ReLU, its data gradient, its weight and bias gradients                      |
| `norm_pool` | local response normalisation + max pooling, forward and backward                                 |
| `linear`    | dropout + linear + bias + ReLU, and its gradients                                                |
| `augment`   | from bytes to the network's input: crop, mirror, colour, normalisation, conv1's layout           |
| `sgd`       | the update rule over all parameters in one launch                                                |
| `random`    | the Philox stream of dropout's masks                                                             |
| `config`    | block sizes, warps and stages of each launch                                                     |
| `target`    | what a configuration must know of a GPU                                                          |
| `launch`    | the one door through which kernels are launched: here, on the interpreter, or for the record     |

`alexnet_triton.chain` and `alexnet_triton.library` make operators of them.
"""
