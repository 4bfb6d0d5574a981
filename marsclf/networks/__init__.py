"""Networks: backbones with their ImageNet weights, fast prediction, and Grad-CAM."""
