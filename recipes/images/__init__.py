"""CIFAR-10 and ImageNet with residual networks."""
