"""How AlexNet is trained and judged: images, the training loop, evaluation."""
