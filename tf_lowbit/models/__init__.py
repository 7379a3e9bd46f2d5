"""The float networks of the low-bitwidth papers.

Two more networks are for small images: `plain_cnn`, a chain, and `mobilenet_v2`, with
depthwise convolutions and linear bottlenecks.

In every network the first convolution is "stem" and the dense layer of the logits is
"head". In every residual network the last activation is "final_relu". The papers' code
leaves these in full precision, and the rule "stem|head|final_relu" does so in all
networks (a rule matches whole names).
"""

from tf_lowbit.models.alexnet import alexnet
from tf_lowbit.models.imagenet_resnet import preact_resnet18, resnet18, resnet50
from tf_lowbit.models.mobilenet_v2 import mobilenet_v2
from tf_lowbit.models.plain_cnn import plain_cnn
from tf_lowbit.models.postact_resnet import postact_resnet
from tf_lowbit.models.preact_resnet import preact_resnet
from tf_lowbit.models.registry import get, names

__all__ = [
    "alexnet",
    "get",
    "mobilenet_v2",
    "names",
    "plain_cnn",
    "postact_resnet",
    "preact_resnet",
    "preact_resnet18",
    "resnet18",
    "resnet50",
]
