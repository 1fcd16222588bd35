"""The experiments of the source: ResNet-18 on CIFAR, trained under different schedulers."""
