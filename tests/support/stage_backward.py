"""Forward, loss and backward of a stage without an executor or gradient buffers."""

from megatron_lite.parallel.gemm import weight_gradient


def add_to_grad(weight, gradient, x, *, last=True, fp8=None):
    """Add a weight gradient to `weight.grad`, as ParameterBuffers.accumulate_product adds it to a buffer."""
    product = weight_gradient(gradient, x, fp8)
    weight.grad = product if weight.grad is None else weight.grad.add_(product)


def run_backward(stage, batch, x=None, scale=1.0):
    """Run the last stage forward and backward; return the sum of the losses. `x`: None: the stage is the first too."""
    hidden = stage(x, batch)
    losses, gradient = stage.sample_losses(hidden.detach(), batch, scale, add_to_grad)
    hidden.backward(gradient)
    return losses.sum()
